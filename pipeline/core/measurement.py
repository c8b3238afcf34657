"""A number that can be gated on: value, 95 % interval, unit, sample count and the better direction."""

import math
from typing import Literal, Self

from pydantic import Field, model_validator

from pipeline.core.value import Value

_Z95 = 1.959963984540054

Unit = Literal["fraction", "ms", "s", "bytes", "count", "logit"]
Strength = Literal["quick", "standard"]
"""Of a set of attacks: standard only with the reference ensemble at its reference settings."""


class Measurement(Value):
    """One measured number; `low` and `high` bound it at 95 % confidence and equal it where it is exact.

    `under` says of an accuracy under attack how strong the attacks were, and is None for every other number.
    """

    name: str = Field(pattern=r"^[a-z0-9_]+(\.[a-z0-9_]+)*$")
    value: float
    low: float
    high: float
    unit: Unit
    samples: int = Field(ge=1)
    better: Literal["higher", "lower"]
    under: Strength | None = None

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not self.low <= self.value <= self.high:
            raise ValueError(f"{self.name}: expected low <= value <= high, got {self.low}, {self.value}, {self.high}")
        return self


def fraction(name: str, hits: int, total: int, under: Strength | None = None) -> Measurement:
    """A share of independent examples, with Wilson's score interval (Wilson 1927).

    Raises `ValueError` where `hits` is not within 0..`total` or `total` is 0.
    """
    low, high = wilson(hits, total)
    return Measurement(
        name=name, value=hits / total, low=low, high=high, unit="fraction", samples=total, better="higher", under=under
    )


def exact(name: str, value: float, unit: Unit, better: Literal["higher", "lower"] = "lower") -> Measurement:
    """A number without sampling error: a count, a size."""
    return Measurement(name=name, value=value, low=value, high=value, unit=unit, samples=1, better=better)


def wilson(hits: int, total: int) -> tuple[float, float]:
    """Wilson's 95 % score interval for a binomial share; it always contains hits/total and lies in [0, 1]."""
    if not 0 <= hits <= total or total == 0:
        raise ValueError(f"wilson: expected 0 <= hits <= total and total >= 1, got {hits} of {total}")
    share, z2 = hits / total, _Z95 * _Z95
    centre = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = _Z95 / (1 + z2 / total) * math.sqrt(share * (1 - share) / total + z2 / (4 * total * total))
    low = 0.0 if hits == 0 else max(0.0, centre - half)
    high = 1.0 if hits == total else min(1.0, centre + half)
    return min(low, share), max(high, share)
