"""One climb of Auto-PGD for l1: sparse steps whose number of coordinates follows the best point's."""

import math

import torch
from torch import Tensor

from stages.attacks import _l1
from stages.attacks._ascent import Hill, column
from stages.threat import Threat

_CHECK = 0.04
_SPREAD = 1.5
_SPARSER = 0.95
_SHORTER, _SHORTEST = 1.5, 10.0
_OUTER = 0.3


def climb(hill: Hill, start: Tensor, threat: Threat, steps: int) -> tuple[Tensor, Tensor]:
    """As `_ascent.climb`, in balls of 3 eps, 2 eps and eps in turn; only in the last may an example leave.

    x_{t+1} = project(x_t + eta_t * s / ||s||_1),   s = sign of the k_t largest slopes in absolute value, else 0
    """
    point, right = start, torch.ones(len(start), dtype=torch.bool, device=start.device)
    for times, count in _phases(steps):
        ball = threat.model_copy(update={"eps": times * threat.eps})
        point, right = _phase(hill, _l1.project(point, hill.x, ball), ball, count, leave=times == 1)
    return point, right


def _phases(steps: int) -> list[tuple[int, int]]:
    """(multiple of eps, steps): 30 %, 30 % and the rest; too few steps are all spent at eps."""
    outer = math.ceil(_OUTER * steps)
    return [(3, outer), (2, outer), (1, steps - 2 * outer)] if steps > 2 * outer else [(1, steps)]


def _phase(hill: Hill, start: Tensor, ball: Threat, steps: int, leave: bool) -> tuple[Tensor, Tensor]:
    result, right = start.clone(), torch.ones(len(start), dtype=torch.bool, device=start.device)
    rows, point = torch.arange(len(start), device=start.device), start
    still, loss, slope = hill.look(point)
    best, best_loss, best_slope = point, loss, slope
    size = start[0].numel()
    used = _used(start, hill.x)
    many = used / _SPREAD
    length = torch.full((len(start),), ball.eps, dtype=start.dtype, device=start.device)
    window = max(int(_CHECK * steps), 1)
    for step in range(steps + 1):
        if leave and not bool(still.all()):
            result[rows[~still]], right[rows[~still]] = point[~still], False
            stay = still.nonzero().flatten()
            hill, rows, used, many, length = hill[stay], rows[stay], used[stay], many[stay], length[stay]
            point, slope = point[stay], slope[stay]
            best, best_loss, best_slope = best[stay], best_loss[stay], best_slope[stay]
        if step == steps or len(rows) == 0:
            break
        if step and step % window == 0:
            now = _used(best, hill.x)
            sparser = now / used.clamp(min=1) < _SPARSER
            used, many = now, now / _SPREAD
            length = torch.where(sparser, ball.eps, (length / _SHORTER).clamp(min=ball.eps / _SHORTEST))
            point = torch.where(sparser.view(column(point)), best, point)
            slope = torch.where(sparser.view(column(point)), best_slope, slope)
        point = _l1.project(point + length.view(column(point)) * _direction(slope, many, size), hill.x, ball)
        still, loss, slope = hill.look(point)
        better = loss > best_loss
        wide = better.view(column(point))
        best, best_slope = torch.where(wide, point, best), torch.where(wide, slope, best_slope)
        best_loss = torch.where(better, loss, best_loss)
    result[rows] = best
    return result, right


def _used(point: Tensor, x: Tensor) -> Tensor:
    """How many coordinates differ from the image's, [B] float."""
    return (point != x).flatten(1).sum(1).to(x.dtype)


def _direction(slope: Tensor, many: Tensor, size: int) -> Tensor:
    """The signs of the `many` [B] largest slopes of each example (at least one; ties all), of l1 norm 1 together.

    `many` is rounded down; the code released with the paper rounds up and so never moves one coordinate alone.
    """
    flat = slope.flatten(1)
    count = many.long().clamp(1, size)
    ordered = flat.abs().sort(dim=1, descending=True).values
    signs = flat.sign() * (flat.abs() >= ordered.gather(1, (count - 1).unsqueeze(1)))
    unit: Tensor = signs / signs.abs().sum(1, keepdim=True).clamp(min=1)
    return unit.view_as(slope)
