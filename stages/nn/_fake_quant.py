"""Quantise and dequantise with gradients: the straight-through twin of the ONNX operators.

    q = clip(round(x / s) + z, lo, hi),   x' = s (q - z)

Rounding is half to even, as the standard and onnxruntime have it. Its derivative is taken for 1, so dq/dx = 1/s where
round(x / s) + z lies in [lo, hi], ends included, and 0 elsewhere (Bengio et al. 2013, the straight-through estimator;
Jacob et al. 2018). That x / s itself may lie up to half a step outside matters: calibration seldom hits the least value
of the data, background pixels would have no gradient, and an attack would leave them where they are.

Written as two functions with a backward pass of their own: left to autograd, a quantised network keeps about ten times
its activations, and attacks spend most of their time in element-wise passes over them.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def quantize(x: Tensor, scale: Tensor, zero: Tensor, low: int, high: int) -> Tensor:
    """Codes as whole float32 numbers within [low, high]; `scale` and `zero` broadcast against x, and are constants."""
    codes: Tensor = _Quantize.apply(x, scale, zero, low, high)  # type: ignore[no-untyped-call]  # torch leaves it so
    return codes


def dequantize(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """s (q - z)."""
    values: Tensor = _Dequantize.apply(codes, scale, zero)  # type: ignore[no-untyped-call]
    return values


class _Quantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero: Tensor, low: int, high: int) -> Tensor:
        steps = (x / scale).round_()
        codes = steps.clamp(low - zero, high - zero)
        ctx.save_for_backward(codes != steps, scale)
        return codes.add_(zero)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        outside, scale = ctx.saved_tensors
        return slope.masked_fill(outside, 0).div_(scale), None, None, None, None


class _Dequantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        ctx.save_for_backward(scale)
        return (codes - zero).mul_(scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        (scale,) = ctx.saved_tensors
        return slope * scale, None, None
