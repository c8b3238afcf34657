"""From the image to the logits: boxes of every value, tightened backward where a method asks for it; then the rows.

Memory. With w bytes a number (4, or 8 in float64), N the entries of all values of one image and n those of the widest,
B images and R rows at once take at most

    w B (16 N + 6 R n)

bytes: boxes, offsets, slacks and lines of every value, padded lines where windows are cut out of them, and the copies
of the coefficients that live in one backward step. A cap of M GiB gives half to either term: images are taken in groups
with w 16 N B <= M 2^29, and rows in blocks with w 6 R n B <= M 2^29. Rows of single neurons (`_neurons`) gather their
lines, which makes it 12 for 6; R counts the rows of all images then, so that there is no B, and n is what a window
holds. A cap that one image and one row do not fit is refused. With more memory than that allows, a group's widest
value stays below 4 MiB and a block near 4 MiB of coefficients, which caches hold, or near 16 MiB where few rows are
asked for, so that a block's fixed cost counts. Not counted: what kernels take for themselves, and that a map is padded
by as much as windows reach beyond it, up to six times its size.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from stages.bounds import _layout, _neurons, _relax, _special  # noqa: F401  the latter registers its rules
from stages.bounds._backward import Chain
from stages.bounds._interval import outward
from stages.bounds._trace import Op, Trace, trace
from stages.bounds.base import Ball, Box, TooLittleMemory
from stages.method import InputError

COPIES = 6  # tensors of the size of the coefficients that live at once in one backward step
_HELD = 16  # numbers kept for every entry of every value
_CACHE, _FEW = 2**22, 2**24  # bytes
Rows = Chain | _neurons.Neurons
Bound = Callable[[Rows, str, Tensor], Tensor]


def plain(rows: Rows, name: str, slopes: Tensor) -> Tensor:
    """[R, B] float64: the bounds themselves, nothing optimised."""
    return rows.bound(name, slopes)


def grouped(
    net: nn.Module,
    box: Box,
    rows: Tensor,
    lower: Callable[[Box, Tensor], Tensor],
    memory: float,
    double: bool = False,
    copies: int = COPIES,
    graph: Trace | None = None,
) -> Tensor:
    """[B, R]: `lower` of one group of images after the other, each as many as fit. `graph` is the network's trace."""
    _layout.keep_pages()
    size = fitting(graph or trace(net, box.low), 8 if double else box.low.element_size(), memory, copies)
    if size >= len(box.low):
        return lower(box, rows)
    size = _even(len(rows), size)
    return torch.cat([lower(part(box, slice(at, at + size)), rows[at : at + size]) for at in range(0, len(rows), size)])


