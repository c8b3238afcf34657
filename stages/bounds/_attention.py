"""Softmax over a box: intervals, linear bounds, and what a mask of -inf means.

With d_j = x_j - x_i, an entry is p_i = 1 / z, z = sum_j exp(d_j): it is least where x_i is lowest and all others are
highest, and the reverse. Lines, one for every entry and side:
  below  z <= sum_j chord of exp over the range of d_j, and 1 / z >= 2 / z0 - z / z0^2, z0 their sum at the centre;
  above  z >= sum_j tangent of exp at the centre, and 1 / z <= p_l + p_u - p_l p_u z on [1 / p_u, 1 / p_l];
or the interval's end where that is better at the centre of the box, or where exp overflows.

A mask is a constant -inf (or the lowest number there is) added to a score or put in its place. It is bounded as
`MASKED`, so large a number that its entry is 0 in float32 and float64 alike, and so small that sums stay finite. That
holds where a softmax alone sees it (`_trace`), beside sums of what is far smaller (`check_mask`); elsewhere -1e35 is a
number like any other.
A row that is masked all through has no softmax, only a NaN; `_safe_softmax`, which fused attention calls, gives zeros.

Source: Wei et al., "Convex Bounds on the Softmax Function", 2023, section 4 (the reciprocal-exponential bounds, from
memory), with chord and tangent in place of their choice of points.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stages.bounds._interval import DOUBLE, TINY, Interval, Rounding, gamma
from stages.bounds._norms import narrowed
from stages.bounds._trace import MASKED, Op, fill
from stages.method import InputError

if TYPE_CHECKING:
    from stages.bounds._backward import Chain, Pull

_GONE = -200.0  # exp of less is no number in float32, and under 1e-86 in any arithmetic
_ROUND = 64 * DOUBLE
_Curve = Callable[[Tensor], Tensor]


def softmax(op: Op, args: tuple[Any, ...], kwargs: dict[str, Any], rounding: Rounding) -> Interval:
    """Raises `InputError` where a whole row may be masked."""
    del kwargs
    x, dim = args[0], args[1]
    n = x.low.shape[dim]
    low, high = _range(op, x.low.double(), x.high.double(), dim)
    gone = x.high.double() - x.low.double().amax(dim, keepdim=True) < _GONE
    margin = torch.where(gone, TINY, rounding.share(12) * (1 + n))
    found = narrowed(low, high, margin, x.low.dtype)
    return Interval(found.low.clamp(min=0), found.high.clamp(max=1 + rounding.share(12) * (1 + n)))


def check_mask(op: Op, *operands: Interval) -> None:
    """Raises `InputError` where what is added to a mask might bring it back; that none stays in sight is `_trace`'s."""
    if any(bool((x.low <= MASKED / 2).any()) for x in operands):
        largest = max(float(x.high.detach().max()) for x in operands)
        if not largest < -MASKED / 100:
            raise InputError(
                f'bounds: a mask in module "{op.module}" is added to scores that may reach {largest:g}, so it is none '
                "any more; scale the scores down, or put -inf in their place with torch.where after all sums"
            )


