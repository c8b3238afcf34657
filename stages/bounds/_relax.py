"""Linear lower and upper bounds of non-linear operations over the box of their operands.

Elementwise functions get one line below and one above: al x + bl <= f(x) <= au x + bu on [l, u].

ReLU: below lam x with lam = 1 if u > -l else 0 (or any lam in [0, 1]), above the chord (Zhang et al. 2018, table 2).
Others (`Curve`): the line above touches the concave hull of f over the middle of [l, u], where a line encloses
the least area; the line below likewise. The hull is that of f at grid points, kinks among them; between neighbours f
exceeds its chord by at most M h^2 / 8, with M a bound of |f''| and h the spacing, and that is added. With M = 0
(piecewise linear) the lines are the best there are.
Rounding to whole numbers: x +- 1/2.
The larger of two: below the one with the larger midpoint; above, g + (x - g)_+ + (y - g)_+ with g the larger of the low
ends, by chords.
Products: |x y - (m_y x + m_x y - m_x m_y)| <= r_x r_y, m and r midpoints and radii: the mean of McCormick's two planes,
all of which agree at the centre. Quotients: x times a line of 1 / y.
What has no rule is bounded by the constants of interval arithmetic.

Slopes are rounded first and intercepts made for the rounded slopes. All but ReLU is computed in float64.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from stages.bounds import _choice
from stages.bounds._interval import DOUBLE, FOLDED, SINGLE, TINY, Interval
from stages.bounds._trace import Op, fill

_PIECES, _HALVINGS = 32, 14
_ROUND = 64 * DOUBLE
UNITS_OF = {torch.float32: SINGLE, torch.float64: DOUBLE}


@dataclass(frozen=True, slots=True)
class Lines:
    """Of every operand: slopes below and above; and the intercepts below and above. Shapes of the result."""

    slopes: dict[str, tuple[Tensor, Tensor]]
    low: Tensor
    high: Tensor


def relu(op: Op, x: Interval, kind: torch.dtype) -> Lines:
    """In the precision of the bounds: whatever the slope is rounded to, the intercept clears both ends by 4 units."""
    above, depth = x.high.to(kind).clamp(min=0), (-x.low.to(kind)).clamp_(min=TINY)
    up = above / (above + depth)
    down = up.detach().round()  # 1 or 0, as `up` is where the sign is known; comparisons take longer
    # ReLU is convex, so above the ends means above everywhere between.
    lift = torch.maximum(up * depth, torch.addcmul(above, up, above, value=-1))
    return Lines(
        {op.args[0].name: (down, up)},
        above.new_zeros(()).expand_as(above),
        torch.add(lift, above, alpha=8 * UNITS_OF[kind]),
    )


@dataclass(frozen=True, slots=True)
class Curve:
    """What is known of a function besides its values: `bend` >= |f''| between the kinks; the kinks; the jumps."""

    bend: float | Callable[[Interval], Tensor]
    kinks: tuple[float, ...] = ()
    jump: float = 0.0


def curve(op: Op, known: Curve, x: Interval, args: tuple[Any, ...], kwargs: dict[str, Any], kind: torch.dtype) -> Lines:
    low, high = x.low.double(), x.high.double()
    pieces = 1 if known.bend == 0 else _PIECES  # between kinks there is nothing to see
    points = [low + (high - low) * (i / pieces) for i in range(pieces)] + [high]
    points += [torch.minimum(torch.maximum(torch.full_like(low, kink), low), high) for kink in known.kinks]
    grid = torch.stack(points).sort(0).values
    heights = op.target(*(grid if isinstance(arg, Interval) else arg for arg in args), **kwargs)
    spacing = (high - low) / pieces
    bend = known.bend(x) if callable(known.bend) else known.bend
    excess = bend * spacing**2 / 8 + known.jump
    middle = (low + high) / 2
    touching = _edges if pieces == 1 else _touching
    up = touching(grid, heights, middle).to(kind)
    down = (-touching(grid, -heights, middle)).to(kind)
    over, under = up.double(), down.double()
    # exp, erf and the like are taken to be right within 14 units of 1 + |value|, as in the interval rules.
    reach = torch.maximum(low.abs(), high.abs()) * (1 + over.abs() + under.abs())
    slack = excess + _ROUND * (1 + heights.abs().amax(0) + reach)
    lift = (heights - over * grid).amax(0) + slack
    drop = (heights - under * grid).amin(0) - slack
    [name, *_] = (arg.name for arg, value in zip(op.args, args, strict=True) if isinstance(value, Interval))
    return Lines({name: (down, up)}, drop, lift)


def _edges(grid: Tensor, heights: Tensor, middle: Tensor) -> Tensor:
    """As `_touching`, for few points: the edge of the hull is the pair of points whose chord is highest there."""
    best, found = torch.full_like(middle, -torch.inf), torch.zeros_like(middle)
    for i, j in combinations(range(len(grid)), 2):
        run = grid[j] - grid[i]
        slope = (heights[j] - heights[i]) / run.clamp(min=TINY)
        height = heights[i] + slope * (middle - grid[i])
        better = (grid[i] <= middle) & (middle <= grid[j]) & (run > 1e-9) & (height > best)
        best, found = torch.where(better, height, best), torch.where(better, slope, found)
    return found


def _touching(grid: Tensor, heights: Tensor, middle: Tensor) -> Tensor:
    """The slope of the concave hull of the points over `middle`, by bisection.

    k middle + max_i (f_i - k x_i) is convex in k and least at that slope; where the maximum is taken right of the
    middle, k is too small.
    """
    run, rise = grid.diff(dim=0), heights.diff(dim=0)
    steps = torch.where(run > 0, rise / run.clamp(min=TINY), rise.new_zeros(()))
    low, high = steps.amin(0), steps.amax(0)
    before, after = (torch.where(side, heights, -torch.inf) for side in (grid <= middle, grid > middle))
    for _ in range(_HALVINGS):
        k = (low + high) / 2
        right = (after - k * grid).amax(0) > (before - k * grid).amax(0)
        low, high = torch.where(right, k, low), torch.where(right, high, k)
    # The exact slope is that of a pair of points: the last ones taken left and right of the middle.
    left = (before - high * grid).argmax(0, keepdim=True)
    rest = (after - low * grid).argmax(0, keepdim=True)
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


def quotient(op: Op, a: Interval, b: Interval, kind: torch.dtype) -> Lines:
    """a w with w = 1 / b bounded by lines of its own: the planes of a product, with w's lines put in."""
    [(down, up)], w_low, w_high = _reciprocal(op, b, kind)
    ends = torch.stack([1 / b.low.double(), 1 / b.high.double()])
    spare = _ROUND * ends.abs().amax(0)
    box = Interval(ends.amin(0) - spare, ends.amax(0) + spare)
    (ma, ra), (mw, rw) = middle(a, kind), middle(box, kind)
    slack = _ROUND * (ma.abs() + ra) * (mw.abs() + rw) + TINY
    rises = ma > 0
    below, above = torch.where(rises, w_low, w_high), torch.where(rises, w_high, w_low)
    slopes = [torch.where(rises, x, y).double() * ma for x, y in ((down, up), (up, down))]
    sides = [slope.to(kind) for slope in slopes]
    far = torch.maximum(b.low.abs(), b.high.abs()).double()
    loss = slack + (ra * rw) + _ROUND * (ma * w_low).abs() + _ROUND * (ma * w_high).abs()
    lost = [loss + (side.double() - slope).abs() * far for side, slope in zip(sides, slopes, strict=True)]
    lines = ma * below - ma * mw - lost[0], ma * above - ma * mw + lost[1]
    one = mw.to(kind)
    return Lines({op.args[0].name: (one, one), op.args[1].name: (sides[0], sides[1])}, *lines)


