"""Transposes of convolutions to few channels as convolutions to more, which kernels do in half the time.

y = conv(x) with stride s sums x[s i + k - p] w[k] over the taps k. Backward, x[s q + f] gets a[q - d] w[s d + f + p]
over all d: for each of the s phases f a convolution of a, without a stride. All phases together are one convolution
with as many outputs, whose results interleave. Without a stride, n pixels side by side take the place of phases:
x[n q + f] gets a[n q + f - d] w[d + p], a convolution of a with stride n, whose results lie as single pixels do. Taps
that a phase or a place does not have are zeros in its kernel.
"""

from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

_LANES, _MOST = 8, 4  # kernels take so many channels at once; so many pixels side by side are quickest


def transposed(rows: Tensor, weight: Tensor, stride: list[int], padding: list[int], sizes: list[int]) -> Tensor:
    """[N, C, *sizes], channels-last, from rows [N, O, h, w] and weights [O, C, ...] of a convolution of two sides."""
    channels, (tall, broad) = weight.shape[1], weight.shape[2:]
    if tall * broad == 1 and padding == [0, 0]:
        return _spread(rows, weight, stride, sizes)
    some = abreast(sizes[1], stride)
    (down, above), (along, left) = (
        _taps(tall, stride[0], padding[0], stride[0]),
        _taps(broad, stride[1], padding[1], some),
    )
    height, width, step = -(-sizes[0] // stride[0]), -(-sizes[1] // some), some // stride[1]
    top = max(above, height + len(down[0]) - 1 - above - rows.shape[2], 0)
    side = max(left, step * (width - 1) + len(along[0]) - left - rows.shape[3], 0)
    kernel = torch.einsum("ptk,qul,ockl->pqcotu", down.to(weight), along.to(weight), weight).flatten(0, 2)
    # As many zeros on either side cost no copy. What they add before the first place is left aside, or read in vain.
    ahead = 0 if step == 1 else side - left
    outputs = len(kernel)
    kernel = F.pad(kernel, (ahead, 0, 0, 0, 0, 0, 0, -outputs % _LANES if step == 1 else 0))
    kernel = kernel.contiguous(memory_format=torch.channels_last)
    found = F.conv2d(rows, kernel, None, (1, step), (top, side)).permute(0, 2, 3, 1)
    above, left = top - above, side - left - ahead
    found = found[:, above : above + height, left : left + width, :outputs]
    laid = found.reshape(len(rows), height, width, stride[0], some * channels).transpose(2, 3)
    laid = laid.reshape(len(rows), height * stride[0], width * some, channels)
    return laid[:, : sizes[0], : sizes[1]].permute(0, 3, 1, 2)


def abreast(width: int, stride: list[int]) -> int:
    """How many pixels side by side are one step: the phases, or a few where there is one."""
    if stride[0] == stride[1] == 1:
        return next(some for some in (_MOST, 3, 2, 1) if width % some == 0)
    return stride[1]


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
def _taps(taps: int, stride: int, padding: int, places: int) -> tuple[Tensor, int]:
    """One-hot [place, entry of the window, tap]; how far the window reaches before a place."""
    steps = {
        (f, k): (k - f - padding) // stride for f in range(places) for k in range((f + padding) % stride, taps, stride)
    }
    most, least = max(steps.values()), min(steps.values())
    chosen = torch.zeros(places, most - least + 1, taps)
    for (f, k), step in steps.items():
        chosen[f, most - step, k] = 1
    return chosen, most