def _range(op: Op, low: Tensor, high: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """The least and the largest value of every entry, to a few units of float64."""
    empty = _empty(high, dim)
    if op.kind == "_softmax" and bool(empty.any()):
        raise InputError(
            f'bounds: every entry of a row of the softmax in module "{op.module}" may be masked, which makes it NaN; '
            "leave every query something to look at, or use scaled_dot_product_attention, which gives zeros there"
        )
    few = gamma(8 * low.shape[dim] + 64, DOUBLE)
    top = high.amax(dim, keepdim=True)
    lows, highs = (low - top).exp(), (high - top).exp()
    lost = few * highs.sum(dim, keepdim=True)
    others_high = (highs.sum(dim, keepdim=True) - highs).clamp(min=0) + lost
    others_low = (lows.sum(dim, keepdim=True) - lows - lost).clamp(min=0)
    least, most = lows / (lows + others_high) * (1 - few), (highs / (highs + others_low) * (1 + few)).clamp(max=1)
    # Nothing is known of a row that is masked all through: zeros in one kernel, equal shares in another.
    return torch.where(empty, 0.0, least), torch.where(empty | most.isnan(), 1.0, most)


def front(chain: "Chain", op: Op) -> "Pull":
    """Coefficients through the lines: a row of a softmax of n entries reads n slopes for each of them."""
    args = fill(op.args, chain.values)
    x, dim = args[0], args[1]
    name, result, kind = op.args[0].name, chain.values[op.result], chain.kind
    low, high = x.low.double().movedim(dim, -1), x.high.double().movedim(dim, -1)
    n = low.shape[-1]
    box = _range(op, low, high, -1)
    middle, radius = (low + high) / 2, (high - low) / 2 * (1 + 4 * DOUBLE)
    fans = 4 * chain.own * chain.readers(op.result) * result.size().double().movedim(dim, -1)
    spread = chain.rounding.share(12) * (1 + n) + fans
    sums = gamma(4 * n + 64, chain.own) + chain.dots
    size = chain.reach(name).movedim(dim, -1)
    ends, slopes = [], []
    empty = _empty(high)
    for sign, found, end in ((-1.0, _below(low, high, middle), box[0]), (1.0, _above(middle, box), box[1])):
        fine = torch.isfinite(found[0]) & torch.isfinite(found[1]).all(-1) & ~empty
        centre, exact = torch.where(fine, found[0], end), torch.where(fine.unsqueeze(-1), found[1], 0.0)
        slope = exact.to(kind)
        near = slope.double()
        moved = ((near - exact).abs() * radius.unsqueeze(-2)).sum(-1)
        lost = (4 * sums + _ROUND * n) * (near.abs() * size.unsqueeze(-2)).sum(-1) + _ROUND * n * (1 + centre.abs())
        start = centre - (near * middle.unsqueeze(-2)).sum(-1)
        ends.append((start + sign * (spread + 1.001 * moved + lost)).movedim(-1, dim))
        slopes.append(slope)
    floor, gap = chain.ends_of_lines(ends[0], ends[1], torch.zeros_like(ends[0]))
    below, above = slopes
    at = dim + 1 if dim >= 0 else dim

    def pull(chain: "Chain", rows: Tensor, lower: Tensor | None) -> tuple[dict[str, Tensor], Tensor]:
        del lower
        here = rows.movedim(at, -1).unsqueeze(-2)
        part = (here.clamp(min=0) @ below + here.clamp(max=0) @ above).squeeze(-2).movedim(-1, at)
        bias = chain.dot(op.result, rows, floor) + chain.dot(op.result, rows.clamp(max=0), gap)
        return {name: part}, bias + chain.start(name, part)

    return pull


def _below(low: Tensor, high: Tensor, middle: Tensor) -> tuple[Tensor, Tensor]:
    """Values at the centre and slopes [..., i, j] of lines below p_i."""
    least, most = low.unsqueeze(-2) - high.unsqueeze(-1), high.unsqueeze(-2) - low.unsqueeze(-1)
    wide = most - least
    left, right = least.exp(), most.exp()
    moves = wide > 1e-9
    chord = torch.where(moves, (right - left) / wide.clamp(min=1e-9), 0.0)
    heights = torch.where(moves, left, right) + chord * (middle.unsqueeze(-2) - middle.unsqueeze(-1) - least)
    return _lines(heights, chord, lambda z: z**-2, lambda z: 1 / z)


def _above(middle: Tensor, box: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Values at the centre and slopes [..., i, j] of lines above p_i."""
    heights = (middle.unsqueeze(-2) - middle.unsqueeze(-1)).exp()
    least, most = box
    return _lines(heights, heights, lambda z: least * most + 0 * z, lambda z: least + most - least * most * z)


def _lines(heights: Tensor, steps: Tensor, weight: _Curve, value: _Curve) -> tuple[Tensor, Tensor]:
    """value(z) - weight(z) (z(x) - z) for z(x) of `heights` at the centre and slopes `steps` in d_j; d_i is 0."""
    n = heights.shape[-1]
    eye = torch.eye(n, dtype=torch.bool, device=heights.device)
    z = torch.where(eye, 1.0, heights).sum(-1)
    steps = torch.where(eye, 0.0, steps)
    slopes = -weight(z).unsqueeze(-1) * (steps - torch.diag_embed(steps.sum(-1)))
    return value(z), slopes


def _empty(high: Tensor, dim: int = -1) -> Tensor:
    return high.amax(dim, keepdim=True) < MASKED / 10