def _reciprocal(op: Op, b: Interval, kind: torch.dtype) -> tuple[list[tuple[Tensor, Tensor]], Tensor, Tensor]:
    inverse = replace(op, kind="reciprocal", target=torch.reciprocal, args=(op.args[1],))
    lines = curve(inverse, _CURVES["reciprocal"], b, (b,), {}, kind)
    return list(lines.slopes.values()), lines.low, lines.high


def larger(op: Op, x: Interval, y: Interval, kind: torch.dtype) -> Lines:
    """max(x, y); and min(x, y) = -max(-x, -y)."""
    sign = -1.0 if op.kind == "minimum" else 1.0
    ends = [(z.low.double(), z.high.double()) if sign > 0 else (-z.high.double(), -z.low.double()) for z in (x, y)]
    (xl, xu), (yl, yu) = ends
    level = torch.maximum(xl, yl)
    first = ((xl + xu) >= (yl + yu)).to(kind)
    below = first, 1 - first
    low, high = torch.zeros_like(level), level
    above = []
    for bottom, top in ends:
        exact = torch.where(top > level, (top - level) / (top - bottom).clamp(min=TINY), 0.0)
        share = exact.to(kind)
        near, size = share.double(), top.abs() + bottom.abs() + level.abs()
        high = high + ((near - exact).abs() + _ROUND) * (top - bottom) + _ROUND * size - near * bottom
        above.append(share)
    sides = list(zip(below, above, strict=True)) if sign > 0 else list(zip(above, below, strict=True))
    found = {arg.name: side for arg, side in zip(op.args, sides, strict=True)}
    return Lines(found, low, high) if sign > 0 else Lines(found, -high, low)


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
    return Lines({op.args[0].name: (slope, slope)}, *lines)


