"""The operators that slide a window over an image: convolutions and pooling, with every way of ONNX to write pads.

    out = floor((in + head + tail - ((k - 1) d + 1)) / s) + 1        (ceil instead, where ceil_mode is set)

for a window of k places, d apart, moved by s. `auto_pad` SAME makes out = ceil(in / s) and divides the pads that this
takes between both sides, the odd one at the end (UPPER) or at the beginning (LOWER). With ceil_mode a last window that
would begin behind the image and its leading pads is left out, as in onnxruntime and torch.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from stages.nn import brisk

Attributes = Mapping[str, Any]
Pairs = list[tuple[int, int]]
_CONV = (F.conv1d, F.conv2d, F.conv3d)
_TRANSPOSED = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
_MAX = (F.max_pool1d, F.max_pool2d, F.max_pool3d)
_AVERAGE = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)


def conv(a: Attributes, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    window, groups = _Window(a, weight.shape[2:], x.shape[2:]), a.get("group", 1)
    run: Callable[..., Tensor] = _CONV[window.sides - 1]
    x, pads = (x, window.symmetric) if window.symmetric is not None else (window.padded(x), [0] * window.sides)
    if run is F.conv2d and groups == 1 and set(window.dilations) == {1}:
        return brisk.conv2d(x, weight, bias, tuple(window.strides), tuple(pads))
    return run(x, weight, bias, window.strides, pads, window.dilations, groups)


def conv_transpose(a: Attributes, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The gradient of a convolution: all of it is computed, then cut to the pads, with zeros where it falls short."""
    sides, ones = weight.dim() - 2, [1] * (weight.dim() - 2)
    strides, dilations = list(a.get("strides", ones)), list(a.get("dilations", ones))
    extra = list(a.get("output_padding", [0] * sides))
    run: Callable[..., Tensor] = _TRANSPOSED[sides - 1]
    whole = run(x, weight, None, strides, 0, 0, a.get("group", 1), dilations)
    sizes = [size + more for size, more in zip(whole.shape[2:], extra, strict=True)]
    pairs = _transposed_pads(a, sizes, x.shape[2:], strides)
    y = F.pad(whole, _flat([(-head, more - tail) for (head, tail), more in zip(pairs, extra, strict=True)]))
    return y if bias is None else y + bias.view(-1, *ones)


def max_pool(a: Attributes, x: Tensor) -> Tensor:
    window = _Window(a, a["kernel_shape"], x.shape[2:])
    run: Callable[..., Tensor] = _MAX[window.sides - 1]
    if window.fits_torch:
        return run(x, window.kernel, window.strides, window.symmetric, window.dilations)
    heads, sizes = [head for head, _ in window.needed], window.results(x.shape[2:])
    if all(0 <= 2 * head <= k for head, k in zip(heads, window.kernel, strict=True)):
        y = run(x, window.kernel, window.strides, heads, window.dilations, True)  # all windows that begin in the image
        if all(size <= have for size, have in zip(sizes, y.shape[2:], strict=True)):
            for axis, size in enumerate(sizes):
                y = y if size == y.shape[2 + axis] else y.narrow(2 + axis, 0, size)
            return y
    return run(window.padded(x, float("-inf")), window.kernel, window.strides, 0, window.dilations)


def average_pool(a: Attributes, x: Tensor) -> Tensor:
    """Pads count where count_include_pad says so; what ceil_mode adds behind them never does."""
    window, counted = _Window(a, a["kernel_shape"], x.shape[2:]), bool(a.get("count_include_pad", 0))
    run: Callable[..., Tensor] = _AVERAGE[window.sides - 1]
    as_torch_counts = not counted or window.needed == window.pads
    if window.fits_torch and as_torch_counts and set(window.dilations) == {1}:
        return run(x, window.kernel, window.strides, window.symmetric, False, counted)
    image = torch.ones_like(x[:1, :1])
    counts = F.pad(image, _flat(window.pads), value=1.0 if counted else 0.0)
    needed = _flat([(0, more - tail) for (_, more), (_, tail) in zip(window.needed, window.pads, strict=True)])
    return window.total(window.padded(x)) / window.total(F.pad(counts, needed))


def global_average_pool(a: Attributes, x: Tensor) -> Tensor:
    del a
    return x.mean(tuple(range(2, x.dim())), keepdim=True)


