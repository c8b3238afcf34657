"""Branch and bound: every row of every box is proved, refuted by a point, or left open when the time is over.

A domain is a box of inputs together with sides of some inputs of ReLUs, sigmoids and tanhs. It is bounded by linear
bounds with free slopes and a multiplier for every known side (beta-CROWN, Wang et al. 2021, theorem 3.1; `_dual`);
domains of all images and rows are bounded together, those of the rows that had least before the others, and a row's
worst first. A domain not yet proved is split at the open ReLU whose lines lose most (after Bunel et al. 2020), or in
the middle of the range of a sigmoid's or tanh's input (Shi et al., "Neural Network Verification with Branch-and-Bound
for General Nonlinearities", 2025; no point is searched for), or, where none is left, across the input that the bound
depends on most: complete on ReLU networks. Where all are ReLUs and there are no maps, the one of the first few is split
whose halves are bounded best (`_cuts`).
Where linear bounds are worst, the box's corner is tried as a counterexample.

Boxes of pre-activations are found once per image and cut with the signs; interval arithmetic carries the cuts on. They
are formed anew, of the points that refute the row alone, for every row at first and, where there are no maps, for
domains that have come nearer to a proof: of values in maps by `_halfspace`, of others by `_joint`. Where nothing is
left of a box the domain is empty. Slopes and multipliers start where the parent's ended. Departures from the paper:
boxes formed anew; one score for splitting; rounding as in `_backward`, so a margin below it stays open.
"""

import heapq
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from stages.bounds import _cuts, _slopes, _sweep
from stages.bounds._backward import Chain
from stages.bounds._domains import Domains, Pool
from stages.bounds._dual import Ascent, Known, ascend
from stages.bounds._halfspace import Halfspace
from stages.bounds._interval import UNITS
from stages.bounds._joint import narrowed
from stages.bounds._roots import Boxes, Roots, followed, tightened
from stages.bounds.base import Ball, Box, Contradiction
from stages.method import InputError

Pause = Callable[[Tensor, Tensor, Tensor], Tensor]
_RATE, _BOX_RATE = 0.1, 0.5
BENT = frozenset({"relu", "sigmoid", "tanh"})
_ROOT = 0.3  # of the time goes to the boxes at most
_NARROW_STEPS, _JOINT_STEPS = 3, 2
_SHRUNK, _VECTORS = 0.9, 0.97  # of what was missed: less, and boxes are formed anew; the latter where no maps are
_MOST = 16  # of a batch
_CUTS = 32  # that are looked at where there are no maps and no curves, whose lines take long to draw


