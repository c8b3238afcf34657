"""alpha-CROWN (Xu et al. 2021): CROWN with the lower slopes of open ReLUs optimised for every bound by itself."""

from functools import partial
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from stages.bounds import _slopes, _sweep
from stages.bounds._backward import Chain
from stages.bounds._interval import UNITS, outward
from stages.bounds._trace import trace
from stages.bounds.base import Box, Certifier
from stages.bounds.crown import Crown
from stages.bounds.ibp import check


class AlphaCrown(Certifier):
    """max over alpha in [0, 1] of CROWN's bound with lower lines alpha z at open ReLUs, by projected Adam.

    Every row has slopes of its own at every ReLU below it: the rows of the logits and, with `box_steps` > 0, both rows
    of every open pre-activation. Each starts at CROWN's slopes; the best bound seen is kept, all being sound.
    Boxes found so are intersected with the others. The answer is never below CROWN's: tighter boxes may flip a slope
    that CROWN picks by rule, so CROWN runs too and the larger bound is taken (at 3 to 8 % of the cost of the rest).

    Source: Xu et al., "Fast and Complete: Enabling Complete Verification with Rapid and Massively Parallel Incomplete
    Verifiers", 2021, section 3. Departures: bounds of pre-activations maximise themselves, not the last ones; rounding
    as in `_backward`. Not differentiable in the weights. Memory as in `crown_ibp`, with 24 (ReLUs + 1) copies of the
    coefficients of a row where CROWN has 6.
    """

    arithmetic: Literal["real", "float32"] = "float32"
    steps: int = Field(default=20, ge=1)
    box_steps: int = Field(default=20, ge=0)
    rate: float = Field(default=0.1, gt=0)
    memory: float = Field(default=2.0, gt=0)

    @torch.no_grad()
    def lower(self, net: nn.Module, box: Box, rows: Tensor) -> Tensor:
        check(box, rows)
        plain = Crown(arithmetic=self.arithmetic, memory=self.memory).lower(net, box, rows)
        relus = sum(op.kind == "relu" for op in trace(net, box.low).ops)
        double = self.arithmetic == "real"
        copies = 4 * (1 + relus) * _sweep.COPIES
        found = _sweep.grouped(net, box, rows, partial(self._lower, net, copies), self.memory, double, copies)
        return torch.maximum(plain, found)

    def _lower(self, net: nn.Module, copies: int, box: Box, rows: Tensor) -> Tensor:
        chain = Chain(net, box, UNITS[self.arithmetic], self.arithmetic == "real")
        boxes, last = (_slopes.optimised(steps, self.rate) for steps in (self.box_steps, self.steps))
        _sweep.follow(chain, lambda op: _sweep.tighten(chain, op, self.memory, boxes, copies))
        return outward(_sweep.logits(chain, rows, self.memory, last, copies), rows.dtype, -float("inf"))
