"""McNemar's exact test against counting by hand."""

import itertools
from fractions import Fraction
from math import comb

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.paired import mcnemar
from stages.finding import binomial_tail  # type: ignore[attr-defined, unused-ignore]

_COUNTS = st.integers(min_value=0, max_value=400)


@pytest.mark.parametrize("n", range(11))
def test_mcnemar_equals_the_share_of_all_coin_tosses(n: int) -> None:
    tosses = [sum(toss) for toss in itertools.product((0, 1), repeat=n)]
    for lost in range(n + 1):
        assert mcnemar(lost, n - lost) == sum(heads >= lost for heads in tosses) / len(tosses)


@given(_COUNTS, _COUNTS)
def test_mcnemar_equals_the_exact_fraction(lost: int, won: int) -> None:
    n = lost + won
    assert mcnemar(lost, won) == float(Fraction(sum(comb(n, k) for k in range(lost, n + 1)), 2**n))


@given(_COUNTS, _COUNTS)
def test_mcnemar_falls_with_losses_and_rises_with_gains(lost: int, won: int) -> None:
    assert mcnemar(lost + 1, won) <= mcnemar(lost, won) <= mcnemar(lost, won + 1)


@given(_COUNTS, _COUNTS)
def test_mcnemar_of_both_directions_counts_the_observed_case_twice(lost: int, won: int) -> None:
    both = mcnemar(lost, won) + mcnemar(won, lost)
    assert both == pytest.approx(1 + comb(lost + won, lost) / 2 ** (lost + won), rel=1e-12)


def test_mcnemar_takes_counts_of_a_large_test_split() -> None:
    assert mcnemar(0, 70_000) == 1
    assert mcnemar(70_000, 0) == 0  # below the smallest float, not an error
    assert 0.5 < mcnemar(20_000, 20_000) < 0.51


def test_mcnemar_refuses_negative_counts() -> None:
    with pytest.raises(ValueError, match=r"expected counts >= 0, got -1 lost and 2 won"):
        mcnemar(-1, 2)


@given(lost=_COUNTS, won=_COUNTS)
def test_the_libraries_own_copy_says_the_same(lost: int, won: int) -> None:
    """Stage libraries may not import the line; what both need exists twice, and equal."""
    assert binomial_tail(lost, lost + won) == mcnemar(lost, won)
