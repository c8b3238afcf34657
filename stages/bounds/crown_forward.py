"""CROWN for few inputs: boxes cut by linear functions carried forward first, then backward where a sign stays open."""

from functools import partial
from typing import Literal

from pydantic import Field
from torch import Tensor, nn

from stages.bounds import _sweep
from stages.bounds._backward import Chain
from stages.bounds._forward import Bands
from stages.bounds._interval import UNITS, outward
from stages.bounds.base import Box, Certifier
from stages.bounds.ibp import check


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
        check(box, rows)
        double = self.double or self.arithmetic == "real"
        columns = 1 + int((box.low < box.high).flatten(1).any(0).sum())
        return _sweep.grouped(net, box, rows, partial(self._lower, net), self.memory, double, _sweep.COPIES * columns)

    def _lower(self, net: nn.Module, box: Box, rows: Tensor) -> Tensor:
        chain = Chain(net, box, UNITS[self.arithmetic], self.double or self.arithmetic == "real")
        bands = Bands(chain)
        for op in chain.graph.ops:
            if op.result in chain.graph.moving:
                if not op.counts and not chain.is_linear(op):
                    bands.refine(op)
                    _sweep.tighten(chain, op, self.memory)
                chain.follow(op)
                bands.follow(op)
        return outward(_sweep.logits(chain, rows, self.memory), rows.dtype, -float("inf"))
