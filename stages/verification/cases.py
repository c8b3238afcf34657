"""A specification as arrays: boxes that a search may use, boxes that a proof must cover, and what each case demands."""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import gcd, lcm

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from stages.method import InputError
from stages.verification.vnnlib import Region, Row, Spec, shown

Array = npt.NDArray[np.float32]
_EXACT = 1 << 53
_LARGEST = Fraction(2**128 - 2**103)  # from here on float32 rounds to infinity


@dataclass(frozen=True, slots=True)
class Cases:
    """Case c is one conjunction of one region: it is met at y where rows @ y <= bounds[c] in every entry.

    `inner_low`, `inner_high` float32 [G, n]: the float32 points of each region's box, where there are any; else the
    nearest to it. `barren` bool [G]: an interval without a float32 has an open side, so that no point is near enough.
    `low`, `high` float32 [G, n]: the smallest float32 box that holds the region's box and the inner one.
    `rows` float64 [U, K], exact. `bounds` float64 [C, U], rounded up, infinite where a case does not ask for the row.
    `region` int64 [C].
    """

    spec: Spec
    inner_low: Tensor
    inner_high: Tensor
    barren: Tensor
    low: Tensor
    high: Tensor
    rows: Tensor
    bounds: Tensor
    region: Tensor

    @staticmethod
    def of(spec: Spec, classes: int) -> "Cases":
        """Raises `InputError` where the network has other outputs than the specification."""
        if classes != spec.outputs:
            raise InputError(
                f"the specification names {spec.outputs} outputs Y_0 to Y_{spec.outputs - 1}, the network has {classes}"
            )
        inner = [_inner(region) for region in spec.regions]
        outer = [
            (_outward(region.low, -1, low), _outward(region.high, 1, high))
            for region, (low, high, _) in zip(spec.regions, inner, strict=True)
        ]
        conjunctions = [(g, rows) for g, region in enumerate(spec.regions) for rows in region.unsafe]
        weights: dict[tuple[int, ...], int] = {}
        asked: list[dict[int, float]] = []
        for _, rows in conjunctions:
            asked.append({})
            for row in rows:
                vector, bound = _whole(row, classes)
                u = weights.setdefault(vector, len(weights))
                asked[-1][u] = min(asked[-1].get(u, np.inf), bound)
        bounds = torch.full((len(asked), max(len(weights), 1)), torch.inf, dtype=torch.float64)
        for c, entries in enumerate(asked):
            for u, bound in entries.items():
                bounds[c, u] = bound
        return Cases(
            spec=spec,
            inner_low=_stack([low for low, _, _ in inner]),
            inner_high=_stack([high for _, high, _ in inner]),
            barren=torch.tensor([barren for _, _, barren in inner]),
            low=_stack([low for low, _ in outer]),
            high=_stack([high for _, high in outer]),
            rows=torch.tensor([list(vector) for vector in weights] or [[0] * classes], dtype=torch.float64),
            bounds=bounds,
            region=torch.tensor([g for g, _ in conjunctions]),
        )

    def witnessed(self, x: Array, y: Array) -> bool:
        """Whether x float32 [n] lies in a region and y float32 [K] meets one of its conjunctions, without rounding."""
        outputs = [Fraction(float(value)) for value in y] if np.isfinite(y).all() else None
        return outputs is not None and any(
            self._inside(g, x) and any(all(row.holds(outputs) for row in rows) for rows in region.unsafe)
            for g, region in enumerate(self.spec.regions)
        )

    def _inside(self, g: int, x: Array) -> bool:
        low, high = self.inner_low[g].numpy(), self.inner_high[g].numpy()
        return not self.barren[g] and bool((low <= x).all() and (x <= high).all())


def _stack(parts: list[Array]) -> Tensor:
    return torch.from_numpy(np.stack(parts))


def _inner(region: Region) -> tuple[Array, Array, bool]:
    """The float32 points inside each interval; the nearest float32 where an interval is too narrow to hold one, and
    whether one of those has an open side: that says plainly that a point beside it does not count."""
    low, high = _toward(region.low, 1), _toward(region.high, -1)
    for i, is_high in region.open_sides:
        ends, exact = (high, region.high) if is_high else (low, region.low)
        if Fraction(float(ends[i])) == exact[i]:
            ends[i] = np.nextafter(ends[i], np.float32(-np.inf if is_high else np.inf))
    middle = _nearest([(a + b) / 2 for a, b in zip(region.low, region.high, strict=True)])
    none = low > high
    barren = any(none[i] for i, _ in region.open_sides)
    return np.where(none, middle, low), np.where(none, middle, high), barren


def _nearest(values: Sequence[Fraction]) -> Array:
    if any(abs(value) >= _LARGEST for value in values):
        raise InputError("the specification bounds an input by a number that is infinite in float32")
    return np.array([float(value) for value in values], np.float64).astype(np.float32)


def _toward(values: Sequence[Fraction], side: int) -> Array:
    """The nearest float32 that is not below (side 1) or not above (side -1) each value."""
    found = _nearest(values)
    gap = side * (found.astype(np.float64) - np.array([float(value) for value in values]))
    short = gap < 0
    for i in np.flatnonzero(gap == 0).tolist():  # float64 may have rounded the value to this very number
        short[i] = side * Fraction(float(found[i])) < side * values[i]
    return np.where(short, np.nextafter(found, np.float32(side * np.inf)), found)


def _outward(values: Sequence[Fraction], side: int, inner: Array) -> Array:
    found = _toward(values, side)
    return np.maximum(found, inner) if side > 0 else np.minimum(found, inner)


def _whole(row: Row, classes: int) -> tuple[tuple[int, ...], float]:
    """The row scaled to whole numbers, which float64 holds exactly, and its bound rounded up."""
    scale = lcm(*(weight.denominator for _, weight in row.weights))
    shared = gcd(*(int(weight * scale) for _, weight in row.weights))
    vector = [0] * classes
    for k, weight in row.weights:
        vector[k] = int(weight * scale) // shared
        if abs(vector[k]) > _EXACT:
            raise InputError(f"the factor {shown(weight)} of Y_{k} has more digits than float64 holds; round it")
    exact = row.bound * scale / shared
    if exact > sys.float_info.max:  # no float64 is above it: every output that is a number meets the row
        return tuple(vector), math.inf
    bound = float(max(exact, Fraction(-sys.float_info.max)))
    return tuple(vector), bound if Fraction(bound) >= exact else float(np.nextafter(bound, np.inf))
