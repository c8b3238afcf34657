"""A share of a finite set judged while it is being counted: limits that hold at whatever moment one stops to look."""

import math
from dataclasses import dataclass

_PRIOR = (9.0, 1.0)


@dataclass(frozen=True, slots=True)
class Draws:
    """How many of `population` images stand, of which some were drawn in random order, without replacement.

    After n draws with h hits, a count m is refuted where the draws are unlikely under it, compared with their mean
    likelihood over all counts under a beta-binomial(a, b) prior:

        M_n(m) = [B(a + h, b + n - h) / B(a, b)] C(N, m) / C(N - n, m - h) >= 1 / error.

    M_n(m) is a non-negative martingale of mean 1 where m is true, so by Ville's inequality the true count is ever
    refuted with probability at most `error`, however often one looks. What was counted is never in doubt: m >= h and
    m <= N - (n - h), so after the last draw only the true count is left. The prior (9, 1) expects nine in ten to stand,
    as most images do that a first attack left; another prior costs speed, never validity.

    Source: Waudby-Smith and Ramdas 2020 (prior-posterior ratios, sampling without replacement), Ville 1939;
    from memory.
    """

    population: int
    error: float

    def __post_init__(self) -> None:
        if self.population < 0 or not 0 < self.error < 1:
            raise ValueError(f"draws: expected population >= 0 and 0 < error < 1, got {self.population}, {self.error}")

    def interval(self, hits: int, drawn: int) -> tuple[int, int]:
        """The least and the greatest count that is not refuted; raises `ValueError` for counts that cannot be."""
        if not 0 <= hits <= drawn <= self.population:
            raise ValueError(f"draws: expected 0 <= hits <= drawn <= {self.population}, got {hits} of {drawn}")
        first, last = hits, self.population - (drawn - hits)
        if drawn == 0:
            return first, last
        # The likelihood rises up to its peak and falls after it, so what is refuted lies at the two ends.
        peak = min(last, max(first, (self.population + 1) * hits // drawn))
        return self._edge(hits, drawn, peak, first), self._edge(hits, drawn, peak, last)

    def _edge(self, hits: int, drawn: int, inside: int, end: int) -> int:
        """The count between the likeliest one and the end of the range that is farthest out and not refuted."""
        limit = math.log(1 / self.error)
        if self._evidence(hits, drawn, end) < limit:
            return end
        while abs(end - inside) > 1:
            middle = (inside + end) // 2
            if self._evidence(hits, drawn, middle) >= limit:
                end = middle
            else:
                inside = middle
        return inside

    def _evidence(self, hits: int, drawn: int, count: int) -> float:
        """log M_n(count)."""
        a, b = _PRIOR
        prior = _log_beta(a + hits, b + drawn - hits) - _log_beta(a, b)
        return prior + _log_choose(self.population, count) - _log_choose(self.population - drawn, count - hits)


def _log_beta(a: float, b: float) -> float:
    return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