@dataclass(frozen=True, slots=True)
class Decision:
    """lower [B, R] float64: sound lower bounds; broken [B, R]: refuted, by points [B, R, ...] (elsewhere the centres).

    A row is proved where lower > goal, and open where it is neither.
    """

    lower: Tensor
    broken: Tensor
    points: Tensor


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
    most domains that are bounded with an ascent, for answers that do not depend on time. `goal` is one or [B, R].
    `on_step` counts rows decided; `pause` hears now and then which rows are open, and what was refuted by which points,
    and answers which rows bool [B, R] to leave as they are. Raises `InputError` where seconds is not positive, and what
    linear bounds raise.
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
        centre = self._inside(torch.arange(len(rows), device=rows.device), centre)  # a cut ball's box has another one
        self.points = centre.unsqueeze(1).expand(len(rows), rows.shape[1], *centre.shape[1:]).clone()
        self.broken = torch.zeros(rows.shape[:2], dtype=torch.bool, device=rows.device)
        chain = Chain(net, box, self.unit, self.double)
        self.first: Boxes = tightened(chain, memory, _sweep.plain, self.end, {})
        self.roots = Roots()
        self.lower = _sweep.logits(chain, rows, memory)
        self.least = torch.full_like(self.goal, torch.inf).contiguous()  # of domains that are done with
        self.bends = tuple(op for op in chain.done if op.kind in BENT)
        self.flat = tuple(len(chain.shape(op.reads()[0])) == 2 for op in self.bends)
        self.cuts = _CUTS if all(self.flat) and all(op.kind == "relu" for op in self.bends) else 1
        self.widths = tuple(self.first[op.reads()[0]][0].shape[1] for op in self.bends)
        self.kind = chain.kind
        self.at_once = max(1, min(domains, _sweep.block(chain, memory / (4 * (1 + len(self.bends)))) * chain.batch))
        self.lows, self.highs = list(box.low.contiguous().unbind()), list(box.high.contiguous().unbind())
        self.heap: list[tuple[int, float, int, int, int, int]] = []  # visits, bound, count, number, image, row
        self.place = torch.zeros(len(rows), dtype=torch.int64, device=rows.device)
        self.pool = Pool(self._whole(self.broken.new_zeros(0, 2, dtype=torch.int64)))
        self.left = torch.zeros_like(self.broken)
        self.visits = torch.zeros_like(self.broken, dtype=torch.int64)
        self.waiting = torch.zeros_like(self.visits)
        self.count = 0

    def run(self, limit: int, on_step: Callable[[int, int], None] | None, pause: Pause | None) -> None:
        self._try(self.points)
        open_ = (self.lower <= self.goal) & ~self.broken
        images = open_.any(1).nonzero()[:, 0]
        if len(images) == 0 or time.monotonic() > self.end:
            return
        self._descend(open_)
        self._root(images)
        open_ = (self.lower <= self.goal) & ~self.broken
        self._paused(pause, open_)
        self._push(self._whole((open_ & ~self.left).nonzero()))
        while self.heap and limit > 0 and time.monotonic() < self.end:
            batch: list[int] = []
            while self.heap and len(batch) < min(limit, self.at_once):
                *_, number, image, row = heapq.heappop(self.heap)
                self.waiting[image, row] -= 1
                if bool(self.broken[image, row] | self.left[image, row]):
                    self._retire(self.pool.take([number]))
                else:
                    batch.append(number)
            if batch:
                self._bound(self.pool.take(batch))
            limit -= len(batch)
            open_ = (self.waiting > 0) & ~self.broken & ~self.left
            if on_step is not None:
                on_step(open_.numel() - int(open_.sum()), open_.numel())
            self._paused(pause, open_)

    def _paused(self, pause: Pause | None, open_: Tensor) -> None:
        if pause is not None:
            self.left |= pause(open_, self.broken, self.points)

    def result(self) -> Tensor:
        """The least bound of a row's leaves, proved, open or left, and never below the first one.

        Bounds on the points that refute a row (`_narrow`) say no more than that it is above its goal.
        """
        self._retire(self.pool.take([entry[3] for entry in self.heap]))
        lower = torch.where(self.least.isfinite(), torch.maximum(self.least, self.lower), self.lower)
        both = self.broken & (lower > self.goal)
        if self.unit == 0:  # float32, in which points are tried, may refute what holds in exact arithmetic
            lower = torch.where(both, torch.nextafter(self.goal, torch.full_like(self.goal, -torch.inf)), lower)
        elif bool(both.any()):
            raise Contradiction("branch and bound: a row is refuted by a point and proved; one of the bounds is wrong")
        return lower

    def _whole(self, places: Tensor) -> Domains:
        """Domains without constraints for images and rows [N, 2]."""
        image, row = places.unbind(1)
        none = torch.zeros(len(places), 0, dtype=self.kind, device=places.device)
        slopes = none.new_full((len(places), sum(self.widths)), torch.nan, dtype=torch.float16)
        bound = torch.full_like(image, -torch.inf, dtype=torch.float64)
        return Domains(image, row, image, self.place[image], bound, -bound, none.long(), none, none, none, slopes)

    def _push(self, some: Domains) -> None:
        spots, ones = (some.image, some.row), torch.ones_like(some.image)
        self.waiting.index_put_(spots, ones, accumulate=True)
        numbers = self.pool.put(some)
        parts = (self.visits[spots], some.bound, some.image, some.row)
        for number, visits, bound, image, row in zip(numbers, *(part.tolist() for part in parts), strict=True):
            self.count += 1
            heapq.heappush(self.heap, (visits, bound, self.count, number, image, row))

    def _retire(self, some: Domains) -> None:
        """What is never looked at again still counts for its row."""
        spots = some.image * self.least.shape[1] + some.row
        above = torch.nextafter(self.goal, torch.full_like(self.goal, torch.inf)).view(-1)[spots]
        self.least.view(-1).scatter_reduce_(0, spots, torch.minimum(some.bound, above), "amin")

    def _root(self, images: Tensor) -> None:
        """Boxes of what non-linear operations read, with optimised slopes, for the images that are open."""
        chain = Chain(self.net, self._part(images, self.box.low[images], self.box.high[images]), self.unit, self.double)
        room = self.memory / (4 * (1 + len(self.bends)))
        now = time.monotonic()
        end = now + _ROOT * (self.end - now)
        boxes = {name: (low[images], high[images]) for name, (low, high) in self.first.items()}
        boxes = tightened(chain, room, _slopes.optimised(self.box_steps, _BOX_RATE), end, boxes)
        self.place[images] = self.roots.add(boxes, len(images))
        found = _sweep.logits(chain, self.rows[images], self.memory)
        self.lower[images] = torch.maximum(self.lower[images], found)

    def _part(self, images: Tensor, low: Tensor, high: Tensor) -> Box:
        ball = self.box.ball
        return Box(low, high, None if ball is None else Ball(ball.centre[images], ball.norm, ball.eps))

    def _chain(self, some: Domains) -> Chain:
        places = some.box.tolist()
        low, high = (torch.stack([ends[i] for i in places]) for ends in (self.lows, self.highs))
        return Chain(self.net, self._part(some.image, low, high), self.unit, self.double)

    def _ascent(self, some: Domains, steps: int) -> tuple[Chain, Ascent, Tensor]:
        """The chain, what was found, and the best bounds [N]."""
        chain, known, spots = self._chain(some), self._known(some), (some.image, some.row)
        followed(chain, self._start(some, known))
        row = self.rows[spots].to(chain.kind)
        found = ascend(chain, row, self._slopes(chain, some), known, steps, _RATE, self.goal[spots])
        return chain, found, torch.maximum(torch.where(chain.empty, torch.inf, found.best), some.bound)

    def _glanced(self, some: Domains) -> Tensor:
        """Bounds [N] without any ascent, those of the domains they were cut from when the time is over."""
        done = []
        for part in torch.split(torch.arange(len(some), device=some.image.device), self.at_once):
            late = time.monotonic() > self.end
            done.append(some.bound[part] if late else self._ascent(some[part], 0)[2])
        return torch.cat(done)

    def _bound(self, some: Domains) -> None:
        spots = some.image, some.row
        self.visits.index_put_(spots, torch.ones_like(some.image), accumulate=True)
        goal = self.goal[spots]
        chain, found, bound = self._ascent(some, self.steps)
        self._corners(some, found)
        ends = [
            chain.flat(op.reads()[0], found.lower[op.result][0])
            if op.result in found.lower
            else torch.zeros(len(some), width, device=goal.device)
            for op, width in zip(self.bends, self.widths, strict=True)
        ]
        slopes = torch.cat(ends, 1).half() if ends else some.slopes
        some = replace(some, bound=bound, push=found.push, slopes=slopes)
        open_ = (bound <= goal) & ~self.broken[spots]
        self._retire(some[~open_])
        watched = found.watch.get(chain.graph.input)  # None where a bound is a constant
        again, later = self._worth(some, goal - bound, open_ & (watched is not None))
        if watched is not None and bool(again.any()):
            space = Halfspace.of(chain, found.last, watched[0], goal)
            lower = {key: chain.flat(key, value)[:, again] for key, value in found.lower.items()}
            self._narrow(some[again], space.of_images(again), lower)
        self._push(some[later])
        open_ &= ~again & ~later
        if bool(open_.any()):
            scores, points = _cuts.scored(chain, self.bends, found.watch)
            self._split(some[open_], scores[open_], points[open_], None if watched is None else watched[0][open_])

    def _worth(self, some: Domains, misses: Tensor, open_: Tensor) -> tuple[Tensor, Tensor]:
        """Which domains to narrow now, and later: what they miss has shrunk since that was done last, and there is
        room. Where there are maps, parts of a row's domain are split: hundreds of domains are bounded in the time that
        new boxes of one take."""
        whole, vectors = (some.side != 0).sum(1) == 0, all(self.flat)
        worth = open_ & (misses < (_VECTORS if vectors else _SHRUNK) * some.missed) & (whole | vectors)
        worth &= bool(self.bends)
        room = self.memory * 2**28 / max(1, self.roots.bytes()) - self.roots.count
        now = worth & (worth.cumsum(0) <= min(room, _MOST))
        return now, worth & ~now & vectors & (room > _MOST)

    def _narrow(self, some: Domains, space: Halfspace, lower: dict[str, Tensor]) -> None:
        """New boxes for the domains, of the points that refute their rows; they are bounded again."""
        now, boxes = time.monotonic(), self._start(some, self._known(some))
        end = now + _ROOT * (self.end - now)
        room = self.memory / (4 * (1 + len(self.bends)))
        vectors = [op for op, flat in zip(self.bends, self.flat, strict=True) if flat]
        empty = torch.zeros_like(some.image, dtype=torch.bool)
        if len(vectors) < len(self.bends):
            chain = self._chain(some)
            best = _slopes.optimised(_NARROW_STEPS, _BOX_RATE, space)
            boxes, empty = tightened(chain, room, best, end, boxes, sharp=False), chain.empty
        if vectors:
            row, goal = self.rows[some.image, some.row].to(self.kind), self.goal[some.image, some.row]
            begin = partial(self._chain, some)
            boxes, none = narrowed(begin, vectors, row, goal, lower, boxes, room, _JOINT_STEPS, end)
            empty = empty | none
        missed = self.goal[some.image, some.row] - some.bound
        bound = torch.where(empty, torch.inf, some.bound)
        some = replace(some, root=self.roots.add(boxes, len(some)), bound=bound, missed=missed)
        self._retire(some[empty])
        self._push(some[~empty])

    def _known(self, some: Domains) -> Known:
        return Known(self.bends, self.widths, some.at, some.side, some.point, some.push)

    def _start(self, some: Domains, known: Known) -> Boxes:
        """The boxes of the domains' sets, cut by what is known; low may be above high."""
        boxes, cuts = self.roots.take(some.root), known.ends()
        for op in self.bends:
            name, (low, high) = op.reads()[0], (ends[op.result] for ends in cuts)
            boxes[name] = torch.maximum(boxes[name][0], low), torch.minimum(boxes[name][1], high)
        return boxes

    def _slopes(self, chain: Chain, some: Domains) -> dict[str, Tensor]:
        """The slopes that the parents' ascent ended with, else those of CROWN."""
        first = _slopes.drawn(chain, chain.graph.output, 1)
        for op, theirs in zip(self.bends, torch.split(some.slopes, list(self.widths), 1), strict=True):
            if op.result in first:
                old = chain.unflat(op.reads()[0], theirs.to(chain.kind)).unsqueeze(0)
                first[op.result] = torch.where(old.isnan(), first[op.result], old)
        return first

    def _corners(self, some: Domains, found: Ascent) -> None:
        """Where the last linear bound is least, the network itself may be low enough."""
        if found.lowest is None:
            return
        spots = some.image, some.row
        points = self._inside(some.image, found.lowest.to(self.points.dtype))
        values = (self.rows[spots].double() * self.net(points).double()).sum(1)
        for i in ((values <= self.goal[spots]) & ~self.broken[spots]).nonzero()[:, 0].tolist():
            image, row = int(some.image[i]), int(some.row[i])
            self.broken[image, row] = True
            self.points[image, row] = points[i]

    def _inside(self, images: Tensor, points: Tensor) -> Tensor:
        """The points [N, ...] drawn towards the balls' centres until they are in the balls."""
        ball = self.box.ball
        if ball is None:
            return points
        away = points - ball.centre[images]
        length = torch.linalg.vector_norm(away.double().flatten(1), 1.0 if ball.norm == "l1" else 2.0, 1)
        share = (ball.eps / length.clamp(min=1e-12) * (1 - 1e-6)).clamp(max=1.0).to(points.dtype)
        inside: Tensor = ball.centre[images] + away * share.view(-1, *(1,) * (points.dim() - 1))
        return inside.clamp(self.box.low[images], self.box.high[images])  # a sum may end a step beyond

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
            if not total.requires_grad:  # all that comes of the pixels goes through comparisons
                return
            (grad,) = torch.autograd.grad(total, points, allow_unused=True, materialize_grads=True)
            points = (points - grad.sign() * (high - low) * (0.5 * 0.85**step)).clamp(low, high).detach()
            images = torch.arange(len(points), device=points.device).repeat_interleave(points.shape[1])
            points = self._inside(images, points.flatten(0, 1)).view_as(points)
            self._try(points)
            if bool((self.broken | ~open_).all()):
                return

    def _split(self, some: Domains, scores: Tensor, points: Tensor, slopes: Tensor | None) -> None:
        """Two of each: at the value that scores best, or across the input that the bound depends on most."""
        bent = (scores >= 0).any(1)
        if bool(bent.any()):
            mine, goal = some[bent], self.goal[some.image[bent], some.row[bent]]
            both = _cuts.halves(mine, scores[bent], points[bent], goal, self._glanced, self.cuts)
            proved = both.bound > goal.repeat_interleave(2)
            self._retire(both[proved])
            self._push(both[~proved])
        for i in (~bent).nonzero()[:, 0].tolist():
            box = int(some.box[i])
            low, high = self.lows[box], self.highs[box]
            gain = (high - low) * (1.0 if slopes is None else slopes[i].abs() + 1e-12)
            side = int(gain.argmax())
            left, right = high.clone(), low.clone()
            left.view(-1)[side] = right.view(-1)[side] = (low + high).flatten()[side] / 2
            number = len(self.lows)
            self.lows += [low, right]
            self.highs += [left, high]
            both = some[torch.tensor([i, i], device=some.image.device)]
            self._push(replace(both, box=torch.tensor([number, number + 1], device=some.image.device)))
