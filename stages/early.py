"""A gate's verdict before every image has its own: attack all a little, then some of the rest with everything."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from pipeline.core.measurement import wilson
from stages.evaluate import OnStep
from stages.sequential import Draws

_FIRST = 16
_OPENING = 256


@dataclass(frozen=True, slots=True)
class Demand:
    """At least `needed` of all images must stand; the answer is wanted at this confidence, in (0.5, 1)."""

    needed: int
    confidence: float

    @staticmethod
    def of(bound: float, total: int, confidence: float) -> "Demand":
        """The least number of standing images whose 95 % interval lies above a gate's bound; total + 1 where none."""
        found = (count for count in range(total + 1) if wilson(count, total)[0] >= bound)
        return Demand(next(found, total + 1), confidence)

    @staticmethod
    def share(bound: float, total: int, confidence: float) -> "Demand":
        """The least number of standing images that is the share `bound` of all, its interval left aside."""
        return Demand(next(count for count in range(total + 1) if count / total >= bound), confidence)


@dataclass(frozen=True, slots=True)
class Early:
    """`met` is what all attacks on all images would say, wrongly with probability at most 1 - confidence.

    `low` and `high` count the images that stand: with the same confidence the number of all that would is between
    them, and `value` is the estimate. `open` bool [N] marks images that not all attacks tried and none broke.
    """

    met: bool
    low: int
    high: int
    value: float
    open: Tensor

    def interval(self) -> tuple[float, float, float]:
        """Shares of all N images: the value, and a 95 % interval that allows for the open ones at both ends."""
        total = len(self.open)
        value = self.value / total
        return value, min(wilson(self.low, total)[0], value), max(wilson(self.high, total)[1], value)


Strike = Callable[[Tensor, int], Tensor]
"""(rows bool [N], number of the call) -> survived bool [N]."""


def early(
    rows: Tensor, sure: int, demand: Demand, opening: Strike, rest: Strike, rng: Generator, on_step: OnStep
) -> Early:
    """Do at least `demand.needed` images stand, when `sure` of them do and `rows`, bool [N], may be attacked?

    1. `opening`, one quick attack, strikes all rows in random order, until so many are broken that the demand cannot be
       met, whatever the others say.
    2. `rest`, all other attacks, strikes the survivors in random order, until the count that the drawn ones tell of all
       survivors (`Draws`) lies on one side of the demand.

    What comes out in the first step is certain; so is what comes out when everything was drawn. The number of survivors
    at the moment of stopping is somewhat biased as an estimate; the interval is not touched by that.
    """
    order = _shuffled(rows, rng)
    left = rows.clone()
    for number, at in enumerate(range(0, len(order), _OPENING)):
        if sure >= demand.needed or sure + int(left.sum()) < demand.needed:
            break
        chunk = _mask(rows, order[at : at + _OPENING])
        left &= opening(chunk, number) | ~chunk
    else:
        return _drawn(left, sure, demand, rest, rng, on_step)
    return Early(sure >= demand.needed, sure, sure + int(left.sum()), float(sure), left)


def _drawn(left: Tensor, sure: int, demand: Demand, rest: Strike, rng: Generator, on_step: OnStep) -> Early:
    """The second step: `left` bool [N] survived the opening."""
    order = _shuffled(left, rng)
    draws = Draws(len(order), 1 - demand.confidence)
    undecided, drawn, hits, number = left.clone(), 0, 0, 0
    low, high = draws.interval(0, 0)
    while sure + low < demand.needed <= sure + high:
        chunk = _mask(left, order[drawn : drawn + max(_FIRST, drawn // 4)])
        hits += int((rest(chunk, number) & chunk).sum())
        undecided &= ~chunk
        drawn, number = drawn + int(chunk.sum()), number + 1
        low, high = draws.interval(hits, drawn)
        on_step(drawn, len(order))
    share = hits / drawn if drawn else 0.0
    value = min(max(sure + share * len(order), sure + low), sure + high)
    return Early(sure + low >= demand.needed, sure + low, sure + high, value, undecided)


def _shuffled(rows: Tensor, rng: Generator) -> Tensor:
    places = rows.nonzero().flatten()
    return places[torch.randperm(len(places), generator=rng, device=rng.device).to(places.device)]


def _mask(like: Tensor, places: Tensor) -> Tensor:
    mask = torch.zeros_like(like)
    mask[places] = True
    return mask
