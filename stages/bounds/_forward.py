"""Linear functions of the inputs that enclose every value of a network, carried forward: cheap where inputs are few.

With x = c + r e, e in [-1, 1]^n, the boxes of the inputs, a value h is enclosed by two affine functions of e,

    m(e) - d(e) <= h(x) <= m(e) + d(e),        m(e) = m_0 + sum_j m_j e_j,  d likewise, d >= 0 on the box.

A linear operation L takes m to L m and d to |L| d. Elsewhere the lines of `_relax` are laid through both functions, the
line below through m - d where it rises and through m + d where it falls; what has no lines becomes its interval.
A value costs n + 1 columns, where a backward pass costs every open neuron two rows through all layers below: so this
pays for a handful of inputs and thousands of boxes. Inputs that are fixed in every box have no column.

Rounding: each step moves d_0 outward by its share (`Rounding`) of |m| + |d|, summed over the columns. These sums bound
the values themselves, for |e_j| <= 1, so they cover what float32 loses in computing them too.
Source: Wang et al., "Efficient Formal Safety Analysis of Neural Networks", 2018, section 3. Departures: midpoints
instead of ends, any lines instead of those of ReLU, rounding.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stages.bounds import _ops
from stages.bounds._backward import Chain
from stages.bounds._interval import TINY, Interval
from stages.bounds._trace import Op, fill
from stages.method import InputError

_SPARE = 1 + 2.0**-20


@dataclass(frozen=True, slots=True)
class Band:
    """m and d as columns [B, n + 1, ...], the constants last."""

    middle: Tensor
    spread: Tensor

    def size(self) -> Tensor:
        """[B, ...]: no less than |h| anywhere, nor than what any sum over the columns adds up."""
        return _SPARE * (self.middle.abs() + self.spread.abs()).sum(1)

    def wider(self, margin: Tensor) -> "Band":
        """The margin [B, ...] is added to d_0."""
        return Band(self.middle, torch.cat([self.spread[:, :-1], (self.spread[:, -1] + margin).unsqueeze(1)], 1))

    def moved(self, by: Tensor, sign: int = 1) -> "Band":
        """sign h + by."""
        middle = sign * self.middle
        return Band(torch.cat([middle[:, :-1], (middle[:, -1] + by).unsqueeze(1)], 1), self.spread)


class Bands:
    """The bands of a chain's values. `refine` before an operation is followed, `follow` after it."""

    def __init__(self, chain: Chain) -> None:
        self.chain = chain
        shape = chain.ends.inside.low.shape
        middle, radius = (part.flatten(1) for part in chain.ends.inside.split())
        self.live = live = (radius > 0).any(0).nonzero().squeeze(1)
        self.columns = len(live) + 1
        columns = middle.new_zeros(len(middle), self.columns, middle.shape[1])
        columns[:, torch.arange(len(live)), live] = radius[:, live]
        columns[:, -1] = middle
        columns = columns.view(shape[0], self.columns, *shape[1:])
        start = Band(columns, torch.zeros_like(columns))
        self.held: dict[str, Any] = {chain.graph.input: start.wider(4 * chain.own * start.size() + TINY)}
        self.last = {name: i for i, op in enumerate(chain.graph.ops) for name in op.reads()}
        self.place = {op.result: i for i, op in enumerate(chain.graph.ops)}

    def refine(self, op: Op) -> None:
        """The boxes of what the operation reads become the intersection with what their bands span."""
        for name in self.chain.operands(op):
            if isinstance(self.held[name], Band):
                self.chain.tighten(name, *self._span(self.held[name]))

    def follow(self, op: Op) -> None:
        """The band of the operation's result; bands that nobody reads any more are dropped."""
        if not op.counts and self.chain.graph.stride(op.result) != math.prod(self.chain.shape(op.result)[1:]):
            raise _moves(op)
        args, kwargs = fill(op.args, {**self.chain.values, **self.held}), fill(dict(op.kwargs), self.chain.values)
        if op.counts:
            self.held[op.result] = self.chain.cast(op.target(*_each(args, lambda band: _flat(band.middle)), **kwargs))
        elif not self.chain.is_linear(op):
            self.held[op.result] = self._lined(op)
        elif op.kind == "getitem":
            self.held[op.result] = args[0][args[1]]
        elif op.kind in {"add", "sub", "neg"}:
            bands = {name: band for name, band in self.held.items() if isinstance(band, Band)}
            self.held[op.result] = self._sum(op, fill(op.args, {**self.chain.values, **bands}))
        else:
            self.held[op.result] = self._linear(op, args, kwargs)
        for name in op.reads():
            if self.last[name] <= self.place[op.result]:
                self.held.pop(name, None)

    def _span(self, band: Band) -> tuple[Tensor, Tensor]:
        low, high = band.middle - band.spread, band.middle + band.spread
        slack = self.chain.rounding.share(self.columns) * band.size() + TINY
        return (
            low[:, -1] - low[:, :-1].abs().sum(1) - slack,
            high[:, -1] + high[:, :-1].abs().sum(1) + slack,
        )

    def _linear(self, op: Op, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        boxes = _each(args, lambda band: Interval(_flat(band.middle), _flat(band.middle)))
        if not _ops.is_affine(op, boxes):
            return self._moved(op, args, kwargs)
        [band] = [arg for arg in args if isinstance(arg, Band)]
        flat = _flat(band.middle)
        piece = _ops.parts(op, boxes, kwargs)
        middle = op.target(*_each(args, lambda _: flat), **kwargs)
        rest: tuple[Any, ...] = ()
        if isinstance(middle, tuple):
            middle, *more = middle
            rest = tuple(more)
        tall = self._tall(op, middle)
        if isinstance(piece.offset, Tensor):
            # The operation with a zero operand is its offset; every column but the last must do without.
            offset = op.target(*_each(args, lambda _: torch.zeros_like(flat[:1])), **kwargs)
            offset = offset[0] if isinstance(offset, tuple) else offset
            tall = torch.cat([tall[:, :-1] - offset, tall[:, -1:]], 1)
        spread = self._tall(op, piece.magnitude(_flat(band.spread)))
        share = self.chain.rounding.share(piece.terms + 2)
        # One for each image, where constants that are repeated for every column are not.
        single = _ops.parts(op, fill(op.args, self.chain.values), kwargs)
        margin = single.magnitude(band.size()) + self.columns * torch.as_tensor(piece.offset)
        found = Band(tall, spread).wider(2 * share * margin + TINY)
        return (found, *rest) if rest else found

    def _moved(self, op: Op, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Entries moved about; constants that come in beside them belong to the last column of the middle alone."""
        middle, spread, fixed = (
            op.target(*_each(args, part), **kwargs)
            for part in (
                lambda band: _flat(band.middle),
                lambda band: _flat(band.spread),
                lambda band: torch.zeros_like(_flat(band.middle)),
            )
        )
        if isinstance(middle, list | tuple):
            return tuple(Band(self._tall(op, m), self._tall(op, s)) for m, s in zip(middle, spread, strict=True))
        tall, spread, fixed = (self._tall(op, part) for part in (middle, spread, fixed))
        return Band(torch.cat([tall[:, :-1] - fixed[:, :-1], tall[:, -1:]], 1), spread - fixed)

    def _sum(self, op: Op, args: tuple[Any, ...]) -> Band:
        if op.kind == "neg":
            return Band(-args[0].middle, args[0].spread)
        left, right = args[:2]
        sign = -1 if op.kind == "sub" else 1
        share = 2 * self.chain.rounding.share(2)
        if isinstance(left, Band) and isinstance(right, Band):
            both = Band(left.middle + sign * right.middle, left.spread + right.spread)
            return both.wider(share * (left.size() + right.size()) + TINY)
        band, fixed = (left, right) if isinstance(left, Band) else (right, left)
        fixed = torch.as_tensor(fixed, dtype=band.middle.dtype, device=band.middle.device)
        shape = (band.middle[:1, -1] + fixed).shape
        shape = torch.Size((len(band.middle), *shape[1:]))
        columns = band.middle.shape[1]
        wide = Band(*(part.expand(shape[0], columns, *shape[1:]) for part in (band.middle, band.spread)))
        found = wide.moved(sign * fixed) if band is left else wide.moved(fixed, sign)
        return found.wider(share * (wide.size() + fixed.abs()) + TINY)

    def _lined(self, op: Op) -> Any:
        lines = self.chain.lines.get(op.result)
        if lines is None or not all(isinstance(self.held[name], Band) for name in lines.slopes):
            return self._interval(op)
        kind = self.chain.kind
        result = self.chain.values[op.result]
        middle = result.low.new_zeros(len(result.low), self.columns, *result.low.shape[1:])
        spread, size = torch.zeros_like(middle), torch.zeros_like(result.low)
        for name, (down, up) in lines.slopes.items():
            band: Band = self.held[name]
            # Half the sum and half the difference of the two lines, each through the end that it needs.
            below, above = down.expand_as(result.low).unsqueeze(1), up.expand_as(result.low).unsqueeze(1)
            middle = middle + (above + below) / 2 * band.middle + (above.abs() - below.abs()) / 2 * band.spread
            spread = spread + (above - below) / 2 * band.middle + (above.abs() + below.abs()) / 2 * band.spread
            size = size + (down.abs() + up.abs()) * band.size()
        low, high = lines.low.to(kind), lines.high.to(kind)
        found = Band(middle, spread).moved((high + low) / 2).wider((high - low) / 2)
        share = self.chain.rounding.share(4)
        return found.wider(share * (size + low.abs() + high.abs()) + TINY)

    def _interval(self, op: Op) -> Any:
        result = self.chain.values[op.result]
        if isinstance(result, tuple):
            return tuple(self._spanned(part) if isinstance(part, Interval) else part for part in result)
        return self._spanned(result)

    def _spanned(self, box: Interval) -> Band:
        middle, radius = box.split()
        zeros = middle.new_zeros(len(middle), self.columns - 1, *middle.shape[1:])
        wide = radius + 4 * self.chain.own * box.size() + TINY
        return Band(torch.cat([zeros, middle.unsqueeze(1)], 1), torch.cat([zeros, wide.unsqueeze(1)], 1))

    def _tall(self, op: Op, columns: Tensor) -> Tensor:
        if self.chain.graph.strides.get(op.result) != math.prod(columns.shape[1:]):
            raise _moves(op)
        return columns.reshape(-1, self.columns, *columns.shape[1:])


def _moves(op: Op) -> InputError:
    return InputError(f'forward bounds: "{op.kind}" moves the batch; use other bounds')


def _flat(columns: Tensor) -> Tensor:
    return columns.reshape(-1, *columns.shape[2:])


def _each(args: Any, swap: Any) -> Any:
    if isinstance(args, Band):
        return swap(args)
    if isinstance(args, list | tuple):
        return type(args)(_each(arg, swap) for arg in args)
    return args
