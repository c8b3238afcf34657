"""Linear lower and upper bounds of non-linear operations over the box of their operands.

Elementwise functions get one line below and one above: al x + bl <= f(x) <= au x + bu on [l, u].

ReLU: below lam x with lam = 1 if u > -l else 0 (or any lam in [0, 1]), above the chord (Zhang et al. 2018, table 2).
Others (`Curve`): the line above touches the concave hull of f over the middle of [l, u], where a line encloses
the least area; the line below likewise. The hull is that of f at grid points, kinks among them; between neighbours f
exceeds its chord by at most M h^2 / 8, with M a bound of |f''| and h the spacing, and that is added. With M = 0
(piecewise linear) the lines are the best there are.
Rounding to whole numbers: x +- 1/2.
Products: |x y - (m_y x + m_x y - m_x m_y)| <= r_x r_y, m and r midpoints and radii: the mean of McCormick's two planes,
all of which agree at the centre.
What has no rule is bounded by the constants of interval arithmetic.

All is computed in float64; slopes are rounded first and intercepts made for the rounded slopes.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stages.bounds._interval import DOUBLE, FOLDED, TINY, Interval
from stages.bounds._trace import Op, fill

_PIECES = 32
_ROUND = 64 * DOUBLE


@dataclass(frozen=True, slots=True)
class Lines:
    """Of every operand: slopes below and above; and the intercepts below and above, float64. Shapes of the result."""

    slopes: dict[str, tuple[Tensor, Tensor]]
    low: Tensor
    high: Tensor


def relu(op: Op, x: Interval, kind: torch.dtype) -> Lines:
    low, high = x.low.double(), x.high.double()
    crossing, active = (low < 0) & (high > 0), low >= 0
    up = torch.where(crossing, high / (high - low).clamp(min=TINY), active.double()).to(kind)
    down = torch.where(crossing, (high > -low).double(), active.double()).to(kind)
    # Above the slope rounded the intercept must clear both ends; ReLU is convex, so nothing in between is higher.
    wide = up.double()
    lift = torch.maximum(-wide * low, high - wide * high) + _ROUND * (low.abs() + high.abs())
    return Lines({op.args[0].name: (down, up)}, torch.zeros_like(low), torch.where(crossing, lift, 0.0))


@dataclass(frozen=True, slots=True)
class Curve:
    """What is known of a function besides its values: `bend` >= |f''| between the kinks; the kinks; the jumps."""

    bend: float | Callable[[Interval], Tensor]
    kinks: tuple[float, ...] = ()
    jump: float = 0.0


def curve(op: Op, known: Curve, x: Interval, args: tuple[Any, ...], kwargs: dict[str, Any], kind: torch.dtype) -> Lines:
    low, high = x.low.double(), x.high.double()
    points = [low + (high - low) * (i / _PIECES) for i in range(_PIECES)] + [high]
    points += [torch.minimum(torch.maximum(torch.full_like(low, kink), low), high) for kink in known.kinks]
    grid = torch.stack(points).sort(0).values
    heights = op.target(*(grid if isinstance(arg, Interval) else arg for arg in args), **kwargs)
    spacing = (high - low) / _PIECES
    bend = known.bend(x) if callable(known.bend) else known.bend
    excess = bend * spacing**2 / 8 + known.jump
    middle = (low + high) / 2
    up = _touching(grid, heights, middle).to(kind)
    down = -_touching(grid, -heights, middle)
    down = down.to(kind)
    over, under = up.double(), down.double()
    # exp, erf and the like are taken to be right within 14 units of 1 + |value|, as in the interval rules.
    reach = torch.maximum(low.abs(), high.abs()) * (1 + over.abs() + under.abs())
    slack = excess + _ROUND * (1 + heights.abs().amax(0) + reach)
    lift = (heights - over * grid).amax(0) + slack
    drop = (heights - under * grid).amin(0) - slack
    return Lines({_name(op): (down, up)}, drop, lift)


def _touching(grid: Tensor, heights: Tensor, middle: Tensor) -> Tensor:
    """The slope of the concave hull of the points over `middle`, by bisection.

    k middle + max_i (f_i - k x_i) is convex in k and least at that slope; where the maximum is taken right of the
    middle, k is too small.
    """
    run, rise = grid.diff(dim=0), heights.diff(dim=0)
    steps = torch.where(run > 0, rise / run.clamp(min=TINY), rise.new_zeros(()))
    low, high = steps.amin(0), steps.amax(0)
    for _ in range(24):
        k = (low + high) / 2
        best = (heights - k * grid).argmax(0, keepdim=True)
        right = grid.gather(0, best)[0] > middle
        low, high = torch.where(right, k, low), torch.where(right, high, k)
    # The exact slope is that of a pair of points: the last ones taken left and right of the middle.
    left = (heights - high * grid).argmax(0, keepdim=True)
    rest = (heights - low * grid).argmax(0, keepdim=True)
    x0, x1, y0, y1 = (t.gather(0, i)[0] for t in (grid, heights) for i in (left, rest))
    k = torch.where(x1 - x0 > 1e-9, (y1 - y0) / (x1 - x0).clamp(min=TINY), (low + high) / 2)
    return torch.where(torch.isfinite(k), k, 0.0)


def product(op: Op, a: Interval, b: Interval, kind: torch.dtype) -> Lines:
    (ma, ra), (mb, rb) = middle(a, kind), middle(b, kind)
    reach = ra * rb
    slack = _ROUND * (ma.abs() + ra) * (mb.abs() + rb) + TINY
    one, two = mb.to(kind), ma.to(kind)
    first, second = op.args[0].name, op.args[1].name
    return Lines({first: (one, one), second: (two, two)}, -ma * mb - reach - slack, reach - ma * mb + slack)


def middle(x: Interval, kind: torch.dtype) -> tuple[Tensor, Tensor]:
    """The midpoint rounded to `kind`, and the radius round that point; float64 both."""
    low, high = x.low.double(), x.high.double()
    centre = ((low + high) / 2).to(kind).double()
    return centre, torch.maximum(high - centre, centre - low) * (1 + _ROUND)


def rounded(op: Op, x: Interval, kind: torch.dtype) -> Lines:
    """round(x) within x +- 1/2, or between its ends where they are at most one apart; `FOLDED` as in interval rules."""
    low, high = (x.low.double() - FOLDED).round(), (x.high.double() + FOLDED).round()
    slope = (high - low > 1).to(kind)
    half, slanted = 0.5 + FOLDED + 2 * DOUBLE * torch.maximum(x.low.abs(), x.high.abs()).double(), slope > 0
    lines = torch.where(slanted, -half, low), torch.where(slanted, half, high)
    return Lines({_name(op): (slope, slope)}, *lines)


def constant(result: Interval) -> Lines:
    return Lines({}, result.low.double(), result.high.double())


def elementwise(op: Op, values: dict[str, Any], kind: torch.dtype) -> Lines | None:
    """The lines of an elementwise operation, or None where it has no rule here."""
    args, kwargs = fill(op.args, values), fill(dict(op.kwargs), values)
    if op.kind == "relu":
        return relu(op, args[0], kind)
    if op.kind == "round":
        return rounded(op, args[0], kind)
    if op.kind == "mul" and op.args[0] != op.args[1]:
        return product(op, args[0], args[1], kind)
    known = _known(op, args, kwargs)
    if known is None:
        return None
    x = next(arg for arg in args if isinstance(arg, Interval))
    return curve(op, known, x, args, kwargs, kind)


def _name(op: Op) -> str:
    return op.reads()[0]


def _known(op: Op, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Curve | None:
    del kwargs
    rest = [arg for arg in args if not isinstance(arg, Interval)]
    if any(isinstance(arg, Tensor) and arg.numel() > 1 for arg in rest):
        return None
    if op.kind in {"clamp", "hardtanh", "clamp_min", "clamp_max"}:
        ends = (-1.0, 1.0) if op.kind == "hardtanh" and not rest else rest
        return Curve(0.0, tuple(float(end) for end in ends if end is not None))
    if op.kind == "elu":
        alpha, scale, inner = ([float(v) for v in rest] + [1.0, 1.0, 1.0][len(rest) :])[:3]
        return Curve(abs(alpha * scale) * inner**2, (0.0,))
    if op.kind == "softplus":
        beta, threshold = ([float(v) for v in rest] + [1.0, 20.0][len(rest) :])[:2]
        return Curve(beta / 4, (threshold / beta,), math.exp(-threshold) / beta)
    if op.kind == "pow" and rest == [2]:
        return Curve(2.0)
    return _CURVES.get(op.kind)


# Bounds of |f''|: sigmoid 1/(6 sqrt 3), tanh 4/(3 sqrt 3), erf 4/sqrt(2 pi e), silu 1/2 at 0, gelu 2 phi(0) = 0.798
# at 0 (0.802 in its tanh form). Hard swish is piecewise x^2/6. All rounded up.
_CURVES = {
    "leaky_relu": Curve(0.0, (0.0,)),
    "abs": Curve(0.0, (0.0,)),
    "hardsigmoid": Curve(0.0, (-3.0, 3.0)),
    "hardswish": Curve(0.334, (-3.0, 3.0)),
    "sigmoid": Curve(0.0963),
    "tanh": Curve(0.77),
    "erf": Curve(0.97),
    "silu": Curve(0.501),
    "gelu": Curve(0.85),
    "exp": Curve(lambda x: x.high.double().exp()),
    "mul": Curve(2.0),
    "reciprocal": Curve(lambda x: 2 / torch.minimum(x.low.abs(), x.high.abs()).double() ** 3),
}
