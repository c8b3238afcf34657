"""Sines and cosines of intervals: the values at the ends, and 1 or -1 where the interval holds a crest or a trough."""

import math
from typing import Any

import torch
from torch import Tensor

from stages.bounds._interval import Interval, Rounding
from stages.bounds._trace import Op

_CREST = {"sin": math.pi / 2, "cos": 0.0}
_FAR = 2.0**13  # beyond it libraries may reduce their argument with fewer digits
_NEAR = 2.0**-30  # what an interval that ends this close to a crest (relative to its own size) is taken to hold


def wave(op: Op, args: tuple[Any, ...], kwargs: dict[str, Any], rounding: Rounding) -> Interval:
    """Libraries are taken to be right within 14 units of 2, and to stay in [-1, 1] up to that."""
    del kwargs
    x: Interval = args[0]
    ends = op.target(x.low), op.target(x.high)
    crest = _CREST[op.kind]
    far = x.size() > _FAR
    high = torch.where(_holds(x, crest) | far, 1.0, torch.maximum(*ends))
    low = torch.where(_holds(x, crest + math.pi) | far, -1.0, torch.minimum(*ends))
    return rounding.elementary(low, high, torch.ones_like(low))


def _holds(x: Interval, place: float) -> Tensor:
    """Whether some place + 2 pi k, k whole, lies inside, or next to it."""
    near = _NEAR * (1 + x.size().double())
    first, last = (x.low.double() - near - place) / math.tau, (x.high.double() + near - place) / math.tau
    return first.ceil() <= last.floor()


RULES = dict.fromkeys(_CREST, wave)
