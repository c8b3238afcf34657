"""Normalisation by stored statistics: a factor and a shift for each channel."""

from typing import Any

import torch
from torch import Tensor

from stages.bounds._interval import TINY, Interval, Rounding

TERMS = 8  # roundings of one result


def scale(args: tuple[Any, ...]) -> Tensor:
    """[C]: what each channel is multiplied by."""
    _, weight, _, _, var, _, eps = args
    found: Tensor = (var + eps).rsqrt() if weight is None else weight * (var + eps).rsqrt()
    return found


def size(args: tuple[Any, ...]) -> Tensor:
    """[C]: no less than the shift's parts."""
    bias, mean = args[2], args[3]
    found: Tensor = (mean * scale(args)).abs()
    return found if bias is None else found + bias.abs()


def interval(args: tuple[Any, ...], rounding: Rounding) -> tuple[Interval, Tensor, Tensor]:
    """y = s x + t is off by a share of |s x| + |t| <= |y| + 2 |t|; y + share |y| rises with y: each end pays for all.

    Of `share` one tenth more pays for what it loses itself.
    """
    x, _, bias, mean, *_ = args
    shape = -1, *(1,) * (x.low.dim() - 2)
    factor = scale(args)
    shift = -mean * factor if bias is None else bias - mean * factor
    share = rounding.share(TERMS)
    room = 2.1 * share * size(args) + TINY
    low, high = x.low, x.high
    if bool((factor < 0).any()):
        falls = (factor < 0).view(shape)
        low, high = torch.where(falls, x.high, x.low), torch.where(falls, x.low, x.high)
    less, more = 1 - 1.1 * share, 1 + 1.1 * share
    low = torch.addcmul((less * (shift - room)).view(shape), low, (less * factor).view(shape))
    high = torch.addcmul((more * (shift + room)).view(shape), high, (more * factor).view(shape))
    return Interval.apart(low, high, 1.1 * share), factor.new_empty(0), factor.new_empty(0)
