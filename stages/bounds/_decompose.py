"""Operations that torch leaves whole, in parts that have rules; each computes what the operation computes."""

import math
from collections.abc import Callable, Mapping
from functools import reduce
from typing import Any

import torch
from torch import Tensor

_aten = torch.ops.aten
_SMALL = 2.0  # SELU's factor is 1.76


def _variance(
    x: Tensor, dim: list[int] | None = None, *, correction: float | None = None, keepdim: bool = False
) -> Tensor:
    dims = dim or list(range(x.dim()))
    count = math.prod(x.shape[i] for i in dims)
    apart = x - x.mean(dims, keepdim=True)
    return (apart * apart).sum(dims, keepdim=keepdim) / (count - (1 if correction is None else correction))


def _group_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, n: int, channels: int, size: int, groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    del n
    inner = channels // groups * size
    rows = x.reshape(x.shape[0], groups, inner)
    y, mean, scale = _aten.native_layer_norm(rows, [inner], None, None, eps)
    return _affine(y.reshape(x.shape), weight, bias), mean, scale


def _instance_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, training: bool, momentum: float, eps: float
) -> Any:
    """Batch normalisation in training mode; one image's statistics are its own where the batch lies in the channels."""
    del momentum
    if not training or x.shape[0] != 1:
        return NotImplemented
    rows = x.reshape(x.shape[1], -1)
    y, mean, scale = _aten.native_layer_norm(rows, [rows.shape[1]], None, None, eps)
    return _affine(y.reshape(x.shape), weight, bias), mean, scale


def _affine(y: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    shape = [1, -1, *(1 for _ in y.shape[2:])]
    y = y if weight is None else y * weight.reshape(shape)
    return y if bias is None else y + bias.reshape(shape)


def _norm(
    x: Tensor, order: float = 2, dim: list[int] | None = None, keepdim: bool = False, *, dtype: Any = None
) -> Any:
    if dtype is not None or order not in (1, 2):
        return NotImplemented
    dims = dim or list(range(x.dim()))
    return x.abs().sum(dims, keepdim=keepdim) if order == 1 else (x * x).sum(dims, keepdim=keepdim).sqrt()


def _prelu(x: Tensor, weight: Tensor) -> Tensor:
    return x.relu() - weight * (-x).relu()


def _log_sigmoid(x: Tensor) -> tuple[Tensor, Tensor]:
    """Above 80, softplus gives its operand, and is off by less than 2e-35."""
    return -_aten.softplus.default(-x, 1, 80), x


def _full_like(x: Tensor, value: float, *, dtype: torch.dtype | None = None, **_: Any) -> Tensor:
    return torch.full(x.shape, value, dtype=dtype or x.dtype, device=x.device)


def _elu(x: Tensor, alpha: float = 1.0, scale: float = 1.0, inner: float = 1.0) -> Any:
    """Whole where it is small below 0. Else what exp loses counts as often as it is multiplied: in its parts, so that
    the margin of exp is, too."""
    if alpha * scale <= _SMALL:
        return NotImplemented
    return x.relu() * scale + ((x * inner).clamp(max=0).exp() - 1) * (alpha * scale)


def _celu(x: Tensor, alpha: float = 1.0) -> Tensor:
    y: Tensor = _aten.elu.default(x, alpha, 1.0, 1.0 / alpha)
    return y


def _sinh(x: Tensor) -> Tensor:
    """Both parts rise with x, so the interval is that of sinh."""
    return (x.exp() - (-x).exp()) / 2


def _cosh(x: Tensor) -> Tensor:
    return (x.exp() + (-x).exp()) / 2


def _tan(x: Tensor) -> Tensor:
    """Where the cosine may be zero, the quotient has no rule."""
    return x.sin() / x.cos()


def _products(x: Tensor, dim: int, keepdim: bool = False) -> Tensor:
    found = reduce(torch.mul, x.unbind(dim))
    return found.unsqueeze(dim) if keepdim else found


def _running_sums(x: Tensor, dim: int) -> Tensor:
    """A product with a matrix of ones from the diagonal on."""
    ones = torch.ones(x.shape[dim], x.shape[dim], dtype=x.dtype, device=x.device).triu()
    return (x.movedim(dim, -1) @ ones).movedim(-1, dim)


def _largest(x: Tensor, dim: int, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    """The places are left out of a trace where nobody reads them."""
    return x.amax(dim, keepdim), x.argmax(dim, keepdim)


def _least(x: Tensor, dim: int, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    return x.amin(dim, keepdim), x.argmin(dim, keepdim)


def _log_softmax(x: Tensor, dim: int, half_to_float: bool) -> Tensor:
    del half_to_float
    total: Tensor = _aten.logsumexp.default(x, [dim], True)
    return x - total


def _clamp(x: Tensor, *ends: Tensor | None, **named: Tensor | None) -> Tensor:
    """Between ends that may depend on the image: two operations of two values each."""
    low, high = (*ends, None, None)[:2]
    low, high = named.get("min", low), named.get("max", high)
    x = x if low is None else torch.maximum(x, low)
    return x if high is None else torch.minimum(x, high)


RULES: Mapping[Any, Callable[..., Any]] = {
    _aten.var.correction: _variance,
    _aten.std.correction: lambda *args, **kwargs: _variance(*args, **kwargs).sqrt(),
    _aten.linalg_vector_norm.default: _norm,
    _aten.native_group_norm.default: _group_norm,
    _aten._native_batch_norm_legit.no_stats: _instance_norm,
    _aten.log_sigmoid_forward.default: _log_sigmoid,
    _aten._log_softmax.default: _log_softmax,
    _aten.full_like.default: _full_like,
    _aten.elu.default: _elu,
    _aten.celu.default: _celu,
    _aten.sinh.default: _sinh,
    _aten.cosh.default: _cosh,
    _aten.tan.default: _tan,
    _aten.prod.dim_int: _products,
    _aten.cumsum.default: _running_sums,
    _aten.max.dim: _largest,
    _aten.min.dim: _least,
    _aten.clamp.Tensor: _clamp,
    _aten.clamp_min.Tensor: torch.maximum,
    _aten.clamp_max.Tensor: torch.minimum,
    _aten._prelu_kernel.default: _prelu,
}
