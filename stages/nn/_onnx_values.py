"""The operators that compute values, as torch functions of (attributes, inputs); the names are those of ONNX.

Missing optional inputs come as None. Half-precision constants have become float32 before they arrive here.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from stages.nn import _fake_quant

Attributes = Mapping[str, Any]
RANGES = {torch.uint8: (0, 255), torch.int8: (-128, 127), torch.int16: (-32768, 32767), torch.uint16: (0, 65535)}


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


def instance_norm(a: Attributes, x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    y: Tensor = F.instance_norm(x, None, None, gamma, beta, True, 0.0, a.get("epsilon", 1e-5))
    return y


def group_norm(a: Attributes, x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    """From opset 21 on gamma and beta have one entry per channel, before that one per group."""
    groups, channels = a["num_groups"], x.shape[1]
    gamma, beta = (t if t.numel() == channels else t.repeat_interleave(channels // groups) for t in (gamma, beta))
    return F.group_norm(x, groups, gamma, beta, a.get("epsilon", 1e-5))


def lp_norm(a: Attributes, x: Tensor) -> Tensor:
    axis = a.get("axis", -1)
    length: Tensor = torch.linalg.vector_norm(x, a.get("p", 2), axis, keepdim=True)
    return torch.where(length > 0, x / length, 0.0)


def local_response_norm(a: Attributes, x: Tensor) -> Tensor:
    """x / (bias + alpha / size * the squares of `size` neighbouring channels)^beta."""
    size = a["size"]
    flat = F.pad(x.square().flatten(2), (0, 0, (size - 1) // 2, size // 2))
    sums = sum(flat[:, at : at + x.shape[1]] for at in range(size))
    scale: Tensor = (a.get("bias", 1.0) + a.get("alpha", 1e-4) / size * sums) ** a.get("beta", 0.75)
    return x / scale.view(x.shape)


def softmax(a: Attributes, x: Tensor) -> Tensor:
    return _along(a, x, torch.softmax)


def log_softmax(a: Attributes, x: Tensor) -> Tensor:
    return _along(a, x, torch.log_softmax)


def clip(a: Attributes, x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    low, high = a.get("min", low), a.get("max", high)  # attributes before opset 11
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


def swish(a: Attributes, x: Tensor) -> Tensor:
    gate: Tensor = a.get("alpha", 1.0) * x
    return x * gate.sigmoid()


def celu(a: Attributes, x: Tensor) -> Tensor:
    return F.celu(x, a.get("alpha", 1.0))


def selu(a: Attributes, x: Tensor) -> Tensor:
    alpha, gamma = a.get("alpha", 1.6732632423543772), a.get("gamma", 1.0507009873554805)
    y: Tensor = gamma * F.elu(x, alpha)
    return y


def thresholded_relu(a: Attributes, x: Tensor) -> Tensor:
    return torch.where(x > a.get("alpha", 1.0), x, 0.0)


def leaky_relu(a: Attributes, x: Tensor) -> Tensor:
    return F.leaky_relu(x, a.get("alpha", 0.01))


def elu(a: Attributes, x: Tensor) -> Tensor:
    return F.elu(x, a.get("alpha", 1.0))


def reduction(
    run: Callable[[Tensor, tuple[int, ...], bool], Tensor], each: Callable[[Tensor], Tensor]
) -> Callable[..., Tensor]:
    """An operator over axes: `run(x, axes, keep)`, and `each(x)` where the node says that no axes means none."""

    def reduce(a: Attributes, x: Tensor, axes: Tensor | None = None) -> Tensor:
        found = _axes(a, x, axes)
        return each(x) if found is None else run(x, found, bool(a.get("keepdims", 1)))

    return reduce


def product(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    for axis in sorted((axis % x.dim() for axis in axes), reverse=True):
        x = x.prod(axis, keepdim=keep)
    return x


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


def _along(a: Attributes, x: Tensor, run: Callable[[Tensor, int], Tensor]) -> Tensor:
    """Over one axis; before opset 13 (`joint`) over all axes from the given one on, together."""
    axis = a.get("axis", -1)
    if not a.get("joint", 0) or axis % x.dim() == x.dim() - 1:
        return run(x, axis)
    return run(x.flatten(axis), axis % x.dim()).view(x.shape)
