"""CROWN-IBP (Zhang et al. 2020): boxes by interval arithmetic, then one backward pass of linear bounds."""

from functools import partial
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from stages.bounds import _sweep
from stages.bounds._backward import Chain
from stages.bounds._channels import Channelwise
from stages.bounds._interval import UNITS, outward
from stages.bounds._trace import Trace, trace
from stages.bounds.base import Box, Certifier
from stages.bounds.ibp import check


class CrownIBP(Certifier):
    """lower(x) = A x + c <= rows @ logits on the box, with A and c from one backward pass; then min of A x + c.

    At a non-linear operation with box [l, u] a positive coefficient takes a line below and a negative one a line above
    (`_relax`); the boxes are those of interval arithmetic. The answer is the larger of this bound and IBP's, since
    neither is always the better one. Balls (l2, l1) are used where the box carries one, by their dual norms.

    Rounding: as in `_backward`: the bounds are computed in the network's precision, and cover both their own rounding
    and, with arithmetic = "float32" (default), that of any float32 execution that sums products one by one. "real"
    computes in float64 and covers exact arithmetic alone.

    `memory` caps what all that takes, in GiB, by splitting images and rows; the formula is in `_sweep`. Raises
    `TooLittleMemory` where one image and one row do not fit.
    Source: Zhang et al., "Towards Stable and Efficient Training of Verifiably Robust Neural Networks", 2020, section 3.
    Departures: rounding, whose slack is one number for a channel where no gradients are asked for (`_channels`), and
    channels that are off in every image of a group are left out there (`_alive`); the way back ends at the normalised
    image, where it is normalised; the maximum with IBP; no loss fusion. Differentiable in the weights.
    """

    arithmetic: Literal["real", "float32"] = "float32"
    cheap: ClassVar[bool] = True
    memory: float = Field(default=2.0, gt=0)

    def lower(self, net: nn.Module, box: Box, rows: Tensor) -> Tensor:
        check(box, rows)
        double = self.arithmetic == "real"
        graph = trace(net, box.low)
        return _sweep.grouped(net, box, rows, partial(self._lower, net, graph), self.memory, double, graph=graph)

    def _lower(self, net: nn.Module, graph: Trace, box: Box, rows: Tensor) -> Tensor:
        gradients = any(value.requires_grad for value in (*net.parameters(), box.low, box.high, rows))
        kind = Chain if torch.is_grad_enabled() and gradients else Channelwise
        with torch.set_grad_enabled(kind is Chain):
            chain = kind(net, box, UNITS[self.arithmetic], self.arithmetic == "real", graph)
            _sweep.follow(chain)
            return outward(_sweep.logits(chain, rows, self.memory), rows.dtype, -float("inf"))
