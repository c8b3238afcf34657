"""The nearest point of a hyperplane that lies in the data range, exactly, in three norms."""

import torch
from torch import Tensor

from stages.attacks.base import Norm


def step_onto(points: Tensor, w: Tensor, gap: Tensor, norm: Norm, low: float, high: float) -> Tensor:
    """The shortest d with gap + w . d = 0 and low <= point + d <= high, for points [..., D], w [..., D], gap [...].

    Every coordinate that moves, moves towards the plane, by m_i >= 0 up to its room r_i in the range, so that the
    problem is: minimise ||m|| subject to sum |w_i| m_i = |gap|, m_i <= r_i. Its solutions (Lagrange):

        linf: m_i = min(t, r_i)         l2: m_i = min(t |w_i|, r_i)         l1: fill the largest |w_i| first

    Where the range holds no point of the plane, d leads to its corner nearest to the plane. A coordinate without
    weight stays. `w` may be one for several leading dimensions of `points` (broadcast).

    Source: Croce and Hein 2020, section 2.2 (they sort for all three; linf and l2 need no sorting, see `_level`).
    """
    largest = w.abs().amax(-1, keepdim=True)
    flat = largest == 0
    size = w.abs() / torch.where(flat, 1.0, largest)
    need = torch.where(flat, 0.0, gap.unsqueeze(-1).abs() / torch.where(flat, 1.0, largest))
    heading = -gap.unsqueeze(-1).sign() * w.sign()
    room = torch.where(heading > 0, high - points, points - low)
    if norm == "linf":
        moved = torch.minimum(_level(size, torch.where(size > 0, room, 0.0), need), room)
    elif norm == "l2":
        limit = torch.where(size > 0, room / size, 0.0)
        moved = torch.minimum(_level(size.square(), limit, need) * size, room)
    else:
        moved = _fill(size, room, need)
    return heading * moved


def _level(slope: Tensor, limit: Tensor, need: Tensor) -> Tensor:
    """The t with sum_i slope_i min(t, limit_i) = need, or one beyond all limits where the sum stays below; [..., 1].

    The sum is concave and piecewise linear in t, so Newton from the left never overshoots, and ends exactly: each
    step but the last passes a limit. A handful of passes over the data, where sorting takes a dozen.
    """
    held = slope * limit
    whole = held.sum(-1, keepdim=True)
    level = need / slope.sum(-1, keepdim=True).clamp(min=torch.finfo(slope.dtype).tiny)
    while True:
        free = (limit > level).to(slope.dtype)
        rate = (slope * free).sum(-1, keepdim=True)
        at_limit = whole - (held * free).sum(-1, keepdim=True)
        ahead = torch.where(rate > 0, (need - at_limit) / rate, level)
        if not bool((ahead > level).any()):
            return level
        level = torch.maximum(level, ahead)


def _fill(size: Tensor, room: Tensor, need: Tensor) -> Tensor:
    """The m of least sum with sum_i size_i m_i = need and m_i <= room_i, [..., D]: the fractional knapsack."""
    ordered, order = size.sort(dim=-1, descending=True, stable=True)
    ordered, order = ordered.expand_as(room), order.expand_as(room)
    limit = room.gather(-1, order)
    worth = ordered * limit
    left = need - (worth.cumsum(-1) - worth)
    moved = torch.where(ordered > 0, left / ordered, 0.0).clamp(min=0)
    return torch.zeros_like(room).scatter_(-1, order, torch.minimum(moved, limit))
