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
from stages.verification.vnnlib import Number, Region, Row, Spec, shown

Array = npt.NDArray[np.float32]
_EXACT = 1 << 53
_LARGEST = 2.0**128 - 2.0**103  # from here on float32 rounds to infinity


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
        outer_low, inner_low = _ends([region.low for region in spec.regions], spec.inputs)
        inner_high, outer_high = _ends([region.high for region in spec.regions], spec.inputs)
        low, high, barren = _inner(spec.regions, inner_low, inner_high)
        conjunctions = [(g, rows) for g, region in enumerate(spec.regions) for rows in region.unsafe]
        weights: dict[tuple[int, ...], int] = {}
        asked: list[dict[int, float]] = []
        for _, rows in conjunctions:
            asked.append({})
            for row in rows:
                vector, bound = _whole(row, classes)
                u = weights.setdefault(vector, len(weights))
                asked[-1][u] = min(asked[-1].get(u, np.inf), bound)
        bounds = np.full((len(asked), max(len(weights), 1)), np.inf)
        for c, entries in enumerate(asked):
            for u, bound in entries.items():
                bounds[c, u] = bound
        return Cases(
            spec=spec,
            inner_low=torch.from_numpy(low),
            inner_high=torch.from_numpy(high),
            barren=torch.from_numpy(barren),
            low=torch.from_numpy(np.minimum(outer_low, low)),
            high=torch.from_numpy(np.maximum(outer_high, high)),
            rows=torch.tensor([list(vector) for vector in weights] or [[0] * classes], dtype=torch.float64),
            bounds=torch.from_numpy(bounds),
            region=torch.tensor([g for g, _ in conjunctions], dtype=torch.int64),
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


def _inner(regions: Sequence[Region], low: Array, high: Array) -> tuple[Array, Array, npt.NDArray[np.bool_]]:
    """The float32 points inside each interval; the nearest float32 where an interval is too narrow to hold one, and
    whether one of those has an open side: that says plainly that a point beside it does not count."""
    for g, region in enumerate(regions):
        for i, is_high in region.open_sides:
            ends, exact = (high, region.high) if is_high else (low, region.low)
            if float(ends[g, i]) == exact[i]:
                ends[g, i] = np.nextafter(ends[g, i], np.float32(-np.inf if is_high else np.inf))
    none = low > high
    barren = np.array([any(none[g, i] for i, _ in region.open_sides) for g, region in enumerate(regions)], np.bool_)
    for g, i in np.argwhere(none).tolist():
        middle = (Fraction(regions[g].low[i]) + Fraction(regions[g].high[i])) / 2
        low[g, i] = high[g, i] = np.float32(float(middle))
    return low, high, barren


def _ends(values: Sequence[Sequence[Number]], inputs: int) -> tuple[Array, Array]:
    """The largest float32 that is not above each value, and the smallest that is not below it."""
    place: dict[int, int] = {}
    once: list[Number] = []  # large files repeat few numbers, which are read as the same object
    for row in values:
        for value in row:
            if place.setdefault(id(value), len(once)) == len(once):
                once.append(value)
    near = np.array([_float(value) for value in once], np.float64)
    if (np.abs(near) >= _LARGEST).any():
        raise InputError("the specification bounds an input by a number that is infinite in float32")
    found = near.astype(np.float32)
    gap = found.astype(np.float64) - near
    for k in np.flatnonzero(gap == 0).tolist():  # float64 may have rounded the value to this very number
        gap[k] = float(float(found[k]) > once[k]) - float(float(found[k]) < once[k])
    down = np.where(gap > 0, np.nextafter(found, np.float32(-np.inf)), found)
    up = np.where(gap < 0, np.nextafter(found, np.float32(np.inf)), found)
    at = np.array([[place[id(value)] for value in row] for row in values], np.int64).reshape(-1, inputs)
    return down[at], up[at]


def _float(value: Number) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf


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
