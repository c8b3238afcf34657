"""How much linear operations add to the slack of what they make (`_backward`), and how large values are."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stages.bounds import _linear, _ops
from stages.bounds._interval import TINY, Interval, gamma
from stages.bounds._trace import Op, fill

if TYPE_CHECKING:
    from stages.bounds._backward import Chain


def paid(chain: "Chain", op: Op, args: tuple[Any, ...], kwargs: dict[str, Any], sums: float) -> Any:
    """The slack of a linear result that is `Chain.paid`, in few steps; `sums` is what its coefficients lose."""
    result = chain.values[op.result]
    if op.kind in {"add", "sub"}:
        share = chain.share(2) + sums
        total = share * result.size()
        for arg in op.args[:2]:
            if arg.name in chain.offset:
                total = total.add_(thin(chain.offset[arg.name]).abs(), alpha=share)
            if arg.name in chain.slack:
                total = total.add_(chain.slack[arg.name], alpha=1 + 4 * share)
        return chain.fans(op, total)
    piece, [name] = _ops.parts(op, args, kwargs), chain.operands(op)
    # A bias is an offset as it stands; else ours is a sum like the network's.
    kept = op.kind in {"convolution", "addmm"} and name not in chain.offset
    share = (gamma(piece.terms + 2, chain.rounding.unit) if kept else chain.share(piece.terms)) + sums
    grown = 1.002 * (1 + 4 * share)
    once = grown * (share + 8 * chain.dots) * torch.as_tensor(piece.offset, dtype=chain.kind) + TINY
    size = args[0 if isinstance(args[0], Interval) else 1].size()
    if name in chain.offset:
        size = size + thin(chain.offset[name]).abs()
    spread = torch.add(chain.slack[name], size, alpha=share) if name in chain.slack else share * size
    slack = piece.margin(spread, once, grown)
    return (slack, *result[1:]) if isinstance(result, tuple) else chain.fans(op, slack)


def general(chain: "Chain", op: Op, args: tuple[Any, ...], kwargs: dict[str, Any], sums: float) -> Any:
    """The slack of any linear result, not `Chain.paid`."""
    result, names = chain.values[op.result], chain.operands(op)
    before = {name: chain.offset_of(name) for name in names}
    old = {name: chain.slack.get(name, torch.zeros_like(chain.values[name].low)) for name in before}
    size = {name: chain.values[name].size() + before[name].abs() for name in before}
    if _ops.is_affine(op, args):
        piece = _ops.parts(op, args, kwargs)
        share = chain.share(piece.terms) + sums
        [name] = before
        spread = piece.magnitude(old[name] + share * size[name]) + share * piece.offset
        slack = (1 + 4 * share) * spread + TINY
        return (slack, *result[1:]) if isinstance(result, tuple) else chain.fans(op, slack)
    if op.kind in {"add", "sub"}:
        share = chain.share(2) + sums
        parts = [(old[n], size[n]) for n in (getattr(arg, "name", None) for arg in op.args[:2]) if n in before]
        fixed = [torch.as_tensor(a).abs() for a in args[:2] if not isinstance(a, Interval)]
        total = sum(e + share * s for e, s in parts) + share * sum(fixed)
        return chain.fans(op, (1 + 4 * share) * total + TINY)
    # The rest only moves entries about; where the transpose sums copies of one, that sum rounds. Constants that
    # are moved along have no slack.
    if op.kind in _linear.COPIES and set(names) <= chain.paid:
        chain.paid.add(op.result)
    moved = {name: (1 + 4 * sums) * (old[name] + sums * size[name]) for name in before}
    if op.kind == "constant_pad_nd":
        return chain.fans(op, op.target(moved[op.reads()[0]], args[1]))
    if op.kind == "neg":
        return chain.fans(op, moved[op.reads()[0]])
    still = {name: _none(chain.values[name]) for name in op.reads() if name not in moved}
    return chain.fans(op, op.target(*fill(op.args, {**chain.values, **still, **moved}), **kwargs))


def _none(value: Any) -> Any:
    return torch.zeros_like(value) if isinstance(value, Tensor) and value.is_floating_point() else value


def alike(chain: "Chain", op: Op) -> bool:
    """Whether all that goes in depends on the images and has the shape of the result."""
    sizes = [chain.shape(name) for name in chain.operands(op)]
    tensors = 1 if op.kind.startswith("_native") else 2
    return len([a for a in op.args[:tensors] if getattr(a, "name", None) in chain.operands(op)]) == tensors and all(
        size == chain.shape(op.result) and len(size) > 1 for size in sizes
    )


def most(chain: "Chain", name: str) -> Tensor:
    """[B] float64: no less than |x| + |b| of any of an image's entries; [1] where their places are not known."""
    if name not in chain.mosts:
        box = chain.values[name]
        found = torch.maximum(_largest(chain, name, box.high), -_largest(chain, name, box.low, -1))
        if name in chain.offset:
            found = found + _largest(chain, name, thin(chain.offset[name]).abs())
        chain.mosts[name] = found
    return chain.mosts[name]


def _largest(chain: "Chain", name: str, value: Tensor, side: int = 1) -> Tensor:
    """The largest entries, or the least if `side` is -1."""
    value, shape = value.detach(), chain.shape(name)
    dims = tuple(range(1, value.dim()))
    if len(shape) < 2 or shape[0] != chain.batch or chain.graph.strides.get(name) != shape[1:].numel():
        value = chain.flat(name, value.expand(shape)) if name in chain.graph.strides else value.reshape(1, -1)
        dims = (1,)
    return (value.amax(dims) if side > 0 else value.amin(dims)).double()


def thin(value: Tensor) -> Tensor:
    """Without the repetitions of a value that was expanded, in all dimensions but that of the channels."""
    for dim in range(value.dim()):
        if dim != 1 and value.stride(dim) == 0:
            value = value.narrow(dim, 0, 1)
    return value
