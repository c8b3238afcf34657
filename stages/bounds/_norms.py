"""Layer normalisation over a box: intervals and linear bounds of y_i = w_i (x_i - mean x) / sqrt(var x + eps) + b_i.

With c = x - mean x, n entries, v = |c|^2 / n and s = (v + eps)^(-1/2), y_i is c_i s. Let [c_l, c_u] hold c_i, with
midpoint m_i and radius rho_i, and let r be the radii of x. Removing the mean lengthens no vector, so
(|m| - |r|)_+ <= |c| <= |m| + |r|, beside the sum of the ranges of c_i^2.

Interval. At given c_i, c_i s is monotone in c_i along each of three bounds of |c|^2: c_i^2 plus what the others add up
to, the bound of the norm above, and c_i^2 n / (n - 1), which holds as the entries of c sum to zero (so |c_i s| stays
under sqrt(n - 1)). Each gives a bound at the end of [c_l, c_u], and the best one is taken.

Lines, for every entry and side the one that is best at the centre of the box, d = c - m:
  constant   the interval's end;
  cone       s in [s_l, s_u] lies between two lines through the origin; where c_i changes sign, their chord;
  tangent    s0 m_i + s0 d_i + m_i s' (2/n) m.d, with s0 and s' = -s0^3 / 2 at the centre, off by at most
             m_i [s' q, e] +- rho_i max |s - s0|, q = min(|rho|^2, |r|^2) / n >= |d|^2 / n and e the most that s(v),
             convex, exceeds its tangent: exact to first order in the radii.

Rounding. A float32 execution that forms v as a mean of squares of x - mean x (torch, onnxruntime's primitive nodes)
has c off by at most delta and v by at most dv, v >= 0, which multiplies v + eps by a factor between
(max(v_l - dv, 0) + eps) / (max(v_l, dv) + eps) and its mirror image. Kernels that form v as mean x^2 - (mean x)^2 are
not covered: the installed onnxruntime is asked which formula is its own before a file counts as proved
(`stages.engine_kernels`).
Bounds are computed in float64 throughout. Source: none that we follow; the parts are standard.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stages.bounds._interval import DOUBLE, TINY, Interval, Rounding, gamma
from stages.bounds._trace import Op, fill

if TYPE_CHECKING:
    from stages.bounds._backward import Chain, Pull


@dataclass(frozen=True, slots=True)
class Moments:
    """Of one bounded operand, all float64: `ends` of c s; `loss` is what rounding can move c s by."""

    middle: Tensor
    radius: Tensor
    centre: Tensor
    rho: Tensor
    variance: tuple[Tensor, Tensor]
    scale: tuple[Tensor, Tensor]
    ends: tuple[Tensor, Tensor]
    loss: Tensor
    eps: float
    dims: tuple[int, ...]
    count: int


def moments(x: Interval, shape: Sequence[int], eps: float, rounding: Rounding) -> Moments:
    dims = tuple(range(-len(shape), 0))
    low, high = x.low.double(), x.high.double()
    n = math.prod(shape)
    m, r = (low + high) / 2, (high - low) / 2 * (1 + 4 * DOUBLE) + TINY
    size = torch.maximum(low.abs(), high.abs())
    c = m - m.mean(dims, keepdim=True)
    rho = (1 - 2 / n) * r + r.mean(dims, keepdim=True)
    rho = rho.clamp(min=0)
    c_low, c_high = c - rho, c + rho
    near, far = torch.maximum(c_low, -c_high).clamp(min=0) ** 2, torch.maximum(-c_low, c_high) ** 2
    length, reach = _norm(c, dims), _norm(r, dims)
    least, most = (length - reach).clamp(min=0) ** 2, (length + reach) ** 2
    nears, fars = near.sum(dims, keepdim=True), far.sum(dims, keepdim=True)
    few = gamma(8 * n + 64, DOUBLE)
    total = (torch.maximum(nears, least) * (1 - few), torch.minimum(fars, most) * (1 + few))
    variance = total[0] / n, total[1] / n
    scale = (variance[1] + eps).rsqrt() * (1 - few), (variance[0] + eps).rsqrt() * (1 + few)

    def end(at: Tensor, outward: Tensor) -> Tensor:
        """c s where c_i ends; `outward` where a smaller norm moves it outward."""
        square = at**2
        short = torch.maximum(square + (nears - near - few * nears).clamp(min=0), least)
        short = torch.maximum(short, square * n / max(n - 1, 1)) * (1 - few)
        long = torch.minimum(square + (fars - far + few * fars).clamp(min=0), most) * (1 + few)
        return at * (torch.where(outward, short, long) / n + eps).rsqrt()

    ends = end(c_low, c_low < 0), end(c_high, c_high > 0)
    units = gamma(n + 8, rounding.unit) + gamma(8 * n + 64, DOUBLE)
    delta = 2 * units * (size + size.mean(dims, keepdim=True))
    dv = 8 * units * (size**2).mean(dims, keepdim=True)
    stretch = ((torch.maximum(variance[0], dv) + eps) / ((variance[0] - dv).clamp(min=0) + eps)).sqrt()
    top = torch.maximum(ends[0].abs(), ends[1].abs())
    loss = top * (stretch * (1 + rounding.share(8)) - 1) + delta * scale[1] * stretch * 1.001 + TINY
    return Moments(m, r, c, rho, variance, scale, ends, loss, eps, dims, n)


def layer_norm(op: Op, args: tuple[Any, ...], kwargs: dict[str, Any], rounding: Rounding) -> tuple[Interval, ...]:
    """The interval of native_layer_norm's first result; the others, mean and 1 / sqrt(var + eps), have no rule."""
    del op, kwargs
    x, shape, weight, bias, eps = args
    found = moments(x, shape, eps, rounding)
    low, high = found.ends[0] - found.loss, found.ends[1] + found.loss
    size = torch.maximum(low.abs(), high.abs())
    if weight is not None:
        scale = weight.double()
        low, high = torch.minimum(low * scale, high * scale), torch.maximum(low * scale, high * scale)
        size = size * scale.abs()
    if bias is not None:
        low, high, size = low + bias.double(), high + bias.double(), size + bias.double().abs()
    return (narrowed(low, high, rounding.share(2) * size, x.low.dtype),)


