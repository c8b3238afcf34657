"""Intervals that hold at every moment: checked by exact counting over all paths, and against closed forms."""

import math
from fractions import Fraction

import pytest

from stages.sequential import Sequential, settled


def ever_refuted(share: float, error: float, steps: int) -> float:
    """Probability that the true share leaves the interval at some time up to `steps`, by counting paths exactly."""
    judge = Sequential(bound=0.5, error=error)
    alive = {0: 1.0}
    gone = 0.0
    for n in range(1, steps + 1):
        ahead: dict[int, float] = {}
        for hits, chance in alive.items():
            for more, weight in ((1, share), (0, 1 - share)):
                ahead[hits + more] = ahead.get(hits + more, 0.0) + chance * weight
        alive = {}
        for hits, chance in ahead.items():
            low, high = judge.interval(hits, n)
            if low <= share <= high:
                alive[hits] = chance
            else:
                gone += chance
    return gone


@pytest.mark.parametrize(("share", "error"), [(0.5, 0.05), (0.8, 0.2), (0.97, 0.05)])
def test_the_true_share_is_refuted_at_any_time_with_at_most_the_error(share: float, error: float) -> None:
    assert 0 < ever_refuted(share, error, 120) <= error


def test_a_fixed_interval_looked_at_every_time_would_break_that_promise() -> None:
    """Why the plain one will not do: refute at 1.96 standard errors, look after every example."""
    alive, gone, share = {0: 1.0}, 0.0, 0.5
    for n in range(1, 201):
        ahead: dict[int, float] = {}
        for hits, chance in alive.items():
            for more in (0, 1):
                ahead[hits + more] = ahead.get(hits + more, 0.0) + chance / 2
        out = {hits for hits in ahead if abs(hits / n - share) > 1.96 * math.sqrt(share * (1 - share) / n)}
        gone += sum(ahead[hits] for hits in out)
        alive = {hits: chance for hits, chance in ahead.items() if hits not in out}
    assert gone > 0.3


def test_the_edges_are_where_the_martingale_is_one_over_the_error() -> None:
    judge = Sequential(bound=0.5, error=0.05)
    low, high = judge.interval(30, 40)
    beta = Fraction(math.factorial(30) * math.factorial(10), math.factorial(41))
    for edge in (low, high):
        assert float(beta) / (edge**30 * (1 - edge) ** 10) == pytest.approx(20, rel=1e-6)
    assert low < 0.75 < high


def test_all_hits_have_a_closed_form() -> None:
    """1 / ((n + 1) p^n) = 20 at p = (20 (n + 1))^(-1/n)^-1, that is p^n = 1 / (20 (n + 1))."""
    low, high = Sequential(bound=0.9).interval(50, 50)
    assert low == pytest.approx((1 / (20 * 51)) ** (1 / 50), rel=1e-9)
    assert high == 1.0
    assert Sequential(bound=0.9).interval(0, 0) == (0.0, 1.0)


def test_verdicts_come_early_where_the_share_is_far_from_the_bound() -> None:
    judge = Sequential(bound=0.6)
    passed = next(n for n in range(1, 1000) if judge.verdict(round(0.9 * n), n))
    failed = next(n for n in range(1, 1000) if judge.verdict(round(0.3 * n), n) is False)
    assert passed < 40
    assert failed < 40
    assert all(judge.verdict(round(0.6 * n), n) is None for n in range(1, 1000))


def test_settled_means_that_nothing_can_turn_it() -> None:
    assert settled(80, 85, 100, 0.8) is True
    assert settled(79, 85, 100, 0.8) is None
    assert settled(60, 81, 100, 0.8) is False
    assert settled(60, 80, 100, 0.8) is None
    with pytest.raises(ValueError, match="expected 0 <= hits <= total, got 3 of 2"):
        Sequential(bound=0.5).interval(3, 2)
