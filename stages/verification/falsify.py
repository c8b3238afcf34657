"""The search for a witness: descent on how far the outputs are from meeting some case, and climbing where it ends."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Generator, Tensor, nn

from stages.verification._straight import Straight
from stages.verification.cases import Array, Cases
from stages.verification.clock import Clock

Check = Callable[[Array], bool]
_STEPS, _SHORT = 60, 15
_MOMENTUM = 0.75
_FIRST, _GENTLE = 0.25, 0.03
_MEAN, _SQUARE = 0.9, 0.999
_PATIENCE = 5
_MOST = 1 << 12
_LOOK = 0.15
_TRIES = 4
_KEPT = 32
_WIDEST = 1 << 26  # numbers compared at once
_TRIALS = 30
_FINEST = 5.0  # decades below the width of the box


@dataclass(slots=True)
class Hunt:
    """Rounds on the cases that are still open, until `check` says that a point is a witness; three kinds, in turn.

    One particle per point, each with a case (A, b) of its own, is moved to make

        g(x) = max_u (A_u f(x) - b_u)

    small, or, every other particle, the sum of the positive entries.
    1. Descent from new starts, in turn the best of a random sample of the box, corners, and points on random faces:
       steps of sign(gradient) in units of the box's width with momentum, as APGD does (Croce and Hein 2020); the step
       is halved and the best point taken up again whenever `_PATIENCE` steps brought nothing. Departures: no schedule
       of check points, for a round is short and is repeated from new starts; and half of the particles, two of four,
       take the smaller steps of Adam (Kingma and Ba 2015), which come to rest inside the box.
    2. Climbing from the best points so far: random changes of all or of few inputs, of every size, and the best one is
       taken. It needs no gradient, and finds the way where the best points are corners between linear pieces.
    3. Descent from the best points so far, with small first steps of every size.
    """

    net: nn.Module
    cases: Cases
    check: Check
    rng: Generator
    particles: int = 0
    refused: int = 0
    _turn: int = 0
    _rest: int = 0
    _rows: Tensor = field(init=False)
    _bounds: Tensor = field(init=False)
    _best: Tensor = field(init=False)
    _far_of: Tensor = field(init=False)
    _case_of: Tensor = field(init=False)

    def __post_init__(self) -> None:
        size = self.cases.rows.abs().amax(1).clamp(min=1)
        self._rows = (self.cases.rows / size.unsqueeze(1)).float()
        self._bounds = (self.cases.bounds / size).float()
        self._best, self._far_of = self.cases.inner_low[:0], torch.zeros(0)
        self._case_of = torch.zeros(0, dtype=torch.int64)

    def round(self, open_cases: Tensor, clock: Clock) -> Array | None:
        """A witness float32 [n], or None where this round found none; `open_cases` int64 names the cases to try."""
        if len(open_cases) == 0:
            return None
        if self.particles == 0:
            self.particles = self._affordable(open_cases, clock)
        begun = clock.spent()
        found = self._kind(open_cases, clock)
        spent = clock.spent() - begun
        if spent < _LOOK * max(clock.left(), 0) / 4 and spent < 1:
            self.particles = min(2 * self.particles, _MOST)
        elif spent > 2 and self.particles > 1:
            self.particles //= 2
        return found

    def around(self, low: Tensor, high: Tensor, which: Tensor, clock: Clock) -> Array | None:
        """A witness near sub-boxes float32 [P, n], each for its case int64 [P], from one random point in each; and a
        round on these cases."""
        x = low + torch.rand(low.shape, generator=self.rng) * (high - low)
        found = self._descend(self._within(x, which), which, clock, high - low, _SHORT)
        return self.round(torch.unique(which), clock) if found is None else found

    def _kind(self, open_cases: Tensor, clock: Clock) -> Array | None:
        turn, self._turn = self._turn, self._turn + 1
        still = torch.isin(self._case_of, open_cases)
        self._best, self._far_of, self._case_of = self._best[still], self._far_of[still], self._case_of[still]
        if turn % 3 == 0 or len(self._best) == 0:
            x, which = self._starts(open_cases, self.particles)
            return self._descend(x, which, clock, self._width(which))
        if turn % 3 == 1 and self._rest == 0:
            return self._climb(clock)
        self._rest = max(self._rest - 1, 0)
        copies = torch.arange(self.particles) % len(self._best)
        which = self._case_of[copies]
        return self._descend(self._best[copies], which, clock, self._sizes(len(copies)) * self._width(which))

    @torch.no_grad()
    def _affordable(self, open_cases: Tensor, clock: Clock) -> int:
        """Particles for the first round, so that it takes about a quarter of the time; a step costs three passes."""
        low, _ = self._box(open_cases[:1])
        begun = clock.spent()
        self.net(low)
        once = max(clock.spent() - begun, 1e-9)
        return max(1, min(64, int(max(clock.left(), 0.0) / (4 * once * (3 * _STEPS + 4)))))

    @torch.no_grad()
    def _starts(self, open_cases: Tensor, count: int) -> tuple[Tensor, Tensor]:
        which = open_cases[torch.randint(len(open_cases), (4 * count,), generator=self.rng)]
        low, high = self._box(which)
        share = torch.rand(low.shape, generator=self.rng)
        x = self._within(low + share * (high - low), which)
        y = self.net(x)
        which[::2] = self._nearest(y[::2], which[::2], open_cases)
        far = self._far(y, which).amax(1)
        near = far.nan_to_num(torch.inf).argsort()[: (count + 1) // 2]
        corners = torch.arange(len(which) - (count - len(near)), len(which))
        at = share[corners]
        # Half of them corners; in the other half every other coordinate is pushed to its end.
        to_end = (corners % 2 == 0).unsqueeze(1) | (torch.rand(at.shape, generator=self.rng) < 0.5)
        at = torch.where(to_end, at.round(), at)
        ends = torch.where(at == 1, high[corners], low[corners] + at * (high - low)[corners])
        return torch.cat([x[near], self._within(ends, which[corners])]), torch.cat([which[near], which[corners]])

    def _nearest(self, y: Tensor, which: Tensor, open_cases: Tensor) -> Tensor:
        """For each output the open case that is nearest to being met, where all are about one box; else as it was."""
        bounds = self._bounds[open_cases]
        region = self.cases.region[open_cases]
        if bool((region != region[0]).any()) or len(y) * bounds.numel() > _WIDEST:
            return which
        far = ((y @ self._rows.T).unsqueeze(1) - bounds).amax(2)
        return open_cases[far.nan_to_num(torch.inf).argmin(1)]

    @torch.enable_grad()
    def _descend(self, x: Tensor, which: Tensor, clock: Clock, width: Tensor, steps: int = _STEPS) -> Array | None:
        best, best_far, best_slope = x, torch.full((len(x),), torch.inf), torch.zeros_like(x)
        before, idle = x, torch.zeros(len(x), dtype=torch.int64)
        kind = torch.arange(len(x)).unsqueeze(1)
        whole, smooth = kind % 2 == 0, kind // 2 % 2 == 1
        mean, square = torch.zeros_like(x), torch.zeros_like(x)
        step = torch.where(smooth, _GENTLE, _FIRST)
        for t in range(1, steps + 1):
            if clock.left() <= 0:
                return None
            point = x.clone().requires_grad_()
            with Straight():
                far = self._far(self.net(point), which)
            goal = torch.where(whole, far.amax(1, keepdim=True), far.clamp(min=0)).clamp(min=-1e30).sum(1)
            slope = torch.zeros_like(point)
            if goal.requires_grad:  # else all that comes of the input goes through comparisons or casts
                (slope,) = torch.autograd.grad(goal.sum(), point)
            worst = far.detach().amax(1).nan_to_num(torch.inf)
            witness = self._try(x, worst)
            if witness is not None:
                return witness
            better = worst < best_far
            best, best_slope = (torch.where(better.unsqueeze(1), *pair) for pair in ((x, best), (slope, best_slope)))
            best_far = torch.where(better, worst, best_far)
            idle = torch.where(better, 0, idle + 1)
            stuck = (idle >= _PATIENCE).unsqueeze(1)
            step, idle = torch.where(stuck, step / 2, step), torch.where(stuck.squeeze(1), 0, idle)
            x, before, slope = (torch.where(stuck, *pair) for pair in ((best, x), (best, before), (best_slope, slope)))
            slope = slope.nan_to_num(0.0)
            mean, square = mean.lerp(slope, 1 - _MEAN), square.lerp(slope**2, 1 - _SQUARE)
            adam = mean / (1 - _MEAN**t) / ((square / (1 - _SQUARE**t)).sqrt() + 1e-30)
            ahead = self._within(x - step * width * torch.where(smooth, adam, slope.sign()), which)
            x, before = self._within(x + _MOMENTUM * (ahead - x) + (1 - _MOMENTUM) * (x - before), which), x
        self._keep(best, best_far, which)
        return None

    @torch.no_grad()
    def _climb(self, clock: Clock) -> Array | None:
        """The best points have children that differ in all, or in few, of their inputs; the best child takes over."""
        parents, least = self._best, self._far_of
        copies = max(self.particles // len(parents), 2)
        which = self._case_of.repeat_interleave(copies)
        width, inputs = self._width(which), parents.shape[1]
        for _ in range(_TRIALS):
            if clock.left() <= 0:
                return None
            few = torch.rand(len(which), inputs, generator=self.rng) * inputs < torch.randint(
                1, 4, (len(which), 1), generator=self.rng
            )
            few |= (torch.arange(len(which)) % 2 == 0).unsqueeze(1)
            noise = torch.randn(len(which), inputs, generator=self.rng) * self._sizes(len(which)) * width * few
            children = self._within(parents.repeat_interleave(copies, 0) + noise, which)
            far = self._far(self.net(children), which).amax(1).nan_to_num(torch.inf)
            witness = self._try(children, far)
            if witness is not None:
                return witness
            near, place = far.view(-1, copies).min(1)
            chosen = children.view(-1, copies, inputs)[torch.arange(len(parents)), place]
            parents = torch.where((near < least).unsqueeze(1), chosen, parents)
            least = torch.minimum(near, least)
        self._rest = 0 if bool((least < self._far_of).any()) else 4
        self._best, self._far_of = parents, least
        return None

    def _keep(self, x: Tensor, far: Tensor, which: Tensor) -> None:
        """The nearest points, one of each distance: the others are copies."""
        x, far, which = (torch.cat(pair) for pair in ((self._best, x), (self._far_of, far), (self._case_of, which)))
        order = far.argsort(stable=True)
        first = torch.ones(len(order), dtype=torch.bool)
        first[1:] = far[order].diff() > 0
        order = order[first][:_KEPT]
        self._best, self._far_of, self._case_of = x[order], far[order], which[order]

    def _sizes(self, count: int) -> Tensor:
        """[P, 1]: from a part in 10^_FINEST up to one, every decade alike."""
        return 10 ** (-_FINEST * torch.rand(count, 1, generator=self.rng))

    def _width(self, which: Tensor) -> Tensor:
        low, high = self._box(which)
        return high - low

    def _try(self, x: Tensor, worst: Tensor) -> Array | None:
        """The first of the most promising points that onnxruntime confirms."""
        for i in worst.argsort()[:_TRIES].tolist():
            if worst[i] > 0:
                return None
            point: Array = np.ascontiguousarray(x[i].numpy())
            if self.check(point):
                return point
            self.refused += 1
        return None

    def _far(self, y: Tensor, which: Tensor) -> Tensor:
        """[P, U]: how far each row is from being met, -inf for rows that the case does not ask for."""
        return y @ self._rows.T - self._bounds[which]

    def _box(self, which: Tensor) -> tuple[Tensor, Tensor]:
        region = self.cases.region[which]
        return self.cases.inner_low[region], self.cases.inner_high[region]

    def _within(self, x: Tensor, which: Tensor) -> Tensor:
        return x.clamp(*self._box(which))
