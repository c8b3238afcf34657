"""Functions of intervals that rise and fall: the values at the ends, and what a crest or a trough inside adds."""

import math
from collections.abc import Callable
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


def _dip(exact: float, tanh: float | None = None) -> Callable[..., Interval]:
    """A rule for a function that falls until `exact` and rises after it; `tanh` is the place for approximate="tanh"."""

    def rule(op: Op, args: tuple[Any, ...], kwargs: dict[str, Any], rounding: Rounding) -> Interval:
        x: Interval = args[0]
        bottom = tanh if tanh is not None and kwargs.get("approximate") == "tanh" else exact
        nearest = torch.minimum(torch.maximum(x.low, torch.full_like(x.low, bottom)), x.high)
        left, right = op.target(x.low, **kwargs), op.target(x.high, **kwargs)
        return rounding.elementary(op.target(nearest, **kwargs), torch.maximum(left, right), x.size())

    return rule


# Where SiLU and GELU are lowest, to 1e-12; the values there are flat, so the error in the value is far below 1e-20.
RULES = {
    **dict.fromkeys(_CREST, wave),
    "silu": _dip(-1.278464542761),
    "hardswish": _dip(-1.5),
    "gelu": _dip(-0.751791524694, tanh=-0.752461422071),
}
