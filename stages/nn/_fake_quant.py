"""Quantise and dequantise with gradients: the straight-through twin of the ONNX operators.

    q = clip(round(x / s) + z, lo, hi),   x' = s (q - z)

Rounding is half to even, as the standard and onnxruntime have it. Its derivative is taken for 1, so dq/dx = 1/s within
the clipping range and 0 outside it (Bengio et al. 2013, the straight-through estimator; Jacob et al. 2018).
"""

import torch
from torch import Tensor


def quantize(x: Tensor, scale: Tensor, zero: Tensor, low: int, high: int) -> Tensor:
    """Codes as whole float32 numbers within [low, high]; `scale` and `zero` broadcast against x."""
    # Clipping before rounding gives the same codes, because the limits are whole, and the right derivative.
    clipped = torch.minimum(torch.maximum(x / scale, low - zero), high - zero)
    return clipped + (clipped.round() - clipped).detach() + zero


def dequantize(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """s (q - z)."""
    return (codes - zero) * scale
