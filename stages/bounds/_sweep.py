"""From the image to the logits: boxes of every value, tightened backward where a method asks for it; then the rows."""

from collections.abc import Callable

import torch
from torch import Tensor

from stages.bounds import _relax, _special  # noqa: F401  the latter registers its rules
from stages.bounds._backward import Chain
from stages.bounds._interval import outward
from stages.bounds._trace import Op
from stages.bounds.base import TooLittleMemory
from stages.method import InputError

_COPIES = 6  # tensors of the size of the coefficients that live at once in one backward step
Bound = Callable[[Chain, str, Tensor], Tensor]


def follow(chain: Chain, refine: Callable[[Op], None] | None = None) -> None:
    """Every operation in turn; `refine` sees each non-linear one before its lines are drawn."""
    for op in chain.graph.ops:
        if op.result in chain.graph.moving:
            if refine is not None and not op.counts and not chain.is_linear(op):
                refine(op)
            chain.follow(op)


def logits(chain: Chain, rows: Tensor, memory: float, bound: Bound = Chain.bound) -> Tensor:
    """[B, R] float64: rows [B, R, K] times the logits, never below what interval arithmetic gives."""
    shape = chain.shape(chain.graph.output)
    if shape != (rows.shape[0], rows.shape[2]):
        raise InputError(f"rows: expected [B, R, K] for logits {tuple(shape)}, got {tuple(rows.shape)}")
    found = []
    for part in torch.split(rows.to(chain.kind).transpose(0, 1), block(chain, memory)):
        plain = chain.bound(chain.graph.output, part, boxes=True)
        found.append(torch.maximum(plain, bound(chain, chain.graph.output, part)))
    bounds = torch.cat(found).T
    if not bool(torch.isfinite(bounds).all()):
        raise InputError("bounds: not finite; are the weights, or does the box reach too far?")
    return bounds


def tighten(chain: Chain, op: Op, memory: float, bound: Bound = Chain.bound) -> None:
    """Bounds from the image for what `op` reads, where they can matter (`_relax.crossed`)."""
    for name in chain.operands(op):
        if name in chain.fronts or name == chain.graph.input or chain.sharp.get(name) or name in chain.tight:
            continue
        chain.tight.add(name)
        box = chain.values[name]
        matters = _relax.crossed(op, chain.values, box)
        open_ = chain.flat(name, matters)
        count = int(open_.sum(1).max())
        if count == 0:
            continue
        order = open_.int().argsort(dim=1, descending=True, stable=True)[:, :count]
        low, high = chain.flat(name, box.low), chain.flat(name, box.high)
        for at in torch.split(order, max(1, block(chain, memory) // 2), 1):
            found = bound(chain, name, _units(chain, name, at, open_.shape[1]))
            below, above = found[: at.shape[1]].T, -found[at.shape[1] :].T
            # An image with fewer open entries than its neighbours gets rows that it did not ask for: its answer must
            # not depend on its neighbours, so those are left aside.
            asked = open_.gather(1, at)
            below = torch.where(asked, outward(below, chain.kind, -torch.inf), low.gather(1, at))
            above = torch.where(asked, outward(above, chain.kind, torch.inf), high.gather(1, at))
            low, high = low.scatter(1, at, below), high.scatter(1, at, above)
        chain.tighten(name, chain.unflat(name, low), chain.unflat(name, high))


def block(chain: Chain, memory: float) -> int:
    """How many rows fit: a row of coefficients is B times the widest value; some copies of it live at once."""
    widest = max(chain.shape(op.result).numel() for op in chain.done) if chain.done else 1
    size = widest * (8 if chain.kind == torch.float64 else 4) * _COPIES
    rows = int(memory * 2**30 // size)
    if rows < 1:
        raise TooLittleMemory(
            f"memory: {memory:g} GiB hold no row of coefficients for {chain.batch} images, which takes "
            f"{size / 2**30:.3g} GiB; give more memory"
        )
    return rows


def _units(chain: Chain, name: str, at: Tensor, width: int) -> Tensor:
    """[2 r, *shape]: one row +1 and one row -1 for every entry at [B, r]."""
    ones = torch.zeros(at.shape[1], chain.batch, width, dtype=chain.kind, device=at.device)
    ones = chain.unflat(name, ones.scatter(2, at.T.unsqueeze(-1), 1.0))
    return torch.cat([ones, -ones])
