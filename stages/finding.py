"""What a check found, and the shares it counts."""

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Finding:
    """One check: its name, whether it holds, and a sentence with the numbers."""

    name: str
    ok: bool
    text: str


@dataclass(frozen=True, slots=True)
class Point:
    """Robust accuracy of `total` examples at one radius or number of steps."""

    at: float
    hits: int
    total: int

    @property
    def value(self) -> float:
        return self.hits / self.total

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval, as `pipeline.core.measurement.wilson`."""
        z2, n, share = 1.959963984540054**2, self.total, self.value
        centre = (share + z2 / (2 * n)) / (1 + z2 / n)
        half = math.sqrt(z2 * (share * (1 - share) / n + z2 / (4 * n * n))) / (1 + z2 / n)
        return min(max(0.0, centre - half), share), max(min(1.0, centre + half), share)


def binomial_tail(hits: int, total: int) -> float:
    """P(X >= hits) for X the heads of `total` fair coins; 1 for no coins."""
    favourable: int = sum(math.comb(total, k) for k in range(hits, total + 1))
    return float(favourable / 2**total)
