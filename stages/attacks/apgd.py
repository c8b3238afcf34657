"""Projected gradient ascent whose step size is set by its own progress (Auto-PGD)."""

from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Generator, Tensor

from stages.attacks._losses import gradient
from stages.attacks.base import Attack, Norm
from stages.oracle import Logits, narrow
from stages.threat import Threat

_MOMENTUM = 0.75
_RISES = 0.75
_FIRST, _SHRINK, _SHORTEST = 0.22, 0.03, 0.06
_TINY = 1e-12


class APGD(Attack):
    """Ascent with momentum from a step of 2 eps, halved for each example at checkpoints where it makes no headway.

        z_{t+1} = project(x_t + eta_t * steepest direction of loss(x_t))
        x_{t+1} = project(x_t + 0.75 (z_{t+1} - x_t) + 0.25 (x_t - x_{t-1}))        (x_1 = z_1)

    Checkpoints come after 0.22, then ever shorter shares of the steps (0.03 less each time, down to 0.06). There the
    step is halved and the search restarts from the best point so far, where either fewer than three quarters of the
    steps since the last checkpoint raised the loss, or at the last checkpoint the step was kept and the best loss has
    not risen since. The first point is drawn from the cube (linf) or the sphere (l2) and scaled onto the surface of the
    ball; `loss` is cross-entropy or the scale-free `dlr` (with fewer than four classes that is the margin).

    Source: Croce and Hein 2020, algorithm 1, section 3; constants, and the start on the surface, after their released
    code, from memory. Departures: an example leaves at its first wrong answer, which changes no other example's path;
    the first checkpoint compares the first step with the loss at the start, as the paper does (the code compares it
    with zero). The l1 version of Croce and Hein 2021 is not here: `InputError`.
    """

    steps: int = Field(default=100, ge=1)
    restarts: int = Field(default=1, ge=1)
    loss: Literal["ce", "dlr"] = "ce"

    @property
    def norms(self) -> frozenset[Norm]:
        return frozenset(("linf", "l2"))

    def perturb(self, logits: Logits, x: Tensor, y: Tensor, threat: Threat, rng: Generator) -> Tensor:
        result = x.clone()
        alive = torch.arange(len(x), device=x.device)
        for _ in range(self.restarts):
            start = _surface(x, threat, rng)[alive]
            point, right = self._climb(narrow(logits, alive), x[alive], y[alive], threat, start)
            result[alive] = point
            alive = alive[right]
            if len(alive) == 0:
                break
        return result

    def _climb(self, logits: Logits, x: Tensor, y: Tensor, threat: Threat, start: Tensor) -> tuple[Tensor, Tensor]:
        """One start: the wrong or else the best point of each example [B, ...], and which are still right, bool [B]."""
        result, right = start.clone(), torch.ones(len(x), dtype=torch.bool, device=x.device)
        z, loss, slope = gradient(logits, start, y, self.loss)
        path = _Path.begin(torch.arange(len(x), device=x.device), start, loss, slope, 2 * threat.eps)
        path = _settle(path, z.argmax(1) == y, result, right)
        window, since = max(int(_FIRST * self.steps), 1), 0
        for step in range(self.steps):
            if len(path.rows) == 0:
                break
            _advance(path, x, threat, first=step == 0)
            z, loss, slope = gradient(narrow(logits, path.rows), path.point, y[path.rows], self.loss)
            path.record(loss, slope)
            path = _settle(path, z.argmax(1) == y[path.rows], result, right)
            since += 1
            if since == window:
                path.check(window)
                window = max(window - max(int(_SHRINK * self.steps), 1), int(_SHORTEST * self.steps), 1)
                since = 0
        result[path.rows] = path.best
        return result, right


@dataclass
class _Path:
    """Where the examples that are still right stand; every field but `rows` has one entry per such example."""

    rows: Tensor
    point: Tensor
    before: Tensor
    slope: Tensor
    step: Tensor
    loss: Tensor
    rises: Tensor
    best: Tensor
    best_loss: Tensor
    best_slope: Tensor
    checked_loss: Tensor
    halved: Tensor

    @staticmethod
    def begin(rows: Tensor, start: Tensor, loss: Tensor, slope: Tensor, length: float) -> "_Path":
        step = torch.full((len(rows),), length, dtype=start.dtype, device=start.device)
        # `halved` starts as True: at the first checkpoint there is no earlier best loss to have stood still from.
        halved = torch.ones_like(rows, dtype=torch.bool)
        return _Path(rows, start, start, slope, step, loss, torch.zeros_like(rows), start, loss, slope, loss, halved)

    def keep(self, mask: Tensor) -> "_Path":
        return _Path(**{name: value[mask] for name, value in vars(self).items()})

    def record(self, loss: Tensor, slope: Tensor) -> None:
        """Take in the loss and its gradient at `point`."""
        self.rises = self.rises + (loss > self.loss)
        self.loss, self.slope = loss, slope
        better = loss > self.best_loss
        wide = better.view(_column(self.point))
        self.best = torch.where(wide, self.point, self.best)
        self.best_slope = torch.where(wide, slope, self.best_slope)
        self.best_loss = torch.where(better, loss, self.best_loss)

    def check(self, window: int) -> None:
        """Halve the step and go back to the best point where the last `window` steps made too little headway."""
        stuck = ~self.halved & (self.checked_loss >= self.best_loss)
        halve = (self.rises <= _RISES * window) | stuck
        wide = halve.view(_column(self.point))
        self.step = torch.where(halve, self.step / 2, self.step)
        self.point = torch.where(wide, self.best, self.point)
        self.slope = torch.where(wide, self.best_slope, self.slope)
        self.halved, self.checked_loss = halve, self.best_loss
        self.rises = torch.zeros_like(self.rises)


def _advance(path: _Path, x: Tensor, threat: Threat, first: bool) -> None:
    """One step with momentum, in place."""
    origin, now = x[path.rows], path.point
    step = path.step.view(_column(now))
    # The steepest direction is `ascend` from the origin of coordinates with length one; steps differ by example.
    ahead = threat.project(now + step * threat.ascend(torch.zeros_like(now), path.slope, 1.0), origin)
    if not first:
        mixed = now + _MOMENTUM * (ahead - now) + (1 - _MOMENTUM) * (now - path.before)
        ahead = threat.project(mixed, origin)
    path.before, path.point = now, ahead


def _settle(path: _Path, still: Tensor, result: Tensor, right: Tensor) -> _Path:
    """Write down the examples that went wrong, and go on with the others."""
    gone = path.rows[~still]
    result[gone], right[gone] = path.point[~still], False
    return path.keep(still)


def _surface(x: Tensor, threat: Threat, rng: Generator) -> Tensor:
    """A random point on the surface of the ball, cut with the range."""
    if threat.norm == "linf":
        noise = torch.rand(x.shape, generator=rng, device=x.device, dtype=x.dtype) * 2 - 1
        size = noise.flatten(1).abs().amax(1)
    else:
        noise = torch.randn(x.shape, generator=rng, device=x.device, dtype=x.dtype)
        size = torch.linalg.vector_norm(noise.flatten(1), dim=1)
    return threat.project(x + threat.eps * noise / size.clamp(min=_TINY).view(_column(x)), x)


def _column(x: Tensor) -> tuple[int, ...]:
    return (-1,) + (1,) * (x.dim() - 1)
