"""Comparisons, logic and choices by them: bounds of where(c, x, y) with a condition c that the image decides.

A condition is an interval of 0 and 1: [1, 1] where it holds on all of the box, [0, 0] where it holds nowhere. Where it
is certain a choice is the value chosen, and so are its lines; elsewhere it lies between the ends of both.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from stages.bounds._interval import Interval, Rounding
from stages.bounds._trace import Op

_Ends = tuple[Tensor, Tensor]


def _equal(a: Interval, b: Interval) -> _Ends:
    single = (a.low == a.high) & (b.low == b.high)
    return single & (a.low == b.low), (a.low <= b.high) & (b.low <= a.high)


def _opposite(ends: _Ends) -> _Ends:
    return ~ends[1], ~ends[0]


# Whether it holds for all values in both intervals, and whether for any.
_COMPARED: dict[str, Callable[[Interval, Interval], _Ends]] = {
    "gt": lambda a, b: (a.low > b.high, a.high > b.low),
    "ge": lambda a, b: (a.low >= b.high, a.high >= b.low),
    "lt": lambda a, b: (a.high < b.low, a.low < b.high),
    "le": lambda a, b: (a.high <= b.low, a.low <= b.high),
    "eq": _equal,
    "ne": lambda a, b: _opposite(_equal(a, b)),
}


def _compared(op: Op, args: tuple[Any, ...], kwargs: dict[str, Any], rounding: Rounding) -> Interval:
    del kwargs, rounding
    like = next(arg.low for arg in args if isinstance(arg, Interval))
    a, b = (_whole(arg, like) for arg in args)
    return Interval(*(end.to(like.dtype) for end in _COMPARED[op.kind](a, b)))


def _logic(op: Op, args: tuple[Any, ...], kwargs: dict[str, Any], rounding: Rounding) -> Interval:
    del kwargs, rounding
    like = next(arg.low for arg in args if isinstance(arg, Interval))
    parts = [_whole(arg, like) for arg in args]
    if op.kind.endswith("_not"):
        return Interval(1 - parts[0].high, 1 - parts[0].low)
    pick = torch.minimum if op.kind.endswith("_and") else torch.maximum
    return Interval(pick(parts[0].low, parts[1].low), pick(parts[0].high, parts[1].high))


def choice(args: tuple[Any, ...]) -> Interval:
    """where(c, x, y) with an interval for c."""
    condition, like = args[0], args[0].low
    x, y = (_whole(arg, like) for arg in args[1:])
    sure, never = condition.low > 0, condition.high <= 0
    low = torch.where(sure, x.low, torch.where(never, y.low, torch.minimum(x.low, y.low)))
    high = torch.where(sure, x.high, torch.where(never, y.high, torch.maximum(x.high, y.high)))
    return Interval(low, high)


def lines(
    op: Op, args: tuple[Any, ...], result: Interval, kind: torch.dtype
) -> tuple[dict[str, _Ends], Tensor, Tensor]:
    """Slopes and intercepts of a choice: of the value chosen where that is certain, else the interval's ends."""
    condition = args[0]
    sure, never = condition.low > 0, condition.high <= 0
    low, high = result.low.double(), result.high.double()
    slopes: dict[str, _Ends] = {}
    for place, chosen in ((1, sure.expand(low.shape)), (2, never.expand(low.shape))):
        if isinstance(args[place], Interval):
            name, share = op.args[place].name, chosen.to(kind)
            share = share + slopes[name][0] if name in slopes else share
            slopes[name] = share, share
            low, high = torch.where(chosen, 0.0, low), torch.where(chosen, 0.0, high)
    return slopes, low, high


def _whole(value: Any, like: Tensor) -> Interval:
    if isinstance(value, Interval):
        return value
    exact = torch.as_tensor(value, device=like.device).double()
    near = torch.stack([exact, exact.float().double()])  # a float32 network may compare with either
    return Interval(near.amin(0).to(like.dtype), near.amax(0).to(like.dtype))


_WORDS = ("logical_and", "logical_or", "logical_not", "bitwise_and", "bitwise_or", "bitwise_not")
RULES = {**dict.fromkeys(_COMPARED, _compared), **dict.fromkeys(_WORDS, _logic)}
