"""The search for a witness: gradient descent on how far the outputs are from meeting some case, from many starts."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Generator, Tensor, nn

from stages.verification.cases import Array, Cases
from stages.verification.clock import Clock

Check = Callable[[Array], bool]
_STEPS = 60
_MOMENTUM = 0.75
_FIRST = 0.25
_PATIENCE = 5
_MOST = 1 << 12
_LOOK = 0.15
_TRIES = 4


@dataclass(slots=True)
class Hunt:
    """Rounds of descent on the cases that are still open, until `check` says that a point is a witness.

    One particle per start, each with a case (A, b) of its own. It descends

        g(x) = max_u (A_u f(x) - b_u)

    or, every other particle, the sum of the positive entries, by steps of sign(gradient) in units of the box's width
    with momentum, as APGD does (Croce and Hein 2020); the step is halved and the best point taken up again whenever
    `_PATIENCE` steps brought nothing. Departures: no schedule of check points, for a round is short and is repeated
    from new starts. Starts are, in turn, the best of a random sample of the box, corners, and points on random faces.
    """

    net: nn.Module
    cases: Cases
    check: Check
    rng: Generator
    particles: int = 64
    refused: int = 0
    _rows: Tensor = field(init=False)
    _bounds: Tensor = field(init=False)

    def __post_init__(self) -> None:
        size = self.cases.rows.abs().amax(1).clamp(min=1)
        self._rows = (self.cases.rows / size.unsqueeze(1)).float()
        self._bounds = (self.cases.bounds / size).float()

    def round(self, open_cases: Tensor, clock: Clock) -> Array | None:
        """A witness float32 [n], or None where this round found none; `open_cases` int64 names the cases to try."""
        if len(open_cases) == 0:
            return None
        count = self.particles
        x, which = self._starts(open_cases, count)
        spent = clock.spent()
        found = self._descend(x, which, clock)
        spent = clock.spent() - spent
        if spent < _LOOK * max(clock.left(), 0) / 4 and spent < 1:
            self.particles = min(2 * count, _MOST)
        elif spent > 2 and count > 8:
            self.particles = count // 2
        return found

    def around(self, low: Tensor, high: Tensor, which: Tensor, clock: Clock) -> Array | None:
        """A witness in sub-boxes float32 [P, n], each for its case int64 [P], from one random point in each."""
        x = low + torch.rand(low.shape, generator=self.rng) * (high - low)
        return self._descend(self._within(x, which), which, clock, steps=_STEPS // 4)

    def _starts(self, open_cases: Tensor, count: int) -> tuple[Tensor, Tensor]:
        which = open_cases[torch.randint(len(open_cases), (4 * count,), generator=self.rng)]
        low, high = self._box(which)
        share = torch.rand(low.shape, generator=self.rng)
        x = self._within(low + share * (high - low), which)
        with torch.no_grad():
            far = self._far(self.net(x), which).amax(1)
        near = far.nan_to_num(torch.inf).argsort()[: count // 2]
        corners = torch.arange(len(which) - (count - len(near)), len(which))
        at = share[corners]
        # Half of them corners; in the other half every other coordinate is pushed to its end.
        to_end = (corners % 2 == 0).unsqueeze(1) | (torch.rand(at.shape, generator=self.rng) < 0.5)
        at = torch.where(to_end, at.round(), at)
        ends = torch.where(at == 1, high[corners], low[corners] + at * (high - low)[corners])
        return torch.cat([x[near], self._within(ends, which[corners])]), torch.cat([which[near], which[corners]])

    @torch.enable_grad()
    def _descend(self, x: Tensor, which: Tensor, clock: Clock, steps: int = _STEPS) -> Array | None:
        low, high = self._box(which)
        width = high - low
        best, best_far, best_slope = x, torch.full((len(x),), torch.inf), torch.zeros_like(x)
        before, step, idle = x, torch.full((len(x), 1), _FIRST), torch.zeros(len(x), dtype=torch.int64)
        whole = (torch.arange(len(x)) % 2 == 0).unsqueeze(1)
        for _ in range(steps):
            if clock.left() <= 0:
                return None
            point = x.clone().requires_grad_()
            far = self._far(self.net(point), which)
            goal = torch.where(whole, far.amax(1, keepdim=True), far.clamp(min=0)).clamp(min=-1e30).sum(1)
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
            ahead = self._within(x - step * width * slope.sign().nan_to_num(0.0), which)
            x, before = self._within(x + _MOMENTUM * (ahead - x) + (1 - _MOMENTUM) * (x - before), which), x
        return None

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
