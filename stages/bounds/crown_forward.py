"""CROWN for few inputs: boxes cut by linear functions carried forward first, then backward where a sign stays open."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from stages.bounds import _sweep
from stages.bounds._backward import Chain
from stages.bounds._forward import Bands
from stages.bounds._halfspace import offset
from stages.bounds._interval import UNITS, outward
from stages.bounds._telling import owed, shares
from stages.bounds._trace import trace
from stages.bounds.base import Box, Certifier
from stages.bounds.ibp import check


@dataclass(frozen=True, slots=True)
class Planes:
    """rows @ logits >= slopes @ x[free] + offset at every point x of the box; `lower` bounds it on all of the box.

    lower and offset float64 [B, R], slopes float64 [B, R, F]; free int64 [F] are the entries of the flat image that are
    not fixed in every box. owed [B, R, F]: of what the bound loses, the part that the range of each input is at fault
    for (`_telling`).
    """

    lower: Tensor
    offset: Tensor
    slopes: Tensor
    owed: Tensor
    free: Tensor


class CrownForward(Certifier):
    """As `crown`, with boxes cut first by linear functions of the inputs carried forward (`_forward`).

    On small boxes most signs are settled by the forward pass, n + 1 columns for those of the n inputs that are not
    fixed, and few neurons are left that need two backward rows each: so this serves thousands of small boxes at once.
    `double` computes in float64, which loses nothing to rounding where boxes are tiny and costs about
    twice the time. Never looser than `crown` in the same precision up to rounding.
    Raises `InputError` where an operation moves the batch.
    """

    arithmetic: Literal["real", "float32"] = "float32"
    double: bool = True
    memory: float = Field(default=2.0, gt=0)

    def lower(self, net: nn.Module, box: Box, rows: Tensor) -> Tensor:
        def lower(some: Box, theirs: Tensor) -> Tensor:
            chain, _ = self._chain(net, some)
            return outward(_sweep.logits(chain, theirs, self.memory), theirs.dtype, -float("inf"))

        return self._grouped(net, box, rows, lower)

    def planes(self, net: nn.Module, box: Box, rows: Tensor) -> Planes:
        """The linear functions whose least values are the bounds. Raises what `lower` raises."""
        fixed = (box.low == box.high).flatten(1).all(0)
        found = self._grouped(net, box, rows, partial(self._planes, net, fixed), faults=True)
        free = (~fixed).nonzero().squeeze(1)
        last = 2 + len(free)
        return Planes(found[..., 0], found[..., 1], found[..., 2:last], found[..., last:], free)

    def _grouped(
        self,
        net: nn.Module,
        box: Box,
        rows: Tensor,
        lower: Callable[[Box, Tensor], Tensor],
        faults: bool = False,
    ) -> Tensor:
        check(box, rows)
        double = self.double or self.arithmetic == "real"
        graph = trace(net, box.low)
        copies = _sweep.COPIES + faults * -(-sum(graph.entries.values()) // max(graph.entries.values()))
        columns = 1 + int((box.low < box.high).flatten(1).any(0).sum())
        return _sweep.grouped(net, box, rows, lower, self.memory, double, copies * columns, graph)

    def _planes(self, net: nn.Module, fixed: Tensor, box: Box, rows: Tensor) -> Tensor:
        """[B, R, 2 + 2 F]: lower bound, offset, slopes and what is owed to each input."""
        faults = dict[str, Tensor]()
        chain, live = self._chain(net, box, faults)
        size = torch.maximum(box.low.abs(), box.high.abs()).double().flatten(1)
        held = torch.where(fixed, box.low.double().flatten(1), 0.0)
        parts: list[Tensor] = []

        def bound(chain: Chain, name: str, some: Tensor) -> Tensor:
            watch: dict[str, Tensor] = {}
            least = chain.bound(name, some, watch=watch)
            slopes = watch.get(chain.graph.input, some.new_zeros(len(some), *box.low.shape))
            loss = chain.input_loss()
            moved = chain.ends.least(slopes, loss)
            flat = slopes.flatten(2).double()
            start = offset(least, moved, flat, size, loss) + (flat * held).sum(2)
            lost = torch.zeros_like(flat)
            lost[..., live] = owed(chain, faults, watch, len(some), len(live)).double()
            parts.append(torch.cat([start.unsqueeze(2), flat[..., ~fixed], lost[..., ~fixed]], 2))
            return least

        lower = _sweep.logits(chain, rows, self.memory, bound)
        return torch.cat([lower.unsqueeze(2), torch.cat(parts).transpose(0, 1)], 2)

    def _chain(self, net: nn.Module, box: Box, faults: dict[str, Tensor] | None = None) -> tuple[Chain, Tensor]:
        """With all operations followed, and the inputs that move; `faults` is filled with `_telling.shares`."""
        chain = Chain(net, box, UNITS[self.arithmetic], self.double or self.arithmetic == "real")
        bands = Bands(chain)
        for op in chain.graph.ops:
            if op.result in chain.graph.moving:
                if not op.counts and not chain.is_linear(op):
                    bands.refine(op)
                    _sweep.tighten(chain, op, self.memory)
                chain.follow(op)
                found = None if faults is None else shares(chain, bands, op)
                if faults is not None and found is not None:
                    faults[op.result] = found
                bands.follow(op)
        return chain, bands.live
