"""CROWN (Zhang et al. 2018): linear bounds from the output back to the image, and for every pre-activation too."""

from functools import partial
from typing import Literal

from pydantic import Field
from torch import Tensor, nn

from stages.bounds import _sweep
from stages.bounds._backward import Chain
from stages.bounds._interval import UNITS, outward
from stages.bounds._trace import Trace, trace
from stages.bounds.base import Box, Certifier
from stages.bounds.ibp import check


class Crown(Certifier):
    """As `crown_ibp`, with the boxes of what non-linear operations read bounded backward from the image as well.

    Boxes go forward by interval arithmetic from boxes already tightened; a ReLU's input gets two backward rows (its low
    and its high end) only where its sign is open, other operations' inputs always, and never where interval arithmetic
    is exact (up to the first dense or convolutional layer, for boxes). Every box is intersected with the one before.

    Cost: one row for each end of an open neuron that is asked for, each through what the neuron can see of the layers
    below it (`_neurons`); the farther end is not asked for where the nearer one settles the sign. Memory as in
    `crown_ibp`.
    Source: Zhang et al., "Efficient Neural Network Robustness Certification with General Activation Functions", 2018,
    theorem 3.2 and table 2, with the adaptive lower slope of section 3.3. Departures: as in `crown_ibp`.
    """

    arithmetic: Literal["real", "float32"] = "float32"
    memory: float = Field(default=2.0, gt=0)

    def lower(self, net: nn.Module, box: Box, rows: Tensor) -> Tensor:
        check(box, rows)
        double = self.arithmetic == "real"
        graph = trace(net, box.low)
        return _sweep.grouped(net, box, rows, partial(self._lower, net, graph), self.memory, double, graph=graph)

    def _lower(self, net: nn.Module, graph: Trace, box: Box, rows: Tensor) -> Tensor:
        chain = Chain(net, box, UNITS[self.arithmetic], self.arithmetic == "real", graph)
        _sweep.follow(chain, lambda op: _sweep.tighten(chain, op, self.memory))
        return outward(_sweep.logits(chain, rows, self.memory), rows.dtype, -float("inf"))
