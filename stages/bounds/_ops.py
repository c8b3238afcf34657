"""Interval rules, one per primitive operation, in three families.

Affine y = L x + b: midpoint and radius, y in L m + b +- |L| r; |L| comes from `_PARTS`.
Monotone: the operation is applied to both ends. One minimum (SiLU, GELU, hard swish): the low end is the value at the
point of the interval nearest to the minimum, the high end the larger value of the two ends.
The rest (products, quotients, softmax, ...) has a rule of its own.

Every rule widens its answer by a `Rounding` margin wherever the operation rounds; gathers, maxima and clamps do not.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stages.bounds import _attention, _choice, _logsumexp, _norms, _stored, _waves
from stages.bounds._interval import FOLDED, TINY, Interval, Rounding, bounded, high_ends, low_ends
from stages.bounds._trace import Op
from stages.method import InputError

_MOVES = frozenset(
    {"view", "_unsafe_view", "reshape", "permute", "transpose", "t", "expand", "squeeze", "unsqueeze", "unfold"}
    | {"slice", "select", "index_select", "index", "cat", "stack", "split", "split_with_sizes", "getitem", "repeat"}
    | {"gather", "flip", "roll", "constant_pad_nd", "upsample_nearest2d", "pixel_shuffle"}
    | {"clone", "alias", "detach", "_to_copy", "where", "copy", "slice_scatter", "select_scatter"}
)
_MONOTONE = frozenset(
    {"relu", "hardtanh", "clamp", "clamp_min", "clamp_max", "maximum", "minimum", "amax", "amin", "sign"}
    | {"max_pool2d_with_indices", "max_pool3d_with_indices", "adaptive_max_pool2d", "floor", "ceil", "trunc"}
)
_SMOOTH = frozenset({"sigmoid", "tanh", "atan", "asinh", "exp", "erf", "hardsigmoid", "elu", "leaky_relu"})
_ALLOWED_COPIES = (None, torch.float32, torch.float64)


@dataclass(frozen=True, slots=True)
class Parts:
    """An affine operation taken apart: r -> |L| r, |b| if there is one, and how many products one output sums.

    `fused` is what `margin` does, in one step, where there is one.
    """

    magnitude: Callable[[Tensor], Tensor]
    offset: Tensor | float
    terms: int
    fused: Callable[[Tensor, Tensor, float], Tensor] | None = None

    def margin(self, r: Tensor, more: Tensor | float, factor: float = 1.0) -> Tensor:
        """factor |L| r + more, for what is like the offset."""
        more = torch.as_tensor(more, dtype=r.dtype, device=r.device)
        return torch.add(more, self.magnitude(r), alpha=factor) if self.fused is None else self.fused(r, more, factor)


def step(op: Op, args: tuple[Any, ...], kwargs: dict[str, Any], rounding: Rounding) -> Any:
    """The interval (or tuple of them) that holds the operation's result for all operands inside `args`.

    Raises `InputError` for an operation without a rule, naming it and its module.
    """
    kind = op.kind
    if is_affine(op, args):
        return _affine(op, args, kwargs, rounding)
    if kind == "where" and isinstance(args[0], Interval):
        return _choice.choice(args)
    if kind in _MOVES:
        return _move(op, args, kwargs)
    if kind == "relu":
        return Interval.above_zero(args[0].low.relu(), args[0].high.relu())
    if kind in _MONOTONE:
        return pair(op.target(*low_ends(args), **kwargs), op.target(*high_ends(args), **kwargs))
    if kind in _SMOOTH:
        if kind in {"elu", "leaky_relu"} and any(isinstance(a, int | float) and a < 0 for a in args[1:]):
            raise unsupported(op, "with a negative slope")
        low, high = op.target(*low_ends(args), **kwargs), op.target(*high_ends(args), **kwargs)
        return rounding.elementary(low, high, torch.maximum(low.abs(), high.abs()))
    rule = _RULES.get(kind)
    if rule is None:
        raise unsupported(op)
    return rule(op, args, kwargs, rounding)


def is_affine(op: Op, args: tuple[Any, ...]) -> bool:
    """Whether the result is affine in the bounded operands and rounds (pure moves are affine too, but do not)."""
    places = [i for i, arg in enumerate(args) if isinstance(arg, Interval)]
    return op.kind in _PARTS and places in [[place] for place in _PLACES.get(op.kind, (0,))]


def keeps_affine(op: Op, args: tuple[Any, ...]) -> bool:
    """Whether an affine function of the operands stays one: affine operations, moves, sums."""
    if op.kind == "where":
        return not isinstance(args[0], Interval)
    return is_affine(op, args) or op.kind in _MOVES or op.kind in {"add", "sub", "neg"}


def parts(op: Op, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Parts:
    """An affine operation taken apart."""
    return _PARTS[op.kind](op, args, kwargs)


def unsupported(op: Op, how: str = "") -> InputError:
    where = f' in module "{op.module}"' if op.module else ""
    return InputError(
        f'bounds: no rule for operation "{op.kind}"{f" {how}" if how else ""}{where}; replace it by an operation with '
        "one (convolution, linear, normalisation in eval mode, pooling, ReLU and other common activations), or leave "
        "certification out of the spec"
    )


def pair(low: Any, high: Any) -> Any:
    """Two results of one operation as an interval, or as a tuple of intervals."""
    if isinstance(low, list | tuple):
        return tuple(pair(a, b) for a, b in zip(low, high, strict=True))
    return Interval(low, high)


def _move(op: Op, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if op.kind == "getitem":
        if args[1] >= len(args[0]):
            raise unsupported(op, f"of result {args[1]}")
        return args[0][args[1]]
    if op.kind == "_to_copy":
        if kwargs.get("dtype") not in _ALLOWED_COPIES:
            raise unsupported(op, f"to {kwargs['dtype']}")
        return args[0]
    return pair(op.target(*low_ends(args), **kwargs), op.target(*high_ends(args), **kwargs))


def _affine(op: Op, args: tuple[Any, ...], kwargs: dict[str, Any], rounding: Rounding) -> Any:
    if op.kind == "_native_batch_norm_legit_no_training":
        return _stored.interval(args, rounding)
    piece = parts(op, args, kwargs)
    [x] = bounded(args)
    middle = (x.low + x.high).mul_(0.5)
    at = tuple(middle if isinstance(arg, Interval) else arg for arg in args)
    centre = op.target(*at, **kwargs)
    tail = ()
    if isinstance(centre, tuple):
        centre, tail = centre[0], centre[1:]
    share = rounding.share(piece.terms)
    # (1 + s) |L| (r + s |m|) >= |L| (r + s (|m| + r)); the units that `share` keeps for r pay for one half of it.
    radius = torch.sub(x.high, middle, alpha=1 - share if x.positive else 1)
    spread = radius if x.positive else radius.add_(middle.abs(), alpha=share)
    spread = piece.margin(spread, (1 + share) * (share * piece.offset + TINY), 1 + share)
    low, high = centre - spread, spread.add_(centre)
    if op.kind in _KEEPING and bool((x.low >= 0).all()):  # however it rounds
        factors = [torch.as_tensor(arg) >= 0 for arg in args if op.kind in {"mul", "div"} and arg is not x]
        low = low.clamp(min=0) if all(bool(factor.all()) for factor in factors) else low
    answer = Interval(low, high)
    return (answer, *tail) if tail else answer


def _convolution(op: Op, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Parts:
    _, weight, bias, *rest = args
    transposed = rest[3]
    shape = -1, *(1,) * (weight.dim() - 2)
    offset = 0.0 if bias is None else bias.abs().view(shape)
    terms = weight.numel() // weight.shape[1 if transposed else 0] + 1

    def fused(r: Tensor, more: Tensor, factor: float) -> Tensor:
        channels = weight.shape[1] * rest[5] if transposed else len(weight)
        found: Tensor = op.target(
            r, factor * weight.abs(), more.expand(channels, *shape[1:]).flatten(), *rest, **kwargs
        )
        return found

    return Parts(lambda r: op.target(r, weight.abs(), None, *rest, **kwargs), offset, terms, fused)


def _batch_norm(op: Op, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Parts:
    del op, kwargs
    scale, size = (part.view(-1, *(1,) * (args[0].low.dim() - 2)) for part in (_stored.scale(args), _stored.size(args)))
    return Parts(lambda r: r * scale.abs(), size, _stored.TERMS)


def _addmm(op: Op, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Parts:
    if kwargs:
        raise unsupported(op, "with alpha or beta")
    bias, _, weight = args
    return Parts(lambda r: r @ weight.abs(), bias.abs(), weight.shape[0] + 1)


def _product(op: Op, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Parts:
    del op, kwargs
    left, right = args
    if isinstance(left, Interval):
        return Parts(lambda r: r @ right.abs(), 0.0, right.shape[-2])
    return Parts(lambda r: left.abs() @ r, 0.0, left.shape[-1])


def _scale(op: Op, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Parts:
    del op, kwargs
    factor = args[1] if isinstance(args[0], Interval) else args[0]
    return Parts(lambda r: r * abs(factor), 0.0, 1)


def _over(op: Op, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Parts:
    if kwargs:
        raise unsupported(op, "with rounding")
    return Parts(lambda r: r / abs(args[1]), 0.0, 1)


def _average(op: Op, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Parts:
    x = args[0].low
    # No window holds more than the whole image. A mean or sum may be over places that come before the batch.
    dims = (args[1] if len(args) > 1 else None) or range(x.dim())
    sums = op.kind in {"mean", "sum"}
    whole = math.prod(x.shape[dim] for dim in dims) if sums else math.prod(x.shape[2:])
    window = math.prod(args[1]) ** (3 // len(args[1])) if op.kind.startswith("avg_pool") else whole
    if any(isinstance(arg, int) and arg < 0 for arg in args[6:7]):
        raise unsupported(op, "with a negative divisor")
    return Parts(lambda r: op.target(r, *args[1:], **kwargs), 0.0, min(window, whole) + 1)


_PARTS: dict[str, Callable[[Op, tuple[Any, ...], dict[str, Any]], Parts]] = {
    "convolution": _convolution,
    "_native_batch_norm_legit_no_training": _batch_norm,
    "addmm": _addmm,
    "mm": _product,
    "bmm": _product,
    "matmul": _product,
    "mul": _scale,
    "div": _over,
    "avg_pool2d": _average,
    "avg_pool3d": _average,
    "adaptive_avg_pool2d": _average,
    "_adaptive_avg_pool2d": _average,
    "mean": _average,
    "sum": _average,
}
# What gives nothing negative of nothing negative, if constants are not negative either.
_KEEPING = frozenset({"mean", "sum", "avg_pool2d", "adaptive_avg_pool2d", "_adaptive_avg_pool2d", "mul", "div"})
_PLACES = {"addmm": (1,), "mm": (0, 1), "bmm": (0, 1), "matmul": (0, 1), "mul": (0, 1)}


def _as_interval(value: Any, like: Tensor) -> Interval:
    if isinstance(value, Interval):
        return value
    fixed = torch.as_tensor(value, dtype=like.dtype, device=like.device)
    return Interval(fixed, fixed)


def _two(args: tuple[Any, ...]) -> tuple[Interval, Interval]:
    like = bounded(args)[0].low
    return _as_interval(args[0], like), _as_interval(args[1], like)


def _sum(op: Op, args: tuple[Any, ...], kwargs: dict[str, Any], rounding: Rounding) -> Interval:
    if kwargs.get("alpha", 1) != 1:
        raise unsupported(op, "with alpha")
    a, b = _two(args)
    if op.masked:
        _attention.check_mask(op, a, b)
    if op.kind == "sub":
        b = Interval(-b.high, -b.low)
    # A sum of two is off by a share of itself, and y - s |y| rises with y, so each end pays for itself; and stays at
    # least 0 where both operands do.
    share = rounding.share(1)
    return Interval.apart((a.low + b.low).mul_(1 - share), (a.high + b.high).mul_(1 + share), share)


def _neg(op: Op, args: tuple[Any, ...], kwargs: dict[str, Any], rounding: Rounding) -> Interval:
    del op, kwargs, rounding
    return Interval(-args[0].high, -args[0].low)


def _abs(op: Op, args: tuple[Any, ...], kwargs: dict[str, Any], rounding: Rounding) -> Interval:
    del op, kwargs, rounding
    x: Interval = args[0]
    return Interval(torch.maximum(x.low, -x.high).clamp(min=0), x.size())


def _square(x: Interval, rounding: Rounding) -> Interval:
    nearest = torch.maximum(x.low, -x.high).clamp(min=0)
    high = x.size() ** 2
    found = rounding.widen(nearest**2, high, high)
    return Interval(found.low.clamp(min=0), found.high)


def _round(op: Op, args: tuple[Any, ...], kwargs: dict[str, Any], rounding: Rounding) -> Interval:
    """Monotone and exact. Before it a step of 2^-10, for kernels that fold zero points into their sums: they lose units
    of the largest code, 255, where the operations of the trace lose units of the value."""
    if kwargs.get("decimals"):
        raise unsupported(op, "to decimals")
    reach = FOLDED if rounding.unit else 0.0
    return Interval(op.target(args[0].low - reach, **kwargs), op.target(args[0].high + reach, **kwargs))


def _mul(op: Op, args: tuple[Any, ...], kwargs: dict[str, Any], rounding: Rounding) -> Interval:
    del kwargs
    if op.args[0] == op.args[1]:
        return _square(args[0], rounding)
    return _corners(*_two(args), rounding)


def _corners(a: Interval, b: Interval, rounding: Rounding) -> Interval:
    corners = [a.low * b.low, a.low * b.high, a.high * b.low, a.high * b.high]
    low, high = corners[0], corners[0]
    for corner in corners[1:]:
        low, high = torch.minimum(low, corner), torch.maximum(high, corner)
    return rounding.widen(low, high, a.size() * b.size())


def _div(op: Op, args: tuple[Any, ...], kwargs: dict[str, Any], rounding: Rounding) -> Interval:
    if kwargs:
        raise unsupported(op, "with rounding")
    a, b = _two(args)
    return _corners(a, _inverse(op, b, rounding), rounding)


def _reciprocal(op: Op, args: tuple[Any, ...], kwargs: dict[str, Any], rounding: Rounding) -> Interval:
    del kwargs
    return _inverse(op, args[0], rounding)


def _inverse(op: Op, x: Interval, rounding: Rounding) -> Interval:
    if not bool(((x.low > 0) | (x.high < 0)).all()):
        raise unsupported(op, "by a value that may be zero")
    return _relative(1 / x.high, 1 / x.low, rounding)


def _pow(op: Op, args: tuple[Any, ...], kwargs: dict[str, Any], rounding: Rounding) -> Interval:
    x, exponent = args[0], args[1]
    several = isinstance(exponent, Tensor) and exponent.numel() > 1
    if several or isinstance(exponent, Interval) or not isinstance(x, Interval):
        raise unsupported(op, "with exponents that differ or depend on the image")
    n = float(exponent)
    if n == 2:
        return _square(x, rounding)
    if n != n // 1 or n < 1:  # as of roots
        return _root(op, args, kwargs, rounding)
    # Even powers fall up to zero; a float32 power of n is n - 1 products, or an elementary function.
    near = torch.maximum(x.low, -x.high).clamp(min=0) if n % 2 == 0 else x.low
    far = x.size() if n % 2 == 0 else x.high
    return rounding.widen(near**n, far**n, x.size() ** n, terms=int(2 * n) + 12)


def _root(op: Op, args: tuple[Any, ...], kwargs: dict[str, Any], rounding: Rounding) -> Interval:
    """Roots, inverses and logarithms, which need what they read to stay above zero."""
    x: Interval = args[0]
    ok = x.low >= 0 if op.kind == "sqrt" or (op.kind == "pow" and float(args[1]) > 0) else x.low > 0
    if not bool(ok.all()):
        raise unsupported(op, "of a value that may be negative or zero")
    ends = op.target(x.low, *args[1:], **kwargs), op.target(x.high, *args[1:], **kwargs)
    low, high = torch.minimum(*ends), torch.maximum(*ends)
    return _relative(low, high, rounding, 1.0 if op.kind == "log" else 0.0)


def _relative(low: Tensor, high: Tensor, rounding: Rounding, more: float = 0.0) -> Interval:
    """For monotone functions that are right within 14 units of their value: each end moves by its own size."""
    share = rounding.share(12)
    return Interval(low - share * (low.abs() + more) - TINY, high + share * (high.abs() + more) + TINY)


def _matmul(op: Op, args: tuple[Any, ...], kwargs: dict[str, Any], rounding: Rounding) -> Interval:
    """Both operands bounded (attention): |a b - m_a m_b| <= |m_a| r_b + r_a |m_b| + r_a r_b, summed."""
    del op, kwargs
    (ma, ra), (mb, rb) = args[0].split(), args[1].split()
    centre, spread = ma @ mb, ma.abs() @ rb + ra @ (mb.abs() + rb)
    return rounding.widen(centre - spread, centre + spread, args[0].size() @ args[1].size(), ma.shape[-1])


def _softplus(op: Op, args: tuple[Any, ...], kwargs: dict[str, Any], rounding: Rounding) -> Interval:
    """log(1 + exp(beta x)) / beta, and x itself where beta x > threshold: there it falls by log(1 + exp(-threshold)) /
    beta, at either side of that place where the test is rounded."""
    x: Interval = args[0]
    beta, threshold = (*(float(v) for v in args[1:]), *(1.0, 20.0)[len(args) - 1 :])
    if beta <= 0 or threshold < 0:
        raise unsupported(op, "with a negative beta or threshold")
    low, high = (op.target(end, *args[1:], **kwargs) for end in (x.low, x.high))
    near = threshold / beta * (1 - 2.0**-20), threshold / beta * (1 + 2.0**-20)
    there = (x.low <= near[1]) & (x.high >= near[0])
    low = torch.where(there, low.clamp(max=near[0]), low)
    high = torch.where(there, high.clamp(min=near[1] + math.exp(-threshold) / beta), high)
    return rounding.elementary(low, high, torch.maximum(low.abs(), high.abs()))


_RULES: dict[str, Callable[[Op, tuple[Any, ...], dict[str, Any], Rounding], Any]] = {
    "add": _sum,
    "sub": _sum,
    "neg": _neg,
    "abs": _abs,
    "mul": _mul,
    "div": _div,
    "reciprocal": _reciprocal,
    "round": _round,
    "softplus": _softplus,
    **_waves.RULES,
    "pow": _pow,
    "sqrt": _root,
    "rsqrt": _root,
    "log": _root,
    **dict.fromkeys(("mm", "bmm", "matmul"), _matmul),
    "_softmax": _attention.softmax,
    "_safe_softmax": _attention.softmax,
    "native_layer_norm": _norms.layer_norm,
    "logsumexp": _logsumexp.interval,
    **_choice.RULES,
}