def constant(result: Interval) -> Lines:
    return Lines({}, result.low.double(), result.high.double())


def elementwise(op: Op, values: dict[str, Any], kind: torch.dtype) -> Lines | None:
    """The lines of an elementwise operation, the interval's ends where they are not finite; None without a rule."""
    lines, result = _lines(op, values, kind), values[op.result]
    if lines is None:
        return None
    total = lines.high.detach().sum() if op.kind == "relu" else lines.low.detach().sum() + lines.high.detach().sum()
    if bool(torch.isfinite(total)):
        return lines
    fine = torch.isfinite(lines.low) & torch.isfinite(lines.high)
    slopes = {n: (torch.where(fine, a, 0.0), torch.where(fine, b, 0.0)) for n, (a, b) in lines.slopes.items()}
    still = constant(result)
    return Lines(slopes, torch.where(fine, lines.low, still.low), torch.where(fine, lines.high, still.high))


def _lines(op: Op, values: dict[str, Any], kind: torch.dtype) -> Lines | None:
    args, kwargs = fill(op.args, values), fill(dict(op.kwargs), values)
    if op.kind == "relu":
        return relu(op, args[0], kind)
    if op.kind == "round":
        return rounded(op, args[0], kind)
    if op.kind == "where":
        return Lines(*_choice.lines(op, args, values[op.result], kind))
    if op.kind == "mul" and op.args[0] != op.args[1]:
        return product(op, args[0], args[1], kind)
    two = all(isinstance(arg, Interval) for arg in args[:2]) and op.args[0] != op.args[-1]
    if op.kind in {"maximum", "minimum"} and two:
        return larger(op, args[0], args[1], kind)
    if op.kind == "div" and isinstance(args[1], Interval):
        return quotient(op, args[0], args[1], kind) if two else None
    known = _known(op, args, kwargs)
    if known is None or len({arg for arg, value in zip(op.args, args, strict=True) if isinstance(value, Interval)}) > 1:
        return None  # a curve is a function of one value
    x = next(arg for arg in args if isinstance(arg, Interval))
    return curve(op, known, x, args, kwargs, kind)


def crossed(op: Op, values: dict[str, Any], box: Interval) -> Tensor:
    """Where lines depend on the box: everywhere, but for straight pieces only where a kink lies inside."""
    if op.kind == "relu":
        return (box.low < 0) & (box.high > 0)
    args, kwargs = fill(op.args, values), fill(dict(op.kwargs), values)
    known = _known(op, args, kwargs) if sum(isinstance(arg, Interval) for arg in args) == 1 else None
    if known is None or known.bend != 0 or known.jump:
        return box.low < box.high
    found = torch.zeros_like(box.low, dtype=torch.bool)
    for kink in known.kinks:
        found |= (box.low < kink) & (box.high > kink)
    return found


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
    if op.kind == "pow":
        return _power(float(rest[0]))
    if op.kind in {"maximum", "minimum"}:
        return Curve(0.0, tuple(float(end) for end in rest))
    return _CURVES.get(op.kind)


def _power(exponent: float) -> Curve:
    """x^n for the n that have an interval rule; their second derivative is monotone in |x|."""
    n, whole = exponent, exponent == int(exponent) and exponent >= 1
    far = whole or n > 2
    return Curve(lambda x: abs(n * (n - 1)) * (x.size() if far else x.low).double().abs() ** (n - 2))


# Bounds of |f''|: sigmoid 1/(6 sqrt 3), tanh 4/(3 sqrt 3), atan 3 sqrt(3)/8, asinh 2/(3 sqrt 3), erf 4/sqrt(2 pi e),
# silu 1/2 at 0, gelu 2 phi(0) = 0.798 at 0 (0.802 in its tanh form). Hard swish is piecewise x^2/6. All rounded up.
_CURVES = {
    "leaky_relu": Curve(0.0, (0.0,)),
    "abs": Curve(0.0, (0.0,)),
    "hardsigmoid": Curve(0.0, (-3.0, 3.0)),
    "hardswish": Curve(0.334, (-3.0, 3.0)),
    "sigmoid": Curve(0.0963),
    "tanh": Curve(0.77),
    "atan": Curve(0.66),
    "asinh": Curve(0.39),
    "erf": Curve(0.97),
    "silu": Curve(0.501),
    "sin": Curve(1.0),
    "cos": Curve(1.0),
    "gelu": Curve(0.85),
    "exp": Curve(lambda x: x.high.double().exp()),
    "mul": Curve(2.0),
    "sqrt": _power(0.5),
    "rsqrt": _power(-0.5),
    "log": Curve(lambda x: x.low.double() ** -2),
    "reciprocal": Curve(lambda x: 2 / torch.minimum(x.low.abs(), x.high.abs()).double() ** 3),
}
