"""Shares judged while they are being counted: intervals that hold at whatever moment one stops to look."""

import math
from dataclasses import dataclass

_HALVINGS = 60


@dataclass(frozen=True, slots=True)
class Sequential:
    """Is a share at least `bound`? Examples come in random order; the answer may be given at any time.

    After n examples with h hits, a share p is refuted where the mean likelihood over all shares beats its own:

        M_n(p) = B(h + 1, n - h + 1) / (p^h (1 - p)^(n - h)) >= 1 / error

    M_n(p) is a non-negative martingale of mean 1 where p is true, so by Ville's inequality the true share is ever
    refuted with probability at most `error`, however often one looks. The shares not refuted form an interval around
    h / n; it is wider than one for a fixed n, which is the price of looking.

    Source: Robbins 1970 (mixture martingales), Ville 1939. The examples are taken for independent draws; drawing
    without replacement from a finite test set only makes the interval wider than it had to be.
    """

    bound: float
    error: float = 0.05

    def interval(self, hits: int, total: int) -> tuple[float, float]:
        """The shares that are not refuted, [0, 1] where nothing was counted; raises `ValueError` for hits > total."""
        if not 0 <= hits <= total:
            raise ValueError(f"sequential: expected 0 <= hits <= total, got {hits} of {total}")
        if total == 0:
            return 0.0, 1.0
        share = hits / total
        low = 0.0 if hits == 0 else self._edge(hits, total, 0.0, share)
        high = 1.0 if hits == total else self._edge(hits, total, 1.0, share)
        return low, high

    def verdict(self, hits: int, total: int) -> bool | None:
        """True: at least the bound; False: less; None: not certain yet."""
        low, high = self.interval(hits, total)
        return True if low >= self.bound else False if high < self.bound else None

    def _edge(self, hits: int, total: int, outside: float, inside: float) -> float:
        """Where log M_n crosses log(1 / error), between a refuted share and one that is not; the refuted side of it."""
        for _ in range(_HALVINGS):
            middle = (outside + inside) / 2
            if self._evidence(hits, total, middle) >= math.log(1 / self.error):
                outside = middle
            else:
                inside = middle
        return outside

    @staticmethod
    def _evidence(hits: int, total: int, share: float) -> float:
        """log M_n(share)."""
        beta = math.lgamma(hits + 1) + math.lgamma(total - hits + 1) - math.lgamma(total + 2)
        return beta - hits * math.log(share) - (total - hits) * math.log1p(-share)


def settled(hits: int, asked: int, total: int, bound: float) -> bool | None:
    """What all `total` examples will say of the bare share, known after `asked`: it passes whatever comes, or fails.

    None while the rest could turn it. No confidence is involved: the share of all of them is what it will be.
    """
    if hits >= bound * total:
        return True
    return False if hits + total - asked < bound * total else None