def _even(count: int, most: int) -> int:
    """The size of as few parts as there must be, all nearly alike."""
    return -(-count // -(-count // most))


def part(box: Box, images: slice | Tensor) -> Box:
    """The box of some of the images."""
    ball = None if box.ball is None else Ball(box.ball.centre[images], box.ball.norm, box.ball.eps)
    return Box(box.low[images], box.high[images], ball)


def fitting(graph: Trace, width: int, memory: float, copies: int = COPIES) -> int:
    """How many images to take at once. Raises `TooLittleMemory` where the cap holds not even one, with one row."""
    widest, total = max(graph.entries.values()), sum(graph.entries.values())
    half = memory * 2**29
    fits = int(min(half // (width * _HELD * total), half // (width * copies * widest)))
    if fits < 1:
        least = 2 * width * max(_HELD * total, copies * widest) / 2**30
        raise TooLittleMemory(
            f"memory: {memory:g} GiB hold no row of coefficients for one image, which takes {least:.3g} GiB with the "
            "image's bounds; give more memory, or use ibp, which keeps none"
        )
    return min(fits, max(1, _CACHE // (width * widest)))


def follow(chain: Chain, refine: Callable[[Op], None] | None = None) -> None:
    """Every operation in turn; `refine` sees each non-linear one before its lines are drawn."""
    for op in chain.graph.ops:
        if op.result in chain.graph.moving:
            if refine is not None and not op.counts and not chain.is_linear(op):
                refine(op)
            chain.follow(op)


def logits(
    chain: Chain,
    rows: Tensor,
    memory: float,
    bound: Callable[[Chain, str, Tensor], Tensor] = plain,
    copies: int = COPIES,
) -> Tensor:
    """[B, R] float64: rows [B, R, K] times the logits, never below what interval arithmetic gives."""
    shape = chain.shape(chain.graph.output)
    if shape != (rows.shape[0], rows.shape[2]):
        raise InputError(f"rows: expected [B, R, K] for logits {tuple(shape)}, got {tuple(rows.shape)}")
    found = []
    for some in torch.split(rows.to(chain.kind).transpose(0, 1), block(chain, memory, copies, rows.shape[1])):
        least = chain.bound(chain.graph.output, some, boxes=True)
        found.append(least if bound is plain else torch.maximum(least, bound(chain, chain.graph.output, some)))
    bounds = torch.cat(found).T
    if not bool(torch.isfinite(bounds).all()):
        raise InputError("bounds: not finite; are the weights, or does the box reach too far?")
    return bounds


def tighten(
    chain: Chain, op: Op, memory: float, bound: Bound = plain, copies: int = COPIES, sharp: bool = True
) -> None:
    """Bounds from the image for what `op` reads, where they can matter (`_relax.crossed`), and, where `sharp`, where
    intervals are not exact already.

    Of a ReLU's input the end nearer to zero is asked for first: where that settles the sign, the line is exact whatever
    the other end, which keeps its interval.
    """
    for name in chain.operands(op):
        exact = sharp and chain.sharp.get(name)
        if name in chain.fronts or name == chain.graph.input or exact or name in chain.tight:
            continue
        chain.tight.add(name)
        box = chain.values[name]
        ends = chain.flat(name, box.low), chain.flat(name, box.high)
        open_ = chain.flat(name, _relax.crossed(op, chain.values, box))
        nearer = op.kind == "relu"
        first = torch.where(nearer & (ends[1] < -ends[0]), -1.0, 1.0).to(chain.kind)
        way = _neurons.way(chain, name)
        for side in (first, -first):
            if way is None:
                ends = _ask(chain, name, ends, side, open_, block(chain, memory, copies), bound)
            else:
                ends = _ask_neurons(way, ends, side, open_, memory, bound, copies)
            open_ = (ends[0] < 0) & (ends[1] > 0) if nearer else open_
        chain.tighten(name, *(chain.unflat(name, end) for end in ends))


def _ask_neurons(
    way: _neurons.Way,
    ends: tuple[Tensor, Tensor],
    side: Tensor,
    open_: Tensor,
    memory: float,
    bound: Bound,
    copies: int,
) -> tuple[Tensor, Tensor]:
    """As `_ask`, with a row for each open entry and none for others."""
    low, high = (end.clone() for end in ends)
    kind = way.chain.kind
    images, entries = open_.nonzero().unbind(1)
    row = way.entries() * (8 if kind == torch.float64 else 4)
    most = _rows_at_once(row, memory, copies * _neurons.COPIES // COPIES, 1)
    for image, entry in zip(torch.split(images, most), torch.split(entries, most), strict=True):
        if len(image):
            signs = side[image, entry]
            rows = _neurons.Neurons(way, image, entry, signs)
            found = bound(rows, way.name, signs.new_ones(1, len(signs)))[0]
            above = torch.minimum(high[image, entry], outward(-found, kind, torch.inf))
            below = torch.maximum(low[image, entry], outward(found, kind, -torch.inf))
            low[image, entry] = torch.where(signs > 0, below, low[image, entry])
            high[image, entry] = torch.where(signs < 0, above, high[image, entry])
    return low, high


def _ask(
    chain: Chain, name: str, ends: tuple[Tensor, Tensor], side: Tensor, open_: Tensor, most: int, bound: Bound
) -> tuple[Tensor, Tensor]:
    """`ends` [B, n] with the low end of each open entry bounded anew where `side` is 1, the high end where it is -1."""
    low, high = ends
    count = int(open_.sum(1).max())
    order = open_.int().argsort(dim=1, descending=True, stable=True)[:, :count]
    for at in torch.split(order, most, 1) if count else ():
        signs = side.gather(1, at)
        units = torch.zeros(at.shape[1], *low.shape, dtype=chain.kind, device=at.device)
        units = units.scatter_(2, at.T.unsqueeze(-1), signs.T.unsqueeze(-1))
        found = bound(chain, name, chain.unflat(name, units)).T
        # An image with fewer open entries than its neighbours gets rows that it did not ask for: its answer must
        # not depend on its neighbours, so those are left aside.
        asked = open_.gather(1, at)
        old_low, old_high = low.gather(1, at), high.gather(1, at)
        below = torch.maximum(old_low, outward(found, chain.kind, -torch.inf))
        above = torch.minimum(old_high, outward(-found, chain.kind, torch.inf))
        low = low.scatter(1, at, torch.where(asked & (signs > 0), below, old_low))
        high = high.scatter(1, at, torch.where(asked & (signs < 0), above, old_high))
    return low, high


def block(chain: Chain, memory: float, copies: int = COPIES, asked: int = 0) -> int:
    """How many rows to take at once, for the images of the chain, where so many are asked for.

    Raises `TooLittleMemory` where not even one fits.
    """
    row = chain.batch * max(chain.graph.entries.values()) * (8 if chain.kind == torch.float64 else 4)
    return _rows_at_once(row, memory, copies, chain.batch, asked)


def _rows_at_once(row: int, memory: float, copies: int, images: int, asked: int = 0) -> int:
    fits = int(memory * 2**29 // (row * copies))
    if fits < 1:
        raise TooLittleMemory(
            f"memory: {memory:g} GiB hold no row of coefficients for {images} images, which takes "
            f"{row * copies / 2**29:.3g} GiB; give more memory or fewer images at once"
        )
    near = max(1, (_FEW if asked else _CACHE) // row)
    return min(fits, -(-asked // max(1, round(asked / near))) if asked else near)
