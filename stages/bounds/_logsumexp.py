"""log sum_j exp x_j over a box: intervals and linear bounds; with it log_softmax is x less a sum.

It rises with every entry, so its interval is exact. It is convex, so below it lies its tangent at the centre; above,
with s(x) the sum of the chords of exp over the range of each x_j and s0 its value at the centre,

    log sum_j exp x_j <= log s(x) <= log s0 + (s(x) - s0) / s0,

or, where that is less there, x_i + log (1 + sum_{j != i} exp(u_j - l_i)) for the i with the largest midpoint.

Rows of leads, z_i - z_k, have coefficients that add up to 0, and so lose nothing to a log_softmax.
Source: none that we follow; the parts are standard.
"""

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stages.bounds._interval import DOUBLE, Interval, Rounding, gamma
from stages.bounds._norms import narrowed
from stages.bounds._trace import Op, fill

if TYPE_CHECKING:
    from stages.bounds._backward import Chain, Pull

_ROUND = 64 * DOUBLE


def interval(op: Op, args: tuple[Any, ...], kwargs: dict[str, Any], rounding: Rounding) -> Interval:
    """Sums of n exponentials and their logarithm, each right within 14 units: off by as many units of 1 + |x|."""
    x = args[0]
    low, high = (op.target(end.double(), *args[1:], **kwargs) for end in (x.low, x.high))
    margin = _loss(x, args[1], rounding)
    return narrowed(low, high, margin.reshape(low.shape), x.low.dtype)


def front(chain: "Chain", op: Op) -> "Pull":
    """Coefficients through the lines."""
    args = fill(op.args, chain.values)
    x, dims = args[0], args[1]
    name, result, kind = op.args[0].name, chain.values[op.result], chain.kind
    low, high = x.low.double(), x.high.double()
    middle, radius = (low + high) / 2, (high - low) / 2 * (1 + 4 * DOUBLE)
    top = high.amax(dims, keepdim=True)
    left, right = (low - top).exp(), (high - top).exp()
    moves = high - low > 1e-9
    chord = torch.where(moves, (right - left) / (high - low).clamp(min=1e-9), 0.0)
    heights = torch.where(moves, left + chord * (middle - low), right)
    n, shape = _entries(low, dims), top.shape
    size = chain.reach(name)
    spread = _loss(x, dims, chain.rounding) + 4 * chain.own * chain.readers(op.result) * result.size().view(shape)
    sums = gamma(4 * n + 64, chain.own) + chain.dots
    ends, slopes = [], []
    tangent, total = torch.logsumexp(middle, dims, True), heights.sum(dims, keepdim=True)
    leads = middle >= middle.amax(dims, keepdim=True)
    leads = leads / leads.sum(dims, keepdim=True)  # a mean of those that share the largest midpoint
    whole = torch.logsumexp(high, dims, True)
    others = (whole - low).exp() * ((1 - (high - whole).exp()).clamp(min=0) + _ROUND * n)
    apart = torch.where(leads > 0, leads * (middle + others.log1p()), 0.0)
    chords, single = top + total.log(), apart.sum(dims, keepdim=True)
    above = torch.where(single < chords, leads, chord / total)
    lines = (-1.0, tangent, (middle - tangent).exp()), (1.0, torch.minimum(chords, single), above)
    for sign, value, exact in lines:
        slope = exact.to(kind)
        near = slope.double()
        moved = ((near - exact).abs() * radius).sum(dims, keepdim=True)
        lost = (4 * sums + _ROUND * n) * (near.abs() * size).sum(dims, keepdim=True)
        lost = lost + _ROUND * n * (1 + value.abs() + top.abs())
        ends.append(value - (near * middle).sum(dims, keepdim=True) + sign * (spread + 1.001 * moved + lost))
        slopes.append(slope)
    ends = [end.reshape(result.low.shape) for end in ends]
    floor, gap = chain.ends_of_lines(ends[0], ends[1], torch.zeros_like(ends[0]))
    down, up = slopes

    def pull(chain: "Chain", rows: Tensor, lower: Tensor | None) -> tuple[dict[str, Tensor], Tensor]:
        del lower
        here = rows.reshape(len(rows), *shape)
        part = here.clamp(min=0) * down + here.clamp(max=0) * up
        bias = chain.dot(op.result, rows, floor) + chain.dot(op.result, rows.clamp(max=0), gap)
        return {name: part}, bias + chain.start(name, part)

    return pull


def _loss(x: Interval, dims: list[int], rounding: Rounding) -> Tensor:
    """[..., 1, ...] what an execution, or the float64 one here, may be off by."""
    largest = x.size().double().amax(dims, keepdim=True)
    return rounding.share(_entries(x.low, dims) + 30) * (1 + largest)


def _entries(x: Tensor, dims: list[int]) -> int:
    return math.prod(x.shape[dim] for dim in dims)
