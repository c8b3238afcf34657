"""Branch and bound: every row of every box is proved, refuted by a point, or left open when the time is over.

A domain is a box of inputs together with signs of some ReLU inputs. It is bounded by linear bounds with free slopes
and a multiplier for every known sign (beta-CROWN, Wang et al. 2021, theorem 3.1); domains of all images and rows are
bounded together, those of the rows that had least before the others, and a row's worst first. A domain not yet proved
is split at the open ReLU whose lines lose most (after Bunel et al. 2020), or, where none is open, across the input that
the bound depends on most: complete on ReLU networks.
Where linear bounds are worst, the box's corner is tried as a counterexample.

Boxes of pre-activations are found once per image and cut with the signs; interval arithmetic carries the cuts on. Where
nothing is left of a box the domain is empty. Slopes and multipliers start where the parent's ended. Departures from the
paper: one score for splitting, no look-ahead; rounding as in `_backward`, so a margin below it stays open.
"""

import heapq
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from stages.bounds import _slopes, _sweep
from stages.bounds._backward import Chain
from stages.bounds._interval import UNITS
from stages.bounds._trace import Op
from stages.bounds.base import Ball, Box, Contradiction
from stages.method import InputError

Split = tuple[int, int, int]  # which ReLU, which of its inputs, sign
Pause = Callable[[Tensor, Tensor, Tensor], Tensor]
_RATE = 0.1
_ROOT = 0.3  # of the time goes to the boxes at most


@dataclass(frozen=True, slots=True)
class Decision:
    """lower [B, R] float64: sound lower bounds; broken [B, R]: refuted, by points [B, R, ...] (elsewhere the centres).

    A row is proved where lower > goal, and open where it is neither.
    """

    lower: Tensor
    broken: Tensor
    points: Tensor


@dataclass(frozen=True, slots=True)
class _Domain:
    image: int
    row: int
    low: Tensor
    high: Tensor
    splits: tuple[Split, ...] = ()
    bound: float = -float("inf")
    # Where the parent's ascent ended: multipliers of its splits, and slopes by ReLU.
    multipliers: tuple[float, ...] = ()
    slopes: dict[str, Tensor] = field(default_factory=dict)


def decide(
    net: nn.Module,
    box: Box,
    rows: Tensor,
    seconds: float,
    goal: float | Tensor = 0.0,
    arithmetic: str = "float32",
    domains: int = 64,
    steps: int = 20,
    box_steps: int = 5,
    memory: float = 2.0,
    limit: int = 1_000_000,
    on_step: Callable[[int, int], None] | None = None,
    pause: Pause | None = None,
) -> Decision:
    """Is rows [B, R, K] @ logits > goal on all of the box? `seconds` for the whole batch; `domains` bounded at once.

    `steps` and `box_steps` are the ascent steps on a domain's bound and on the boxes of pre-activations; `limit` is the
    most domains that are bounded, for answers that do not depend on time. `goal` is one or [B, R]. `on_step` counts
    rows decided; `pause` hears now and then which rows are open, and what was refuted by which points, and answers
    which rows bool [B, R] to leave as they are. Raises `InputError` where seconds is not positive, and what linear
    bounds raise.
    """
    if not seconds > 0:
        raise InputError(f"seconds: expected a time above 0, got {seconds:g}")
    with torch.no_grad():
        end = time.monotonic() + seconds
        wanted = torch.as_tensor(goal, dtype=torch.float64, device=rows.device).expand(rows.shape[:2])
        search = _Search(net, box, rows, wanted, arithmetic, domains, steps, box_steps, memory, end)
        search.run(limit, on_step, pause)
        return Decision(search.result(), search.broken, search.points)


