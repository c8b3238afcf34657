"""Transposes of linear operations on rows of coefficients: what y = L x + b makes of a^T y is (L^T a)^T x + a^T b.

Coefficients of a value of shape [B, ...] are [R, B, ...], one row for each linear function that is being bounded.
Convolutions stay convolutions. What has no rule here is transposed by automatic differentiation of the operation
itself, so every linear operation that has an interval rule has a backward rule too.
"""

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from stages.bounds import _layout, _ops, _phases, _stored
from stages.bounds._interval import Interval
from stages.bounds._trace import Op, fill

Pulled = dict[str, Tensor]
_FEW = 4
COPIES = frozenset({"view", "_unsafe_view", "reshape", "squeeze", "unsqueeze", "clone", "alias", "detach", "_to_copy"})
_REPEATS = frozenset(
    {"expand", "repeat", "index", "index_select", "gather", "upsample_nearest2d", "unfold", "cat", "stack"}
)


def pull(op: Op, values: dict[str, Any], slopes: Any) -> Pulled:
    """[R, ...] of each bounded operand, by name, from `slopes` [R, ...] of the result (a dict for a tuple)."""
    args = fill(op.args, values)
    if isinstance(slopes, dict):
        if op.kind != "_native_batch_norm_legit_no_training":
            return _by_autograd(op, values, slopes)
        slopes = slopes[0]
    rule = _mean if _of_pixels(op, args) else _RULES.get(op.kind)
    if op.kind in COPIES and isinstance(args[0], Interval):
        return {op.args[0].name: _layout.alike(slopes.reshape(len(slopes), *args[0].low.shape), args[0].low)}
    return _by_autograd(op, values, slopes) if rule is None else rule(op, args, slopes)