def narrowed(low: Tensor, high: Tensor, margin: Tensor, kind: torch.dtype) -> Interval:
    """[low - margin, high + margin] in `kind`, outward; differentiable."""
    low, high = low - margin - TINY, high + margin + TINY
    if kind == torch.float64:
        return Interval(low, high)
    return Interval((low - 2.0**-23 * low.abs()).to(kind), (high + 2.0**-23 * high.abs()).to(kind))


@dataclass(frozen=True, slots=True)
class Side:
    """One side's lines k + along d_i + across (m.d): their values at the centre, and their two slopes."""

    centre: Tensor
    along: Tensor
    across: Tensor


def sides(found: Moments) -> tuple[Side, Side]:
    """The lines below and above c s, in real arithmetic."""
    c, rho, (s_low, s_high) = found.centre, found.rho, found.scale
    c_low, c_high, zeros = c - rho, c + rho, torch.zeros_like(c)
    v0 = _norm(c, found.dims) ** 2 / found.count
    s0 = (v0 + found.eps).rsqrt()
    bend = -(s0**3) / 2
    q = torch.minimum((rho**2).sum(found.dims, keepdim=True), (found.radius**2).sum(found.dims, keepdim=True))
    q = q / found.count * (1 + 64 * found.count * DOUBLE)
    excess = [(s - s0 - bend * (v - v0)) for s, v in zip((s_high, s_low), found.variance, strict=True)]
    few = gamma(16 * found.count + 256, DOUBLE)
    e = torch.maximum(*excess).clamp(min=0) + few * (s_high + s0 + bend.abs() * (v0 + found.variance[1]))
    wide = torch.maximum(s_high - s0, s0 - s_low).clamp(min=0)
    answer = []
    for sign, end in ((-1.0, found.ends[0]), (1.0, found.ends[1])):
        # Between the two lines through the origin; where c_i changes sign, the chord.
        outer = sign * c_high > 0
        left = torch.where(sign * c_low > 0, s_high, s_low) * c_low
        right = torch.where(outer, s_high, s_low) * c_high
        slope = torch.where(rho > 0, (right - left) / (2 * rho).clamp(min=TINY), zeros)
        cone = (left + right) / 2
        curved = torch.where(sign * c > 0, c * e, c * bend * q)
        tangent = s0 * c + curved + sign * rho * wide
        best = Side(cone, slope, zeros)
        best = _better(best, Side(tangent, s0.expand_as(c), (2 / found.count) * c * bend), sign)
        answer.append(_better(best, Side(end, zeros, zeros), sign))
    return answer[0], answer[1]


