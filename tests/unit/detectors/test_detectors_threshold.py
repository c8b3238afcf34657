"""The threshold: ranks by hand, coverage by enumeration and simulation, what is refused."""

import math

import pytest
import torch

from stages.detectors._threshold import _beta_quantile, _masses, at_rate
from stages.method import InputError
from stages.seeding import generator


@pytest.mark.parametrize(
    ("n", "rate", "rank"), [(19, 0.05, 19), (20, 0.05, 20), (39, 0.05, 38), (99, 0.1, 90), (1, 0.5, 1)]
)
def test_the_rank_is_the_conservative_one(n: int, rate: float, rank: int) -> None:
    scores = torch.arange(1, n + 1, dtype=torch.float32)[torch.randperm(n, generator=generator(0))]
    found = at_rate(scores, rate)
    assert (found.rank, found.value, found.samples, found.rate) == (rank, rank, n, rate)
    assert 1 - rank / (n + 1) <= rate + 1e-12 < 1 - (rank - 1) / (n + 1)
    assert int((scores > found.value).sum()) == n - rank


def test_the_intervals_hold_what_they_promise_in_simulation() -> None:
    """Uniform scores: the true rate of false alarms of a threshold t is 1 - t, the true quantile 1 - rate."""
    rng, rate, n, tries = generator(1), 0.1, 60, 800
    quantile, alarms, mean = 0, 0, 0.0
    for _ in range(tries):
        found = at_rate(torch.rand(n, generator=rng, dtype=torch.float64), rate)
        quantile += found.low <= 1 - rate <= found.high
        alarms += found.alarms_low <= 1 - found.value <= found.alarms_high
        mean += (1 - found.value) / tries
    spread = math.sqrt(0.95 * 0.05 / tries)
    assert quantile / tries >= 0.95 - 3 * spread
    assert abs(alarms / tries - 0.95) <= 3 * spread
    assert mean <= rate + 3 * math.sqrt(rate * (1 - rate) / n / tries)


def test_the_beta_quantile_is_exact_where_it_is_known() -> None:
    for share in (0.025, 0.5, 0.975):
        assert _beta_quantile(share, 1, 1) == pytest.approx(share)
        assert _beta_quantile(share, 1, 7) == pytest.approx(1 - (1 - share) ** (1 / 7))
        assert _beta_quantile(share, 9, 1) == pytest.approx(share ** (1 / 9))


def test_the_masses_are_the_binomials() -> None:
    n, p = 9, 0.3
    assert _masses(n, p, n + 1) == pytest.approx([math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(n + 1)])


def test_ties_never_raise_the_rate() -> None:
    scores = torch.tensor([0.0] * 50 + [1.0] * 50)
    assert at_rate(scores, 0.4).value == 1.0
    assert at_rate(scores, 0.6).value == 0.0


def test_too_few_images_and_scores_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(InputError, match=r"false_alarms = 0.05 asks for 19 hold-out images or more, got 18"):
        at_rate(torch.rand(18, generator=generator(0)), 0.05)
    at_rate(torch.rand(19, generator=generator(0)), 0.05)
    with pytest.raises(InputError, match="asks for 1 hold-out images or more, got 0"):
        at_rate(torch.zeros(0), 0.5)
    with pytest.raises(InputError, match="not finite"):
        at_rate(torch.tensor([0.1, float("nan")]), 0.5)
