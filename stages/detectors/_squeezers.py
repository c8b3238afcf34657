"""Squeezers: images [B, C, H, W] in [0, 1] to simpler images of the same form, with a gradient for each."""

import torch
from torch import Tensor

_LEVELS = 255
_COARSE, _BLUR = 2, 0.3


def bit_depth(x: Tensor, bits: int) -> Tensor:
    """round(x (2^bits - 1)) / (2^bits - 1), half to even, with the gradient of a rounding that is blurred.

    Blurred by uniform noise of 0.3 levels to each side, rounding has the slope 1 / 0.6 within 0.3 levels of a boundary
    and 0 elsewhere: with one or two bits, where a level is wider than most threats, pixels that cannot change theirs
    then pull nothing. From three bits on the noise is half a level, and the gradient passes straight through.

    Source: Xu et al. 2018, section II.C; half to even as in their released code. The substitute gradient is in the
    manner of Athalye, Carlini and Wagner 2018, section 4.1 (from memory); the blur is ours.
    """
    steps = 2**bits - 1
    value: Tensor = (x * steps).round() / steps
    if not (torch.is_grad_enabled() and x.requires_grad):
        return value
    slope: Tensor | float = 1.0
    if bits <= _COARSE:
        levels = x.detach() * steps
        slope = ((levels - levels.floor() - 0.5).abs() < _BLUR).to(x.dtype) / (2 * _BLUR)
    passed: Tensor = value.detach() + slope * (x - x.detach())
    return passed


def median_2x2(x: Tensor) -> Tensor:
    """The third smallest of x[i-1, j-1], x[i-1, j], x[i, j-1], x[i, j], per channel; edges are repeated.

    Without sorting: of two ordered pairs (a <= b), (c <= d), the third smallest is max(max(a, c), min(b, d)). The pairs
    are vertical neighbours, so that each is ordered once for two windows: five times a smaller or larger of two. Its
    gradient is that of the selected pixel, shared where several are equal.

    Source: Xu et al. 2018, section II.D; window, border and upper median as in their released code (SciPy's
    `median_filter(size=2, mode="reflect")`).
    """
    above = _before(x, 2)
    small, large = torch.minimum(x, above), torch.maximum(x, above)
    return torch.maximum(
        torch.maximum(small, _before(small, 3)),
        torch.minimum(large, _before(large, 3)),
    )


def non_local_means(x: Tensor, search: int, patch: int, strength: float) -> Tensor:
    """The mean of the `search` x `search` pixels around each, weighted by how alike their surroundings are.

        w(i, j) = exp(-d(i, j) / h^2),   d(i, j) = mean over patch and channels of (x[i + u] - x[j + u])^2,
        y[i] = sum_j w(i, j) x[j] / sum_j w(i, j),   h = strength / 255

    Beyond the border the image is mirrored without its edge pixel (dcb|abcd|cba). One row of shifts is worked at a
    time, so that memory is `search` times that of the images, `search`^2 times with a gradient.

    Source: Buades, Coll and Morel 2005, with the weights of OpenCV's `fastNlMeansDenoising`, which Xu et al. 2018 use.
    Departures: real numbers where OpenCV computes in 8 bits and rounds the weights; colours are compared as RGB, all
    channels with one weight, where `fastNlMeansDenoisingColored` treats lightness and colour of CIELAB apart.
    """
    half, edge = search // 2, patch // 2
    channels, height, width = (int(size) for size in x.shape[1:])
    down, right = (_mirrored(size, half + edge, x.device) for size in (height, width))
    extended = x.index_select(2, down).index_select(3, right)
    tall, wide = height + 2 * edge, width + 2 * edge
    # Columns 0 .. wide - 1 for the first shift, 1 .. wide for the next, and so on, in one row.
    shifts = torch.tensor([t + j for t in range(search) for j in range(wide)], device=x.device)
    centre = extended[:, :, half : half + tall, half : half + wide].unsqueeze(3)
    scale = -((_LEVELS / strength) ** 2) / (patch * patch * channels)
    totals, weights = [], []
    for row in range(search):
        moved = extended[:, :, row : row + tall].index_select(3, shifts).reshape(-1, channels, tall, search, wide)
        apart = moved - centre
        apart = (apart * apart).sum(1)  # [B, tall, search, wide]
        apart = _sum([apart[:, u : u + height] for u in range(patch)])
        apart = _sum([apart[..., u : u + width] for u in range(patch)])
        alike = (scale * apart).exp().unsqueeze(1)  # [B, 1, H, search, W]
        totals.append((alike * moved[:, :, edge : edge + height, :, edge : edge + width]).sum(3))
        weights.append(alike.sum(3))
    return _sum(totals) / _sum(weights)


def _sum(parts: list[Tensor]) -> Tensor:
    """Left to right, so that every runtime adds in the same order."""
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def _before(x: Tensor, axis: int) -> Tensor:
    """The neighbour one step back along an axis, the first one its own."""
    size = int(x.shape[axis])
    return x.index_select(axis, torch.tensor([0, *range(size - 1)], device=x.device))


def _mirrored(size: int, border: int, device: torch.device) -> Tensor:
    """Indices of a mirrored axis: -border .. size + border - 1 folded into 0 .. size - 1, whatever the border."""
    period = max(2 * (size - 1), 1)
    places = (place % period for place in range(-border, size + border))
    return torch.tensor([min(place, period - place) if size > 1 else 0 for place in places], device=device)