def _better(a: Side, b: Side, sign: float) -> Side:
    take = sign * b.centre <= sign * a.centre
    return Side(*(torch.where(take, y, x) for x, y in ((a.centre, b.centre), (a.along, b.along), (a.across, b.across))))


def front(chain: "Chain", op: Op) -> "Pull":
    """Coefficients through the lines: a on y_i gives `along` a_i on c_i and `across` a_i on m.c."""
    args = fill(op.args, chain.values)
    x, shape, weight, bias, eps = args
    name, result, kind = op.args[0].name, chain.values[op.result][0], chain.kind
    found = moments(x, shape, eps, chain.rounding)
    below, above = sides(found)
    one = torch.ones_like(found.centre)
    scale = one if weight is None else weight.double() * one
    shift = 0 * one if bias is None else bias.double() * one
    below, above = (
        Side(*(torch.where(scale > 0, getattr(a, part), getattr(b, part)) * scale for part in Side.__slots__))
        for a, b in ((below, above), (above, below))
    )
    dims, middle = found.dims, found.centre.to(kind)
    fixed = middle.double()
    span = (fixed.abs() * found.radius).sum(dims, keepdim=True)
    apart = ((fixed - found.centre).abs() * found.radius).sum(dims, keepdim=True)
    at = (fixed * found.middle).sum(dims, keepdim=True)
    size = chain.reach(name)
    sums = gamma(4 * found.count + 64, chain.own) + chain.dots
    total = size + size.mean(dims, keepdim=True)
    cross = (fixed.abs() * size).sum(dims, keepdim=True)
    fans = 4 * chain.own * chain.readers(op.result) * result.size().double()
    tall = torch.maximum(*(end.abs() for end in found.ends)) * scale.abs() + shift.abs()
    spread = found.loss * scale.abs() + chain.rounding.share(2) * tall + fans
    ends, slopes = [], []
    for side, sign in ((below, -1.0), (above, 1.0)):
        along, across = side.along.to(kind), side.across.to(kind)
        a, b = along.double(), across.double()
        moved = (a - side.along).abs() * found.rho + (b - side.across).abs() * span + side.across.abs() * apart
        start = side.centre + shift - a * found.centre - b * at
        reach = a.abs() * total + b.abs() * cross
        lost = 4 * sums * reach + 64 * found.count * DOUBLE * (side.centre.abs() + shift.abs())
        ends.append(start + sign * (spread + moved * 1.001 + lost))
        slopes.append((along, across))
    floor, gap = chain.ends_of_lines(ends[0], ends[1], torch.zeros_like(ends[0]))
    (along_low, across_low), (along_high, across_high) = slopes

    def pull(chain: "Chain", rows: Any, lower: Tensor | None) -> tuple[dict[str, Tensor], Tensor]:
        del lower
        here = rows[0]
        rises = here > 0
        part = here * torch.where(rises, along_low, along_high)
        turn = (here * torch.where(rises, across_low, across_high)).sum(dims, keepdim=True)
        part = part - part.mean(dims, keepdim=True) + turn * middle
        bias = chain.dot(op.result, here, floor) + chain.dot(op.result, here.clamp(max=0), gap)
        return {name: part}, bias + chain.start(name, part)

    return pull


def _norm(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    return (x**2).sum(dims, keepdim=True).sqrt()
