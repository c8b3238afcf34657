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
    scale = largest + (largest == 0)
    side, away = w.sign(), gap.sign().unsqueeze(-1)
    size, need = (w * side).div_(scale), gap.abs().unsqueeze(-1) / scale * (largest > 0)
    middle, half = (low + high) / 2, (high - low) / 2
    room = (points - middle).mul_(side).mul_(away).add_(half)
    if norm == "linf":
        moved = torch.minimum(_level(size, size * room, room, need), room)
    elif norm == "l2":
        limit = room / size.clamp(min=torch.finfo(size.dtype).tiny)
        moved = torch.minimum(_level(size.square(), size * room, limit, need) * size, room)
    else:
        moved = _fill(size, room, need)
    return moved.mul_(side).mul_(-away)


def _level(slope: Tensor, held: Tensor, limit: Tensor, need: Tensor) -> Tensor:
    """The t with sum_i min(slope_i t, held_i) = need, or one beyond all limits where the sum stays below; [..., 1].

    `limit` = held / slope. The sum is concave and piecewise linear in t, so Newton from the left never overshoots, and
    ends exactly: each step but the last passes a limit. That is a handful of passes over the data, without sorting.
    """
    whole = held.sum(-1, keepdim=True)
    level = need / slope.sum(-1, keepdim=True).clamp(min=torch.finfo(slope.dtype).tiny)
    while True:
        # 1 where the limit lies ahead, else 0; comparing and selecting would be several times slower.
        free = (limit - level).clamp_(min=0).sign_()
        rate = torch.linalg.vecdot(slope, free).unsqueeze(-1)
        at_limit = whole - torch.linalg.vecdot(held, free).unsqueeze(-1)
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
    moved = (left / ordered.clamp(min=torch.finfo(ordered.dtype).tiny)).clamp_(min=0)
    return torch.zeros_like(room).scatter_(-1, order, torch.minimum(moved, limit))