def products(op: Op, values: dict[str, Any], result: torch.Size, batch: int) -> int:
    """At most how many products one coefficient of an operand sums when `pull` forms it."""
    args = fill(op.args, values)
    if op.kind == "convolution":
        weight, transposed, groups = args[1], args[6], args[8]
        return int(weight.numel() // weight.shape[0 if transposed else 1] // (1 if transposed else groups))
    if op.kind == "addmm":
        return int(args[2].shape[1])
    if op.kind in {"mm", "matmul", "bmm"} and _ops.is_affine(op, args):
        return int(args[1].shape[-1] if isinstance(args[0], Interval) else args[0].shape[-2])
    if op.kind in {"avg_pool2d", "avg_pool3d", "max_pool2d_with_indices", "max_pool3d_with_indices"}:
        return int(math.prod(args[1]) ** (3 // len(args[1])))
    if op.kind in {"adaptive_avg_pool2d", "_adaptive_avg_pool2d", "adaptive_max_pool2d"}:
        return int(math.prod(result[-2:]) + math.prod(args[0].low.shape[-2:]))
    if op.kind in _REPEATS:
        return max(1, result.numel() // batch)
    smallest = min((int(values[name].low.numel()) for name in _moved(op, values)), default=1)
    return -(-int(result.numel()) // max(1, smallest))


def sum_to(slopes: Tensor, shape: torch.Size) -> Tensor:
    """The transpose of broadcasting [*shape] to the shape of a row of `slopes`."""
    row = slopes.shape[1:]
    if row == shape:
        return slopes
    padded = (1,) * (len(row) - len(shape)) + tuple(shape)
    spread = [i + 1 for i, (now, was) in enumerate(zip(row, padded, strict=True)) if now != was]
    if spread:
        slopes = slopes.sum(spread, keepdim=True)
    return slopes.reshape(len(slopes), *shape)


def _moved(op: Op, values: dict[str, Any]) -> list[str]:
    return [name for name in op.reads() if isinstance(values[name], Interval)]


def _convolution(op: Op, args: tuple[Any, ...], slopes: Tensor) -> Pulled:
    x, weight, _, stride, padding, dilation, transposed, _, groups = args
    sizes = x.low.shape[2:]
    flat, apart = _layout.merged(slopes)
    plain = not transposed and groups == 1
    if plain and (_thin(weight, stride, dilation, sizes) or _skips(weight, stride, padding)):
        back = _phases.transposed(flat, weight, each(stride, 2), each(padding, 2), list(sizes))
    elif transposed:
        back = torch.ops.aten.convolution(flat, weight, None, stride, padding, dilation, False, [0], groups)
    else:
        space = len(sizes)
        steps, pads, holes = (each(v, space) for v in (stride, padding, dilation))
        reach = [
            (flat.shape[2 + i] - 1) * steps[i] - 2 * pads[i] + holes[i] * (weight.shape[2 + i] - 1) + 1
            for i in range(space)
        ]
        rest = [int(size) - end for size, end in zip(sizes, reach, strict=True)]
        if any(r < 0 or r >= max(s, d) for r, s, d in zip(rest, steps, holes, strict=True)):
            return _folded(op, args, slopes)
        back = torch.ops.aten.convolution(flat, weight, None, steps, pads, holes, True, rest, groups)
    return {op.args[0].name: apart(back)}


def narrow(weight: Tensor, stride: list[int], dilation: list[int]) -> bool:
    """Whether a convolution has so few input channels that products and added patches are quicker."""
    return (
        weight.dim() == 4
        and weight.shape[1] <= _FEW
        and weight.shape[1:].numel() <= len(weight) * math.prod(each(stride, 2))
        and math.prod(dilation) == 1
    )


def _thin(weight: Tensor, stride: list[int], dilation: list[int], sizes: torch.Size) -> bool:
    """Whether pixels of so few channels are quicker several at a time."""
    if weight.dim() != 4 or weight.shape[1] > _FEW or len(weight) == 1 or math.prod(dilation) > 1:
        return False
    return weight.shape[2:].numel() > 1 and _phases.abreast(sizes[1], each(stride, 2)) > 1


def _skips(weight: Tensor, stride: list[int], padding: list[int]) -> bool:
    """Whether a convolution reads single pixels and steps over others."""
    return weight.dim() == 4 and weight.shape[2:].numel() == 1 < math.prod(each(stride, 2)) and not any(padding)


def skips(op: Op, values: dict[str, Any]) -> bool:
    """Whether an operation is a convolution that passes over most pixels."""
    if op.kind != "convolution":
        return False
    _, weight, _, stride, padding, _, transposed, _, groups = fill(op.args, values)
    return not transposed and groups == 1 and _skips(weight, stride, padding)


def add_skipping(op: Op, values: dict[str, Any], slopes: Tensor, there: Tensor) -> None:
    """Adds what `pull` gives to `there`, for a convolution that `skips`."""
    _, weight, _, stride, *_ = fill(op.args, values)
    down, along = each(stride, 2)
    flat, apart = _layout.merged(slopes)
    there[..., ::down, ::along].add_(apart(_phases.pixels(flat, weight)))


def _folded(op: Op, args: tuple[Any, ...], slopes: Tensor) -> Pulled:
    """A convolution whose stride leaves pixels out that a transposed one does not know of."""
    x, weight, _, stride, padding, dilation, _, _, groups = args
    flat = slopes.flatten(0, 1)
    like = flat.new_zeros(len(flat), *x.low.shape[1:]).requires_grad_()
    with torch.enable_grad():
        there = torch.ops.aten.convolution(like, weight, None, stride, padding, dilation, False, [0], groups)
    (back,) = torch.autograd.grad(there, like, flat, create_graph=torch.is_grad_enabled())
    return {op.args[0].name: back.view(*slopes.shape[:2], *back.shape[1:])}


def each(value: Any, space: int) -> list[int]:
    """A convolution's setting, one for each side."""
    return [int(v) for v in value] * (space if len(value) == 1 else 1)


def _batch_norm(op: Op, args: tuple[Any, ...], slopes: Tensor) -> Pulled:
    return {op.args[0].name: slopes * _stored.scale(args).view(-1, *(1,) * (args[0].low.dim() - 2))}


def _addmm(op: Op, args: tuple[Any, ...], slopes: Tensor) -> Pulled:
    return {op.args[1].name: slopes @ args[2].transpose(-1, -2)}


def _product(op: Op, args: tuple[Any, ...], slopes: Tensor) -> Pulled:
    if isinstance(args[0], Interval):
        return {op.args[0].name: sum_to(slopes @ args[1].transpose(-1, -2), args[0].low.shape)}
    if args[1].low.dim() == 1 or args[0].dim() == 1:
        return {op.args[1].name: (args[0].transpose(-1, -2) @ slopes.unsqueeze(-1)).squeeze(-1)}
    return {op.args[1].name: sum_to(args[0].transpose(-1, -2) @ slopes, args[1].low.shape)}


def _sum(op: Op, args: tuple[Any, ...], slopes: Tensor) -> Pulled:
    found: Pulled = {}
    for place, arg in enumerate(args[:2]):
        if isinstance(arg, Interval):
            part = sum_to(slopes if place == 0 or op.kind == "add" else -slopes, arg.low.shape)
            name = op.args[place].name
            found[name] = found[name] + part if name in found else part
    return found


def _neg(op: Op, args: tuple[Any, ...], slopes: Tensor) -> Pulled:
    del args
    return {op.args[0].name: -slopes}


def _scale(op: Op, args: tuple[Any, ...], slopes: Tensor) -> Pulled:
    place = 0 if isinstance(args[0], Interval) else 1
    return {op.args[place].name: sum_to(slopes * args[1 - place], args[place].low.shape)}


def _mean(op: Op, args: tuple[Any, ...], slopes: Tensor) -> Pulled:
    """A mean over pixels, as each one's share, which is laid out once."""
    x: Tensor = args[0].low
    share = (slopes / x[0, 0].numel()).reshape(*slopes.shape[:3], 1, 1)
    return {op.args[0].name: share.expand(len(slopes), *x.shape)}


def _of_pixels(op: Op, args: tuple[Any, ...]) -> bool:
    """Whether the result is the mean of each channel's pixels."""
    if op.kind == "mean":
        return args[0].low.dim() == 4 and len(args) > 1 and sorted(dim % 4 for dim in args[1] or ()) == [2, 3]
    return op.kind == "_adaptive_avg_pool2d" and args[0].low.dim() == 4 and list(args[1]) == [1, 1]


def _over(op: Op, args: tuple[Any, ...], slopes: Tensor) -> Pulled:
    return {op.args[0].name: sum_to(slopes / args[1], args[0].low.shape)}


def _permute(op: Op, args: tuple[Any, ...], slopes: Tensor) -> Pulled:
    order = [dim % (slopes.dim() - 1) for dim in args[1]]
    back = sorted(range(len(order)), key=order.__getitem__)
    return {op.args[0].name: slopes.permute(0, *(dim + 1 for dim in back))}


def _copy(op: Op, args: tuple[Any, ...], slopes: Tensor) -> Pulled:
    """What was there before is lost; autograd has no derivative of the operation."""
    value = args[1]
    return {op.args[1].name: sum_to(slopes, value.low.shape)} if isinstance(value, Interval) else {}


def _by_autograd(op: Op, values: dict[str, Any], slopes: Any) -> Pulled:
    names = list(dict.fromkeys(_moved(op, values)))
    zeros = {name: torch.zeros_like(values[name].low).requires_grad_() for name in names}
    with torch.enable_grad():
        result = op.target(*fill(op.args, values | zeros), **fill(dict(op.kwargs), values | zeros))
    picked = sorted(slopes) if isinstance(slopes, dict) else []
    ends = [result[i] for i in picked] if picked else [result]
    rows = [slopes[i] for i in picked] if picked else [slopes]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that it runs row by row where it cannot take them together
        back = torch.autograd.grad(
            ends,
            list(zeros.values()),
            rows,
            create_graph=torch.is_grad_enabled(),
            is_grads_batched=True,
            materialize_grads=True,
        )
    return {name: _layout.alike(part, values[name].low) for name, part in zip(names, back, strict=True)}


_RULES: dict[str, Callable[[Op, tuple[Any, ...], Tensor], Pulled]] = {
    "convolution": _convolution,
    "_native_batch_norm_legit_no_training": _batch_norm,
    "addmm": _addmm,
    "mm": _product,
    "bmm": _product,
    "matmul": _product,
    "add": _sum,
    "sub": _sum,
    "neg": _neg,
    "mul": _scale,
    "div": _over,
    "permute": _permute,
    "copy": _copy,
}
