"""One climb of Auto-PGD for linf and l2: momentum, and a step that each example halves by its own progress."""

from dataclasses import dataclass, fields
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from stages.attacks._losses import gradient, targeted_dlr
from stages.oracle import Logits, narrow
from stages.threat import Threat

_MOMENTUM = 0.75
_RISES = 0.75
_FIRST, _SHRINK, _SHORTEST = 0.22, 0.03, 0.06


@dataclass(frozen=True, slots=True)
class Hill:
    """What is climbed from the images x [B, ...]: the named loss, or targeted DLR towards `target` int64 [B]."""

    logits: Logits
    x: Tensor
    y: Tensor
    loss: Literal["ce", "dlr"]
    target: Tensor | None = None

    def __getitem__(self, rows: Tensor) -> "Hill":
        target = None if self.target is None else self.target[rows]
        return Hill(narrow(self.logits, rows), self.x[rows], self.y[rows], self.loss, target)

    def look(self, point: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Which answers at `point` are right, bool [B], the loss [B] and its gradient."""
        goal = self.loss if self.target is None else partial(targeted_dlr, target=self.target)
        z, loss, slope = gradient(self.logits, point, self.y, goal)
        return z.argmax(1) == self.y, loss, slope


def climb(hill: Hill, start: Tensor, threat: Threat, steps: int) -> tuple[Tensor, Tensor]:
    """One start: the wrong or else the best point of each example [B, ...], and which are still right, bool [B]."""
    result, right = start.clone(), torch.ones(len(start), dtype=torch.bool, device=start.device)
    still, loss, slope = hill.look(start)
    path = Path.begin(hill, Ball.around(hill.x, threat), start, loss, slope)
    path = _settle(path, still, result, right)
    window, since = max(int(_FIRST * steps), 1), 0
    for step in range(steps):
        if len(path.rows) == 0:
            break
        _advance(path, first=step == 0)
        still, loss, slope = path.hill.look(path.point)
        path.record(loss, slope)
        path = _settle(path, still, result, right)
        since += 1
        if since == window:
            path.check(window)
            window = max(window - max(int(_SHRINK * steps), 1), int(_SHORTEST * steps), 1)
            since = 0
    result[path.rows] = path.best
    return result, right


@dataclass(frozen=True, slots=True)
class Ball:
    """The threat around x; for linf as two corners, so that projecting is a single pass over the pixels."""

    x: Tensor
    threat: Threat
    low: Tensor
    high: Tensor

    @staticmethod
    def around(x: Tensor, threat: Threat) -> "Ball":
        return Ball(x, threat, *(threat.project(x + by, x) for by in (-threat.eps, threat.eps)))

    def __getitem__(self, rows: Tensor) -> "Ball":
        return Ball(self.x[rows], self.threat, self.low[rows], self.high[rows])

    def project_(self, point: Tensor) -> Tensor:
        """`threat.project`; `point` is spent."""
        if self.threat.norm == "linf":
            return point.clamp_(self.low, self.high)
        return self.threat.project(point, self.x)

    def steepest(self, slope: Tensor) -> Tensor:
        """The unit vector of this norm that climbs most."""
        if self.threat.norm == "linf":
            return slope.sign()
        # `ascend` from the origin of coordinates with length one, since steps differ by example.
        return self.threat.ascend(torch.zeros_like(slope), slope, 1.0)


@dataclass
class Path:
    """Where the examples that are still right stand; every field has one entry per such example."""

    hill: Hill
    ball: Ball
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
    def begin(hill: Hill, ball: Ball, start: Tensor, loss: Tensor, slope: Tensor) -> "Path":
        rows = torch.arange(len(start), device=start.device)
        step = torch.full((len(rows),), 2 * ball.threat.eps, dtype=start.dtype, device=start.device)
        # `halved` starts as True: at the first checkpoint there is no earlier best loss to have stood still from.
        halved = torch.ones_like(rows, dtype=torch.bool)
        rises = torch.zeros_like(rows)
        # `record` writes into the best points, so they are copies.
        best, best_slope = start.clone(), slope.clone()
        return Path(hill, ball, rows, start, start, slope, step, loss, rises, best, loss, best_slope, loss, halved)

    def keep(self, mask: Tensor) -> "Path":
        rows = mask.nonzero().flatten()
        return Path(*(getattr(self, field.name)[rows] for field in fields(self)))

    def record(self, loss: Tensor, slope: Tensor) -> None:
        """Take in the loss and its gradient at `point`."""
        self.rises = self.rises + (loss > self.loss)
        self.loss, self.slope = loss, slope
        better = loss > self.best_loss
        at = better.nonzero().flatten()
        self.best.index_copy_(0, at, self.point[at])
        self.best_slope.index_copy_(0, at, slope[at])
        self.best_loss = torch.where(better, loss, self.best_loss)

    def check(self, window: int) -> None:
        """Halve the step and go back to the best point where the last `window` steps made too little headway."""
        stuck = ~self.halved & (self.checked_loss >= self.best_loss)
        halve = (self.rises <= _RISES * window) | stuck
        wide = halve.view(column(self.point))
        self.step = torch.where(halve, self.step / 2, self.step)
        self.point = torch.where(wide, self.best, self.point)
        self.slope = torch.where(wide, self.best_slope, self.slope)
        self.halved, self.checked_loss = halve, self.best_loss
        self.rises = torch.zeros_like(self.rises)


def _advance(path: Path, first: bool) -> None:
    """One step with momentum."""
    now = path.point
    ahead = path.ball.project_(torch.addcmul(now, path.step.view(column(now)), path.ball.steepest(path.slope)))
    if not first:
        # The mixture of the docstring of APGD, gathered by points.
        mixed = ahead.mul_(_MOMENTUM).add_(now, alpha=2 - 2 * _MOMENTUM).sub_(path.before, alpha=1 - _MOMENTUM)
        ahead = path.ball.project_(mixed)
    path.before, path.point = now, ahead


def _settle(path: Path, still: Tensor, result: Tensor, right: Tensor) -> Path:
    """Write down the examples that went wrong, and go on with the others."""
    if bool(still.all()):
        return path
    gone = path.rows[~still]
    result[gone], right[gone] = path.point[~still], False
    return path.keep(still)


def column(x: Tensor) -> tuple[int, ...]:
    return (-1,) + (1,) * (x.dim() - 1)
