"""Transposes of strided convolutions as plain ones, which kernels do in half the time where channels are few.

y = conv(x) with stride s sums x[s i + k - p] w[k] over the taps k. Backward, x[s q + f] gets a[q - d] w[s d + f + p]
over all d: for each of the s phases f a convolution of a, without a stride. All phases together are one convolution
with as many outputs, whose results interleave. Taps that a phase does not have are zeros in its kernel.
"""

from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

_LANES = 8  # kernels take so many channels at once


def transposed(rows: Tensor, weight: Tensor, stride: list[int], padding: list[int], sizes: list[int]) -> Tensor:
    """[N, C, *sizes], channels-last, from rows [N, O, h, w] and weights [O, C, ...] of a convolution of two sides."""
    if weight[0, 0].numel() == 1 and padding == [0, 0]:
        return _spread(rows, weight, stride, sizes)
    (down, above, below), (along, left, right) = (_taps(weight.shape[2 + i], stride[i], padding[i]) for i in (0, 1))
    kernel = torch.einsum("ptk,qul,ockl->pqcotu", down.to(weight), along.to(weight), weight).flatten(0, 2)
    outputs, channels = len(kernel), weight.shape[1]
    kernel = F.pad(kernel, (0, 0, 0, 0, 0, 0, 0, -outputs % _LANES)).contiguous(memory_format=torch.channels_last)
    height, width = (-(-size // step) for size, step in zip(sizes, stride, strict=True))
    around = left, width - rows.shape[3] + right, above, height - rows.shape[2] + below
    found = F.conv2d(F.pad(rows, around), kernel).permute(0, 2, 3, 1)[..., :outputs]
    laid = found.reshape(len(rows), height, width, stride[0], stride[1] * channels).transpose(2, 3)
    laid = laid.reshape(len(rows), height * stride[0], width * stride[1], channels)
    return laid[:, : sizes[0], : sizes[1]].permute(0, 3, 1, 2)


def _spread(rows: Tensor, weight: Tensor, stride: list[int], sizes: list[int]) -> Tensor:
    """A kernel of one tap reads one of the pixels between which it steps; the others get nothing."""
    laid: Tensor = rows.new_zeros(len(rows), *sizes, weight.shape[1]).permute(0, 3, 1, 2)
    laid[:, :, :: stride[0], :: stride[1]] = pixels(rows, weight)
    return laid


def pixels(rows: Tensor, weight: Tensor) -> Tensor:
    """[N, C, h, w]: what a convolution of one tap passes back to the pixels that it reads."""
    channels = weight.shape[1]
    return F.conv2d(rows, F.pad(weight.transpose(0, 1), (0, 0, 0, 0, 0, 0, 0, -channels % _LANES)))[:, :channels]


@cache
def _taps(taps: int, stride: int, padding: int) -> tuple[Tensor, int, int]:
    """One-hot [phase, place in the window, tap]; how far the window reaches before and beyond a place."""
    steps = {
        (f, k): (k - f - padding) // stride for f in range(stride) for k in range((f + padding) % stride, taps, stride)
    }
    most, least = max(steps.values()), min(steps.values())
    chosen = torch.zeros(stride, most - least + 1, taps)
    for (f, k), step in steps.items():
        chosen[f, most - step, k] = 1
    return chosen, most, -least
