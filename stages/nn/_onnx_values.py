"""The operators that compute values, as torch functions of (attributes, inputs); the names are those of ONNX.

Missing optional inputs come as None. Half-precision constants have become float32 before they arrive here.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from stages.nn import _fake_quant

Attributes = Mapping[str, Any]
RANGES = {torch.uint8: (0, 255), torch.int8: (-128, 127)}
_LEAST = {"MaxPool": float("-inf"), "Conv": 0.0, "AveragePool": 0.0}


def conv(a: Attributes, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    sides = weight.dim() - 2
    x, pads = _padded("Conv", a, x, sides)
    run: Callable[..., Tensor] = (F.conv1d, F.conv2d, F.conv3d)[sides - 1]
    ones = [1] * sides
    return run(x, weight, bias, a.get("strides", ones), pads, a.get("dilations", ones), a.get("group", 1))


def gemm(a: Attributes, left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    left = left.transpose(0, 1) if a.get("transA", 0) else left
    right = right.transpose(0, 1) if a.get("transB", 0) else right
    y = a.get("alpha", 1.0) * (left @ right) if a.get("alpha", 1.0) != 1.0 else left @ right
    return y if bias is None else y + a.get("beta", 1.0) * bias


def batch_norm(a: Attributes, x: Tensor, gamma: Tensor, beta: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    return F.batch_norm(x, mean, var, gamma, beta, False, 0.0, a.get("epsilon", 1e-5))


def layer_norm(a: Attributes, x: Tensor, gamma: Tensor, beta: Tensor | None = None) -> Tensor:
    shape = x.shape[a.get("axis", -1) :]
    y = F.layer_norm(x, shape, None, None, a.get("epsilon", 1e-5)) * gamma
    return y if beta is None else y + beta


def max_pool(a: Attributes, x: Tensor) -> Tensor:
    sides = len(a["kernel_shape"])
    x, pads = _padded("MaxPool", a, x, sides)
    run: Callable[..., Tensor] = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[sides - 1]
    ones = [1] * sides
    strides, dilations = a.get("strides", ones), a.get("dilations", ones)
    return run(x, a["kernel_shape"], strides, pads, dilations, bool(a.get("ceil_mode", 0)))


def average_pool(a: Attributes, x: Tensor) -> Tensor:
    sides, ceil = len(a["kernel_shape"]), bool(a.get("ceil_mode", 0))
    padded, pads = _padded("AveragePool", a, x, sides)
    pool: Callable[..., Tensor] = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[sides - 1]
    strides, counted = a.get("strides", [1] * sides), bool(a.get("count_include_pad", 0))
    y = pool(padded, a["kernel_shape"], strides, pads, ceil, counted)
    if counted or padded is x:
        return y
    # Pads written into the input were averaged too: divide by the share of the window that was image.
    image, _ = _padded("AveragePool", a, torch.ones_like(x[:1, :1]), sides)
    return y / pool(image, a["kernel_shape"], strides, pads, ceil, counted)


def global_average_pool(a: Attributes, x: Tensor) -> Tensor:
    del a
    return x.mean(tuple(range(2, x.dim())), keepdim=True)


def softmax(a: Attributes, x: Tensor) -> Tensor:
    return x.softmax(a.get("axis", -1))


def log_softmax(a: Attributes, x: Tensor) -> Tensor:
    return x.log_softmax(a.get("axis", -1))


def clip(a: Attributes, x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    del a
    return x if low is None and high is None else x.clamp(low, high)


def hard_sigmoid(a: Attributes, x: Tensor) -> Tensor:
    y: Tensor = a.get("alpha", 0.2) * x + a.get("beta", 0.5)
    return y.clamp(0, 1)


def hard_swish(a: Attributes, x: Tensor) -> Tensor:
    del a
    return x * (x / 6 + 0.5).clamp(0, 1)


def gelu(a: Attributes, x: Tensor) -> Tensor:
    y: Tensor = F.gelu(x, approximate=a.get("approximate", b"none").decode())
    return y


def leaky_relu(a: Attributes, x: Tensor) -> Tensor:
    return F.leaky_relu(x, a.get("alpha", 0.01))


def elu(a: Attributes, x: Tensor) -> Tensor:
    return F.elu(x, a.get("alpha", 1.0))


def reduce_mean(a: Attributes, x: Tensor, axes: Tensor | None = None) -> Tensor:
    found = _axes(a, x, axes)
    return x if found is None else x.mean(found, keepdim=bool(a.get("keepdims", 1)))


def reduce_sum(a: Attributes, x: Tensor, axes: Tensor | None = None) -> Tensor:
    found = _axes(a, x, axes)
    return x if found is None else x.sum(found, keepdim=bool(a.get("keepdims", 1)))


def reduce_max(a: Attributes, x: Tensor, axes: Tensor | None = None) -> Tensor:
    found = _axes(a, x, axes)
    return x if found is None else x.amax(found, keepdim=bool(a.get("keepdims", 1)))


def reduce_l2(a: Attributes, x: Tensor, axes: Tensor | None = None) -> Tensor:
    found = _axes(a, x, axes)
    if found is None:
        return x.abs()
    return x.square().sum(found, keepdim=bool(a.get("keepdims", 1))).sqrt()


def quantize_linear(a: Attributes, x: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
    low, high = RANGES[torch.uint8 if zero is None else zero.dtype]
    scale, shift = _per_axis(a, x, scale, zero)
    return _fake_quant.quantize(x, scale, shift, low, high)


def dequantize_linear(a: Attributes, codes: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
    scale, shift = _per_axis(a, codes, scale, zero)
    return _fake_quant.dequantize(codes.to(torch.float32), scale, shift)


def _per_axis(a: Attributes, x: Tensor, scale: Tensor, zero: Tensor | None) -> tuple[Tensor, Tensor]:
    """Scale and zero point as float32 that broadcast against x; one value, or one per entry of the axis."""
    shift = torch.zeros_like(scale) if zero is None else zero.to(torch.float32)
    if scale.numel() == 1:
        return scale.reshape(()), shift.reshape(())
    shape = [1] * x.dim()
    shape[a.get("axis", 1)] = -1
    return scale.view(shape), shift.view(shape)


def _axes(a: Attributes, x: Tensor, axes: Tensor | None) -> tuple[int, ...] | None:
    """The axes of a reduction; all where none are named, unless the node says that none means none."""
    found = a.get("axes", ()) if axes is None else axes.tolist()
    if found:
        return tuple(found)
    return None if a.get("noop_with_empty_axes", 0) else tuple(range(x.dim()))


def _uneven(a: Attributes, sides: int) -> bool:
    pads = a.get("pads", [0] * 2 * sides)
    return list(pads[:sides]) != list(pads[sides:])


def _padded(operator: str, a: Attributes, x: Tensor, sides: int) -> tuple[Tensor, Sequence[int]]:
    """The input and the symmetric pads that torch takes; others are written into the input."""
    pads: Sequence[int] = a.get("pads", [0] * 2 * sides)
    # torch's pooling refuses pads beyond half of its kernel, so those are written into the input too.
    wide = operator != "Conv" and any(2 * pad > size for pad, size in zip(pads, a["kernel_shape"], strict=False))
    if not wide and not _uneven(a, sides):
        return x, pads[:sides]
    pairs = [side for axis in reversed(range(sides)) for side in (pads[axis], pads[sides + axis])]
    return F.pad(x, pairs, value=_LEAST[operator]), [0] * sides
