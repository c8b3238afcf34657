"""Limits that hold at every moment: checked by exact counting over all orders, and against closed forms."""

import math
from fractions import Fraction

import pytest

from stages.sequential import Draws


def ever_refuted(population: int, standing: int, error: float) -> float:
    """Probability that the true count is ever refuted, over all orders, by counting paths exactly."""
    judge = Draws(population, error)
    alive, gone = {0: 1.0}, 0.0
    for n in range(1, population + 1):
        ahead: dict[int, float] = {}
        for hits, chance in alive.items():
            left = population - (n - 1)
            for more, ways in ((1, standing - hits), (0, left - (standing - hits))):
                if ways > 0:
                    ahead[hits + more] = ahead.get(hits + more, 0.0) + chance * ways / left
        alive = {}
        for hits, chance in ahead.items():
            low, high = judge.interval(hits, n)
            if low <= standing <= high:
                alive[hits] = chance
            else:
                gone += chance
    return gone


@pytest.mark.parametrize("population", [20, 60])
@pytest.mark.parametrize("error", [0.05, 0.2])
def test_the_true_count_is_ever_refuted_with_at_most_the_error(population: int, error: float) -> None:
    refuted = [ever_refuted(population, standing, error) for standing in range(population + 1)]
    assert max(refuted) <= error
    assert max(refuted) > 0  # the promise is used, not kept by never deciding


def test_a_fixed_interval_looked_at_every_time_would_break_that_promise() -> None:
    """Why the plain one will not do: refute at 1.96 standard errors of drawing without replacement, after each draw."""
    population, standing = 200, 100
    alive, gone = {0: 1.0}, 0.0
    for n in range(1, population):
        ahead: dict[int, float] = {}
        for hits, chance in alive.items():
            left = population - (n - 1)
            for more, ways in ((1, standing - hits), (0, left - (standing - hits))):
                ahead[hits + more] = ahead.get(hits + more, 0.0) + chance * ways / left
        spread = 1.96 * math.sqrt(0.25 / n * (population - n) / (population - 1))
        out = {hits for hits in ahead if abs(hits / n - 0.5) > spread}
        gone += sum(ahead[hits] for hits in out)
        alive = {hits: chance for hits, chance in ahead.items() if hits not in out}
    assert gone > 0.3


def martingale(population: int, hits: int, drawn: int, count: int) -> Fraction:
    """M_n by its definition: mean likelihood of one order under the prior (a = 9, b = 1), over the count's own."""

    def order(m: int) -> Fraction:
        if not hits <= m <= population - (drawn - hits):
            return Fraction(0)
        return Fraction(math.comb(population - drawn, m - hits), math.comb(population, m))

    def prior(m: int) -> Fraction:  # C(N, m) B(m + 9, N - m + 1) / B(9, 1)
        beta = Fraction(math.factorial(m + 8) * math.factorial(population - m), math.factorial(population + 9))
        return 9 * math.comb(population, m) * beta

    return sum((prior(m) * order(m) for m in range(population + 1)), Fraction(0)) / order(count)


@pytest.mark.parametrize(("hits", "drawn"), [(9, 10), (3, 10), (10, 10), (0, 4), (29, 29)])
def test_the_edges_are_where_the_martingale_crosses_one_over_the_error(hits: int, drawn: int) -> None:
    population, error = 30, 0.05
    low, high = Draws(population, error).interval(hits, drawn)
    kept = [
        m
        for m in range(hits, population - (drawn - hits) + 1)
        if martingale(population, hits, drawn, m) < Fraction(1) / Fraction(str(error))
    ]
    assert (low, high) == (kept[0], kept[-1])
    assert kept == list(range(low, high + 1))


def test_nothing_is_refuted_before_and_all_but_the_truth_after() -> None:
    assert Draws(40, 0.01).interval(0, 0) == (0, 40)
    assert Draws(40, 0.01).interval(17, 40) == (17, 17)
    assert Draws(40, 0.01).interval(40, 40) == (40, 40)
    assert Draws(0, 0.01).interval(0, 0) == (0, 0)


def test_twenty_five_of_a_thousand_tell_four_in_five() -> None:
    """The speed that the product lives on: images that all stand settle a bound at 0.8 within 26 draws at 99 %."""
    judge = Draws(750, 0.01)
    settled = next(n for n in range(1, 751) if judge.interval(n, n)[0] >= 600)
    assert settled <= 27
    broken = next(n for n in range(1, 751) if judge.interval(0, n)[1] < 600)
    assert broken <= 15


def test_counts_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="expected 0 <= hits <= drawn <= 5, got 3 of 2"):
        Draws(5, 0.05).interval(3, 2)
    with pytest.raises(ValueError, match="0 < error < 1"):
        Draws(5, 1.0)