def global_max_pool(a: Attributes, x: Tensor) -> Tensor:
    del a
    return x.amax(tuple(range(2, x.dim())), keepdim=True)


class _Window:
    """Kernel, strides, dilations and pads (head, tail) of one node for one size of image; lists with one per side.

    `needed` are the pads with which windows in floor mode give ONNX's output: the tail may be longer than declared
    (ceil_mode) or negative (rows that no window reaches).
    """

    def __init__(self, a: Attributes, kernel: Sequence[int], image: Sequence[int]) -> None:
        self.sides = len(kernel)
        self.kernel, ones = list(kernel), [1] * self.sides
        self.strides, self.dilations = list(a.get("strides", ones)), list(a.get("dilations", ones))
        spans = [(k - 1) * d + 1 for k, d in zip(self.kernel, self.dilations, strict=True)]
        self.pads = _pads(a, image, spans, self.strides)
        self.needed: Pairs = []
        for size, span, s, (head, tail) in zip(image, spans, self.strides, self.pads, strict=True):
            if not a.get("ceil_mode", 0):
                self.needed.append((head, tail))
                continue
            out = math.ceil((size + head + tail - span) / s) + 1
            out -= (out - 1) * s >= size + head
            self.needed.append((head, (out - 1) * s + span - size - head))

    @property
    def symmetric(self) -> list[int] | None:
        """One pad per side, as torch takes them; None where the sides differ."""
        heads = [head for head, _ in self.needed]
        return heads if heads == [tail for _, tail in self.needed] else None

    @property
    def fits_torch(self) -> bool:
        """torch's pooling refuses pads beyond half of the kernel."""
        return self.symmetric is not None and all(2 * p <= k for p, k in zip(self.symmetric, self.kernel, strict=True))

    def results(self, image: Sequence[int]) -> list[int]:
        """The sizes of the output."""
        sides = zip(image, self.kernel, self.strides, self.dilations, self.needed, strict=True)
        return [(size + head + tail - (k - 1) * d - 1) // s + 1 for size, k, s, d, (head, tail) in sides]

    def padded(self, x: Tensor, value: float = 0.0) -> Tensor:
        return F.pad(x, _flat(self.needed), value=value)

    def total(self, x: Tensor) -> Tensor:
        """Sums over the windows of x, which is padded already, channel by channel."""
        single = x.flatten(0, 1).unsqueeze(1)
        run: Callable[..., Tensor] = _CONV[self.sides - 1]
        sums = run(single, x.new_ones(1, 1, *self.kernel), None, self.strides, 0, self.dilations)
        return sums.view(*x.shape[:2], *sums.shape[2:])


def _pads(a: Attributes, image: Sequence[int], spans: Sequence[int], strides: Sequence[int]) -> Pairs:
    mode = a.get("auto_pad", b"NOTSET").decode()
    if mode == "NOTSET":
        flat = list(a.get("pads", [0] * 2 * len(spans)))
        return list(zip(flat[: len(spans)], flat[len(spans) :], strict=True))
    if mode == "VALID":
        return [(0, 0)] * len(spans)
    totals = [
        max((-(-size // s) - 1) * s + span - size, 0) for size, span, s in zip(image, spans, strides, strict=True)
    ]
    return [_divided(total, upper=mode == "SAME_UPPER") for total in totals]


def _transposed_pads(a: Attributes, whole: Sequence[int], image: Sequence[int], strides: Sequence[int]) -> Pairs:
    """What is cut from the whole gradient: the pads, or what the asked output shape leaves over."""
    mode, sides = a.get("auto_pad", b"NOTSET").decode(), len(whole)
    asked = list(a["output_shape"])[-sides:] if "output_shape" in a else None
    if asked is None and mode in ("NOTSET", "VALID"):
        flat = list(a.get("pads", [0] * 2 * sides)) if mode == "NOTSET" else [0] * 2 * sides
        return list(zip(flat[:sides], flat[sides:], strict=True))
    asked = asked or [size * s for size, s in zip(image, strides, strict=True)]
    return [_divided(size - want, upper=mode == "SAME_UPPER") for size, want in zip(whole, asked, strict=True)]


def _divided(total: int, upper: bool) -> tuple[int, int]:
    small = total // 2
    return (small, total - small) if upper else (total - small, small)


def _flat(pairs: Pairs) -> list[int]:
    """As `F.pad` wants them: the last axis first."""
    return [side for pair in reversed(pairs) for side in pair]
