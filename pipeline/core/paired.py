"""The exact paired test on hits of the same examples, in integers, so that no count is too large for it."""


def mcnemar(lost: int, won: int) -> float:
    """One-sided exact p-value that accuracy fell: P(X >= lost) for X ~ Bin(lost + won, 1/2).

    `lost` examples were right before and are wrong now, `won` the other way round; examples on which both agree carry
    no information. Without any change the p-value is 1. Raises `ValueError` on negative counts.
    Source: McNemar 1947, in the exact conditional form.
    """
    if lost < 0 or won < 0:
        raise ValueError(f"mcnemar: expected counts >= 0, got {lost} lost and {won} won")
    n = lost + won
    # P(X >= lost) = P(X <= won) by symmetry; the shorter tail is summed, as an exact integer over 2^n.
    if won <= lost:
        return _lower_tail(n, won) / (1 << n)
    return ((1 << n) - _lower_tail(n, lost - 1)) / (1 << n)


def _lower_tail(n: int, k: int) -> int:
    """Sum of C(n, i) over i = 0..k; 0 where k < 0."""
    term, total = 1, 0
    for i in range(k + 1):
        total += term
        term = term * (n - i) // (i + 1)
    return total
