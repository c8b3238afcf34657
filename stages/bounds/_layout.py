"""Order in memory: images channels-last, where a processor's convolutions are quickest; and pages that stay."""

import ctypes
import math
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

_KEPT = ((-3, 2**25), (-1, 2**28))  # M_MMAP_THRESHOLD and M_TRIM_THRESHOLD of malloc.h, bytes


def trained(net: nn.Module) -> bool:
    """Whether gradients may be asked of the weights, which keeps everything as it is.

    torch 2.13 writes past its memory in the weight gradient of a channels-last 1x1 convolution with a stride and few
    input channels, on processors: seen with 1 to 5, not with 8 or more.
    """
    return torch.is_grad_enabled() and any(weight.requires_grad for weight in net.parameters())


def last(value: Any, wanted: bool = True) -> Any:
    """Images [B, C, H, W], and weights of that many dimensions, channels-last where `wanted`; the rest as it is.

    One channel lies alike in either order, and has the strides of the other one: with those of channels-last torch 2.13
    computes some convolutions wrongly on processors (stride (1, 2), one column of results).
    """
    if not (wanted and isinstance(value, Tensor) and value.dim() == 4):
        return value
    if value.shape[1] == 1:
        return value.contiguous().flatten().view(value.shape)
    return value.contiguous(memory_format=torch.channels_last)


def alike(value: Tensor, pattern: Tensor) -> Tensor:
    """[..., *shape] in the order in which `pattern` [*shape] lies, where that is channels-last."""
    if pattern.dim() != 4 or pattern.is_contiguous() or not pattern.is_contiguous(memory_format=torch.channels_last):
        return value
    if value.dim() == 5 and not value.flatten(0, 1).is_contiguous(memory_format=torch.channels_last):
        return value.permute(1, 0, 3, 4, 2).contiguous().permute(1, 0, 4, 2, 3)  # as `merged` has it
    laid: Tensor = last(value.flatten(0, -4)).view(value.shape)
    return laid


def merged(slopes: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """[R B, ...] of coefficients [R, B, ...] in the order in which they lie, and the way back from there.

    With the rows of an image side by side, lines that all of them share stay in a processor's cache.
    """
    rows, batch = slopes.shape[:2]
    if slopes.stride(0) < slopes.stride(1):
        return slopes.transpose(0, 1).flatten(0, 1), lambda flat: flat.unflatten(0, (batch, rows)).transpose(0, 1)
    return slopes.flatten(0, 1), lambda flat: flat.unflatten(0, (rows, batch))


def by_image(value: Tensor, dims: int, batch: int, stride: int) -> Tensor:
    """[..., B, n] from [..., *shape], `shape` of `dims` dimensions: every image's entries, in order.

    `stride` says where they lie (`Trace.strides`): the batch need not come first.
    """
    lead, shape = value.shape[: value.dim() - dims], value.shape[value.dim() - dims :]
    outer = math.prod(shape) // (batch * stride)
    value = value.reshape(*lead, outer, batch, stride)
    return value.transpose(-3, -2).reshape(*lead, batch, outer * stride)


def from_images(value: Tensor, shape: torch.Size, stride: int) -> Tensor:
    """The inverse of `by_image`."""
    *lead, batch, entries = value.shape
    return value.reshape(*lead, batch, entries // stride, stride).transpose(-3, -2).reshape(*lead, *shape)


@cache
def keep_pages() -> None:
    """Tells the C library to hand freed memory out again instead of giving it back to the system page by page.

    glibc maps a block above a threshold anew at every request, gives what is free at the end of its memory back, and
    every page costs a fault when it comes again. Blocks of up to 32 MiB come from its own memory from here on, of which
    up to 256 MiB stay with the process. Others do not listen.
    """
    with suppress(OSError, TypeError, AttributeError):  # not glibc
        mallopt = ctypes.CDLL(None).mallopt
        for name, value in _KEPT:
            mallopt(name, value)
