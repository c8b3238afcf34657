"""A threshold at a given rate of false alarms, as an order statistic, and what that says of the rate."""

import math
from itertools import accumulate

import torch
from pydantic import Field
from torch import Tensor

from stages.method import InputError, Value

_TAIL = 0.025


class Threshold(Value):
    """Flag where score > `value`, the `rank`-th smallest of the scores of `samples` clean images.

    `low` and `high` are order statistics that hold the score's true (1 - `rate`)-quantile between them at 95 %
    (`high` is the largest score where no order statistic is large enough). `alarms_low` and `alarms_high` hold the
    true rate of false alarms of this threshold at 95 %, over the draw of the images; with ties the rate is lower.
    """

    rate: float = Field(gt=0, lt=1)
    value: float
    low: float
    high: float
    rank: int = Field(ge=1)
    samples: int = Field(ge=1)
    alarms_low: float = Field(ge=0, le=1)
    alarms_high: float = Field(ge=0, le=1)


def at_rate(scores: Tensor, rate: float) -> Threshold:
    """The k-th smallest of N scores, k = ceil((N + 1) (1 - rate)).

    A further image of the same distribution then exceeds it with probability at most 1 - k / (N + 1) <= rate (exact
    where scores are continuous; at most, with ties), and the rate given these N images follows Beta(N + 1 - k, k).

    Source: split conformal prediction (Vovk et al. 2005; Lei et al. 2018, from memory); the quantile's interval is the
    sign test's (David and Nagaraja 2003, section 7.1, from memory). Departure from Xu et al. 2018, whose k is
    ceil(N (1 - rate)): theirs raises slightly more than `rate` false alarms on average.
    Raises `InputError` where a score is not finite, or where N < 1 / rate - 1, for then no score is large enough.
    """
    n = len(scores)
    if not bool(torch.isfinite(scores).all()):
        raise InputError("detector: the scores of the hold-out are not finite; did training diverge?")
    k = _ceil((n + 1) * (1 - rate))
    if n == 0 or k > n:
        raise InputError(
            f"detector: false_alarms = {rate:g} asks for {_ceil(1 / rate - 1)} hold-out images or more, got {n}; "
            "raise it, or hold out more (task.holdout)"
        )
    ordered = scores.double().sort().values
    first, last = _quantile_ranks(n, 1 - rate)
    return Threshold(
        rate=rate,
        value=float(ordered[k - 1]),
        low=float(ordered[min(first, k) - 1]),
        high=float(ordered[max(last, k) - 1]),
        rank=k,
        samples=n,
        alarms_low=_beta_quantile(_TAIL, n + 1 - k, k),
        alarms_high=_beta_quantile(1 - _TAIL, n + 1 - k, k),
    )


def _ceil(number: float) -> int:
    """The next whole number; 19.000000000000004 is 19."""
    return math.ceil(round(number, 9))


def _quantile_ranks(n: int, p: float) -> tuple[int, int]:
    """Ranks l <= u with P(s_(l) <= quantile_p <= s_(u)) >= 95 %: tails of Binomial(n, p) of at most 2.5 % each."""
    below = list(accumulate(_masses(n, p, n)))  # below[i]: P(Binomial <= i) = P(Binomial < i + 1)
    first = max((rank for rank in range(1, n + 1) if below[rank - 1] <= _TAIL), default=1)
    last = min((rank for rank in range(1, n + 1) if 1 - below[rank - 1] <= _TAIL), default=n)
    return first, last


def _masses(n: int, p: float, count: int) -> list[float]:
    """P(Binomial(n, p) = i) for i < count, 0 < p < 1."""
    whole, yes, no = math.lgamma(n + 1), math.log(p), math.log1p(-p)
    return [
        math.exp(whole - math.lgamma(i + 1) - math.lgamma(n - i + 1) + i * yes + (n - i) * no) for i in range(count)
    ]


def _beta_quantile(share: float, a: int, b: int) -> float:
    """The `share`-quantile of Beta(a, b), a and b whole, by bisection of I_p(a, b) = P(Binomial(a + b - 1, p) >= a)."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if 1 - math.fsum(_masses(a + b - 1, middle, a)) < share:
            low = middle
        else:
            high = middle
    return high