class _Search:
    def __init__(
        self,
        net: nn.Module,
        box: Box,
        rows: Tensor,
        goal: Tensor,
        arithmetic: str,
        domains: int,
        steps: int,
        box_steps: int,
        memory: float,
        end: float,
    ) -> None:
        self.net, self.box, self.rows, self.goal, self.end = net, box, rows, goal, end
        self.unit, self.double = UNITS[arithmetic], arithmetic == "real"
        self.steps, self.box_steps, self.memory = steps, box_steps, memory
        centre = ((box.low + box.high) / 2).clamp(box.low, box.high)
        self.points = centre.unsqueeze(1).expand(len(rows), rows.shape[1], *centre.shape[1:]).clone()
        self.broken = torch.zeros(rows.shape[:2], dtype=torch.bool, device=rows.device)
        chain = Chain(net, box, self.unit, self.double)
        self.first: dict[str, tuple[Tensor, Tensor]] = {}
        self._tightened(chain, memory, _sweep.plain, self.end)
        self.first = self._boxes(chain)
        self.lower = _sweep.logits(chain, rows, memory)
        self.closed = torch.full_like(self.lower, torch.inf)
        self.relus = [op for op in chain.done if op.kind == "relu"]
        self.input = chain.graph.input
        self.at_once = max(1, min(domains, _sweep.block(chain, memory / (4 * (1 + len(self.relus)))) * chain.batch))
        self.heap: list[tuple[int, float, int, _Domain]] = []
        self.dropped: list[_Domain] = []
        self.left = torch.zeros_like(self.broken)
        self.visits = torch.zeros_like(self.broken, dtype=torch.int64)
        self.waiting = torch.zeros_like(self.visits)
        self.count = 0

    def _tightened(
        self, chain: Chain, memory: float, bound: _sweep.Bound, end: float, images: Tensor | None = None
    ) -> None:
        """All operations in turn; after `end` boxes stay as they were in the first pass, or as intervals make them."""

        def timed(chain: _sweep.Rows, name: str, slopes: Tensor) -> Tensor:
            if time.monotonic() > end:
                raise TimeoutError
            return bound(chain, name, slopes)

        def tighten(op: Op) -> None:
            for name in chain.operands(op):
                if name in self.first:
                    chain.tighten(name, *(chain.unflat(name, side[images]) for side in self.first[name]))
            with suppress(TimeoutError):
                _sweep.tighten(chain, op, memory, timed)

        _sweep.follow(chain, tighten)

    def _boxes(self, chain: Chain) -> dict[str, tuple[Tensor, Tensor]]:
        """What non-linear operations read, [B, n] each end."""
        names = {name for op in chain.done if op.result in chain.fronts for name in chain.operands(op)}
        found = {}
        for name in names:
            low, high = _ends(chain, name)
            found[name] = chain.flat(name, low), chain.flat(name, high)
        return found

    def run(self, limit: int, on_step: Callable[[int, int], None] | None, pause: Pause | None) -> None:
        self._try(self.points)
        open_ = (self.lower <= self.goal) & ~self.broken
        images = open_.any(1).nonzero()[:, 0]
        if len(images) == 0 or time.monotonic() > self.end:
            return
        self._descend(open_)
        self._root(images)
        self._paused(pause, (self.lower <= self.goal) & ~self.broken)
        for image, row in ((self.lower <= self.goal) & ~self.broken & ~self.left).nonzero().tolist():
            self._push(_Domain(image, row, self.box.low[image], self.box.high[image]))
        while self.heap and limit > 0 and time.monotonic() < self.end:
            batch: list[_Domain] = []
            while self.heap and len(batch) < min(limit, self.at_once):
                domain = heapq.heappop(self.heap)[3]
                self.waiting[domain.image, domain.row] -= 1
                if not bool(self.broken[domain.image, domain.row] | self.left[domain.image, domain.row]):
                    batch.append(domain)
                else:
                    self.dropped.append(domain)
            if batch:
                self._bound(batch)
            limit -= len(batch)
            open_ = (self.waiting > 0) & ~self.broken & ~self.left
            if on_step is not None:
                on_step(open_.numel() - int(open_.sum()), open_.numel())
            self._paused(pause, open_)

    def _paused(self, pause: Pause | None, open_: Tensor) -> None:
        if pause is not None:
            self.left |= pause(open_, self.broken, self.points)

    def result(self) -> Tensor:
        """The least bound of a row's leaves, proved, open or dropped, and never below the first one."""
        found = self.closed.clone()
        for domain in (*self.dropped, *(entry[-1] for entry in self.heap)):
            here = found[domain.image, domain.row]
            found[domain.image, domain.row] = min(float(here), domain.bound)
        searched = torch.isfinite(found)
        lower = torch.where(searched, torch.maximum(found, self.lower), self.lower)
        if bool((self.broken & (lower > self.goal)).any()):
            raise Contradiction("branch and bound: a row is refuted by a point and proved; one of the bounds is wrong")
        return lower

    def _push(self, domain: _Domain) -> None:
        self.count += 1
        self.waiting[domain.image, domain.row] += 1
        heapq.heappush(self.heap, (int(self.visits[domain.image, domain.row]), domain.bound, self.count, domain))

    def _root(self, images: Tensor) -> None:
        """Boxes of what non-linear operations read, with optimised slopes, for the images that are open."""
        chain = Chain(self.net, self._part(images, self.box.low[images], self.box.high[images]), self.unit, self.double)
        room = self.memory / (4 * (1 + len(self.relus)))
        now = time.monotonic()
        end = now + _ROOT * (self.end - now)
        self._tightened(chain, room, _slopes.optimised(self.box_steps, _RATE), end, images)
        self.place = {int(image): i for i, image in enumerate(images)}
        self.roots = self._boxes(chain)
        found = _sweep.logits(chain, self.rows[images], self.memory)
        self.lower[images] = torch.maximum(self.lower[images], found)

    def _part(self, images: Tensor, low: Tensor, high: Tensor) -> Box:
        ball = self.box.ball
        return Box(low, high, None if ball is None else Ball(ball.centre[images], ball.norm, ball.eps))

    def _bound(self, batch: list[_Domain]) -> None:
        images = torch.tensor([d.image for d in batch], device=self.rows.device)
        rows = torch.tensor([d.row for d in batch], device=self.rows.device)
        places = torch.tensor([self.place[d.image] for d in batch], device=self.rows.device)
        box = self._part(images, torch.stack([d.low for d in batch]), torch.stack([d.high for d in batch]))
        chain = Chain(self.net, box, self.unit, self.double)
        signs: dict[str, Tensor] = {}
        betas: dict[str, Tensor] = {}
        for at, relu in enumerate(self.relus):
            name = relu.reads()[0]
            sign = torch.zeros(len(batch), self.roots[name][0].shape[1], dtype=chain.kind, device=box.low.device)
            beta = torch.zeros_like(sign)
            for i, domain in enumerate(batch):
                for (which, neuron, side), value in zip(domain.splits, (*domain.multipliers, 0.0), strict=False):
                    if which == at:
                        sign[i, neuron], beta[i, neuron] = side, value
            signs[relu.result], betas[relu.result] = sign, beta

        def cut(op: object) -> None:
            for name in chain.operands(op):  # type: ignore[arg-type]
                if name not in self.roots:
                    continue
                low, high = (end[places] for end in self.roots[name])
                result = getattr(op, "result", "")
                if result in signs:
                    low = torch.where(signs[result] > 0, low.clamp(min=0), low)
                    high = torch.where(signs[result] < 0, high.clamp(max=0), high)
                chain.tighten(name, chain.unflat(name, low), chain.unflat(name, high))

        _sweep.follow(chain, cut)
        here = self.rows[images, rows].to(chain.kind).unsqueeze(0)
        held = {
            relu.result: chain.unflat(relu.reads()[0], signs[relu.result])
            for relu in self.relus
            if bool(signs[relu.result].any())
        }
        first = _slopes.drawn(chain, chain.graph.output, 1)
        for key, slopes in first.items():
            slopes[0] = torch.stack([domain.slopes.get(key, slopes[0, i]) for i, domain in enumerate(batch)])
        names = {relu.result: relu.reads()[0] for relu in self.relus}
        start = {key: chain.unflat(names[key], betas[key]) for key in held}
        goal = self.goal[images, rows]
        self.visits.index_put_((images, rows), torch.ones_like(rows), accumulate=True)
        found = _slopes.ascend(chain, chain.graph.output, here, first, held, self.steps, _RATE, goal, start)
        best, watch = found.best, found.watch
        ended = {key: chain.flat(names[key], value) for key, value in found.multipliers.items()}
        self._corners(batch, images, rows, watch)
        scores = self._scores(chain, signs, watch)
        bounds, goals = torch.where(chain.empty, torch.inf, best[0]).tolist(), goal.tolist()
        for i, domain in enumerate(batch):
            bound = max(bounds[i], domain.bound)
            spot = (domain.image, domain.row)
            if bound > goals[i]:
                self.closed[spot] = min(float(self.closed[spot]), bound)
            elif not bool(self.broken[spot]):
                kept = tuple(float(ended[self.relus[which].result][i, neuron]) for which, neuron, _ in domain.splits)
                ends = {key: ended_at[0, i].clone() for key, ended_at in found.lower.items()}
                after = replace(domain, bound=bound, multipliers=kept, slopes=ends)
                self._split(after, scores[i], watch.get(chain.graph.input), i)
            else:
                self.dropped.append(domain)

    def _corners(self, batch: list[_Domain], images: Tensor, rows: Tensor, watch: dict[str, Tensor]) -> None:
        """Where the last linear bound is least, the network itself may be low enough."""
        slopes = watch.get(self.input)
        if slopes is None:
            return
        points = torch.where(slopes[0] > 0, torch.stack([d.low for d in batch]), torch.stack([d.high for d in batch]))
        if self.box.ball is not None:
            points = torch.stack([self._inside(d.image, point) for d, point in zip(batch, points, strict=True)])
        values = (self.rows[images, rows].double() * self.net(points).double()).sum(1)
        for i in (values <= self.goal[images, rows]).nonzero()[:, 0].tolist():
            image, row = batch[i].image, batch[i].row
            if not bool(self.broken[image, row]):
                self.broken[image, row] = True
                self.points[image, row] = points[i]

    def _inside(self, image: int, point: Tensor) -> Tensor:
        """The point drawn towards the ball's centre until it is in the ball."""
        ball = self.box.ball
        if ball is None:
            return point
        away = point - ball.centre[image]
        length = torch.linalg.vector_norm(away.double(), 1.0 if ball.norm == "l1" else 2.0)
        return ball.centre[image] + away * min(1.0, ball.eps / max(float(length), 1e-12) * (1 - 1e-6))

    def _try(self, points: Tensor) -> None:
        """Keeps the points [B, R, ...] that refute their rows."""
        logits = self.net(points.flatten(0, 1)).unflatten(0, points.shape[:2])
        refuted = ((self.rows.double() * logits.double()).sum(2) <= self.goal) & ~self.broken
        self.points[refuted] = points[refuted]
        self.broken |= refuted

    def _descend(self, open_: Tensor) -> None:
        """Projected descent by signs from the centre, for the rows that are open."""
        low, high = self.box.low.unsqueeze(1), self.box.high.unsqueeze(1)
        points = self.points.clone()
        for step in range(20):
            points = points.detach().requires_grad_()
            with torch.enable_grad():
                logits = self.net(points.flatten(0, 1)).unflatten(0, points.shape[:2])
                total = (self.rows * logits * open_.unsqueeze(2)).sum()
            (grad,) = torch.autograd.grad(total, points)
            points = (points - grad.sign() * (high - low) * (0.5 * 0.85**step)).clamp(low, high).detach()
            for image, row in open_.nonzero().tolist():
                points[image, row] = self._inside(image, points[image, row])
            self._try(points)
            if bool((self.broken | ~open_).all()):
                return

    def _scores(self, chain: Chain, signs: dict[str, Tensor], watch: dict[str, Tensor]) -> Tensor:
        """[D, all ReLU inputs]: what the lines of an open one lose in the bound; -1 where it is not open."""
        parts = []
        for relu in self.relus:
            name = relu.reads()[0]
            low, high = (chain.flat(name, end) for end in _ends(chain, name))
            slopes = watch.get(relu.result)
            weight = torch.zeros_like(low) if slopes is None else chain.flat(relu.result, slopes[0])
            above = -weight.clamp(max=0) * high * -low / (high - low).clamp(min=1e-30)
            below = weight.clamp(min=0) * torch.minimum(high, -low) / 2
            parts.append(torch.where((low < 0) & (high > 0) & (signs[relu.result] == 0), above + below, -1.0))
        return torch.cat(parts, 1) if parts else torch.zeros(chain.batch, 0, device=chain.ends.inside.low.device)

    def _split(self, domain: _Domain, scores: Tensor, slopes: Tensor | None, place: int) -> None:
        best = int(scores.argmax()) if scores.numel() else -1
        if best >= 0 and float(scores[best]) >= 0:
            for at, relu in enumerate(self.relus):
                width = self.roots[relu.reads()[0]][0].shape[1]
                if best < width:
                    for side in (1, -1):
                        self._push(replace(domain, splits=(*domain.splits, (at, best, side))))
                    return
                best -= width
        width_of = domain.high - domain.low
        gain = width_of if slopes is None else width_of * (slopes[0, place].abs() + 1e-12)
        at = int(gain.argmax())
        middle = (domain.low + domain.high).flatten()[at] / 2
        for side in (0, 1):
            low, high = domain.low.clone(), domain.high.clone()
            (high if side == 0 else low).view(-1)[at] = middle
            self._push(replace(domain, low=low, high=high))


def _ends(chain: Chain, name: str) -> tuple[Tensor, Tensor]:
    box = chain.values[name]
    return box.low, box.high
