"""Intervals, and how much outward margin one operation needs so that rounding cannot break a bound."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import leaky_relu

from stages.method import InputError

DOUBLE, SINGLE = 2.0**-53, 2.0**-24
UNITS = {"real": 0.0, "float32": SINGLE}  # of the arithmetic that bounds cover
FOLDED = 2.0**-10  # of a code: what integer kernels may lose before they round (`quantised`)
TINY = 1e-30  # more than what underflow can lose in any sum that fits in memory


@dataclass(frozen=True, slots=True)
class Interval:
    """Elementwise bounds, low <= high, of equal shape, in the precision that the bounds are computed in."""

    low: Tensor
    high: Tensor
    _size: list[Tensor] = field(default_factory=list, init=False, repr=False, compare=False)

    @staticmethod
    def above_zero(low: Tensor, high: Tensor) -> "Interval":
        """0 <= low: the high end is the size."""
        found = Interval(low, high)
        found._size.append(high)
        return found

    @property
    def positive(self) -> bool:
        """Whether it was made by `above_zero`."""
        return bool(self._size) and self._size[0] is self.high

    def size(self) -> Tensor:
        """The largest absolute value inside."""
        if not self._size:  # every reader of a value asks for it
            self._size.append(torch.maximum(self.high, -self.low))
        return self._size[0]

    @staticmethod
    def apart(low: Tensor, high: Tensor, share: float) -> "Interval":
        """[low - share |low|, high + share |high|] but for four units, from (1 - share) low and (1 + share) high, which
        it overwrites."""
        wide = (1 + share) / (1 - share)
        return Interval(leaky_relu(low, wide, inplace=True), leaky_relu(high, 1 / wide, inplace=True))

    def split(self) -> tuple[Tensor, Tensor]:
        """Midpoint m and radius r, with [low, high] inside [m - r(1 + u), m + r(1 + u)], u the unit roundoff."""
        middle = (self.low + self.high) / 2
        return middle, torch.maximum(self.high - middle, middle - self.low)


@dataclass(frozen=True, slots=True)
class Rounding:
    """What the bounds must cover besides exact arithmetic: `unit` is the unit roundoff of the covered arithmetic, or 0.

    A sum of n products computed in any order, with or without fused operations, is off by at most gamma(n) sum |a b|,
    gamma(n) = n u / (1 - n u) (Higham 2002, section 3.1). With g = gamma(n + 2) of the covered arithmetic and
    h = gamma(n + 64) of the one in which the bounds themselves are computed (unit roundoff `own`, float64's unless said
    otherwise), `share(n)` is (g + h) / (1 - h). For y = L x, x in [m - r, m + r], and s = share(n):
    the spread |L| (r + s (|m| + r)) is computed as no less than 1 - h of itself, which leaves at least |L| r plus
    (g + h) |L| |m| for the midpoint, g |L| (|m| + r) for the network and 50 units for m, r and the two ends.
    Sums by Strassen, Winograd or Fourier transforms, bfloat16 and TF32 do not obey gamma and are not covered.
    """

    unit: float = 0.0
    own: float = DOUBLE

    def share(self, terms: int) -> float:
        """Relative margin for one operation of `terms` products. Raises `InputError` where gamma has no bound."""
        own = gamma(terms + 64, self.own)
        return (gamma(terms + 2, self.unit) + own) / (1 - own)

    def widen(self, low: Tensor, high: Tensor, magnitude: Tensor, terms: int = 1) -> Interval:
        """[low, high] moved outward by share(terms) of `magnitude`, which bounds the sum of |a b|."""
        margin = self.share(terms) * magnitude + TINY
        return Interval(low - margin, high + margin)

    def elementary(self, low: Tensor, high: Tensor, magnitude: Tensor) -> Interval:
        """For exp, tanh, erf and the like: libraries are taken to be right within 14 units of (1 + magnitude)."""
        return self.widen(low, high, 1 + magnitude, terms=12)


def gamma(n: int, unit: float) -> float:
    """How much of sum |a b| a sum of n products can lose. Raises `InputError` where there is no bound."""
    if n * unit >= 0.5:
        raise InputError(
            f"bounds: a sum of {n} terms cannot be bounded at unit roundoff {unit:g}; the layer is too wide"
        )
    return n * unit / (1 - n * unit)


def low_ends(tree: Any) -> Any:
    """`tree` with every interval replaced by its low end."""
    return _map(tree, lambda interval: interval.low)


def high_ends(tree: Any) -> Any:
    """`tree` with every interval replaced by its high end."""
    return _map(tree, lambda interval: interval.high)


def bounded(tree: Any) -> list[Interval]:
    """The intervals in `tree`, in order."""
    found: list[Interval] = []
    _map(tree, found.append)
    return found


def _map(tree: Any, swap: Any) -> Any:
    if isinstance(tree, Interval):
        return swap(tree)
    if isinstance(tree, list | tuple):
        return type(tree)(_map(branch, swap) for branch in tree)
    return tree


def outward(ends: Tensor, kind: torch.dtype, side: float) -> Tensor:
    """`ends` in another precision, never past them: rounded towards `side`, -inf or inf. Differentiable."""
    if ends.dtype == kind:
        return ends
    if ends.requires_grad:
        near = ends.to(kind)
        there = outward(ends.detach(), kind, side)
        return torch.where(torch.isfinite(near), near + (there - near).detach(), there)
    cast = ends.to(kind)
    wrong = cast.double() > ends.double() if side < 0 else cast.double() < ends.double()
    return torch.where(wrong, torch.nextafter(cast, torch.full_like(cast, side)), cast)
