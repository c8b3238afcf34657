"""Clopper-Pearson: the exact lower confidence bound on a share, from so many hits in so many trials."""

import math
from functools import cache

import torch

# More than rounding can do to the tail: lgamma of 1e7 is right to 1e-8, of which three are summed.
_SLACK = 1e-6
_MOST = 10_000_000


@cache
def lower_confidence(hits: int, trials: int, alpha: float) -> float:
    """The largest p with P(Bin(trials, p) >= hits) <= alpha, rounded down; 0 without a hit.

    Whatever the true share, the answer lies above it with probability alpha at most. The tail is summed term by term
    in float64 and held against alpha (1 - 1e-6), then p is found by bisection.

    Source: Clopper and Pearson 1934. Raises `ValueError` for hits beyond trials, or more than 10,000,000 trials.
    """
    if not 0 <= hits <= trials <= _MOST:
        raise ValueError(f"binomial: expected 0 <= hits <= trials <= {_MOST}, got {hits} of {trials}")
    if hits == 0:
        return 0.0
    k = torch.arange(hits, trials + 1, dtype=torch.float64)
    ways = math.lgamma(trials + 1) - torch.lgamma(k + 1) - torch.lgamma(trials - k + 1)
    wanted = math.log(alpha) + math.log1p(-_SLACK)

    def tail(p: float) -> float:
        return float(torch.logsumexp(ways + k * math.log(p) + (trials - k) * math.log1p(-p), 0))

    low, high = 0.0, hits / trials
    while (middle := (low + high) / 2) not in (low, high):
        low, high = (middle, high) if tail(middle) <= wanted else (low, middle)
    return low
