"""Boxes of what non-linear operations read, which domains start from: each domain has a number of a set of them."""

import time
from contextlib import suppress

import torch
from torch import Tensor

from stages.bounds import _sweep
from stages.bounds._backward import Chain
from stages.bounds._trace import Op

Boxes = dict[str, tuple[Tensor, Tensor]]  # of values, [N, n] each end


def tightened(chain: Chain, memory: float, bound: _sweep.Bound, end: float, boxes: Boxes, sharp: bool = True) -> Boxes:
    """All operations in turn; after `end` boxes stay as they are in `boxes`, or as intervals make them.

    What is exact on the whole box is left as it is where `sharp`.
    """

    def timed(chain: _sweep.Rows, name: str, slopes: Tensor) -> Tensor:
        if time.monotonic() > end:
            raise TimeoutError
        return bound(chain, name, slopes)

    def tighten(op: Op) -> None:
        _entered(chain, op, boxes)
        with suppress(TimeoutError):
            _sweep.tighten(chain, op, memory, timed, sharp=sharp)

    _sweep.follow(chain, tighten)
    names = {name for op in chain.done if op.result in chain.fronts for name in chain.operands(op)}
    ends = {name: ends_of(chain, name) for name in sorted(names)}
    return {name: (chain.flat(name, low), chain.flat(name, high)) for name, (low, high) in ends.items()}


def followed(chain: Chain, boxes: Boxes) -> None:
    """All operations in turn, on what is left of `boxes`."""
    _sweep.follow(chain, lambda op: _entered(chain, op, boxes))


def _entered(chain: Chain, op: Op, boxes: Boxes) -> None:
    for name in chain.operands(op):
        if name in boxes:
            chain.tighten(name, *(chain.unflat(name, side) for side in boxes[name]))


def ends_of(chain: Chain, name: str) -> tuple[Tensor, Tensor]:
    box = chain.values[name]
    return box.low, box.high


class Roots:
    """Sets of boxes by number; sets are added and never change."""

    def __init__(self) -> None:
        self.boxes: Boxes = {}
        self.count = 0

    def add(self, boxes: Boxes, count: int) -> Tensor:
        """The numbers int64 [N] of `count` new sets."""
        old = self.boxes or {name: (low[:0], high[:0]) for name, (low, high) in boxes.items()}
        self.boxes = {
            name: (torch.cat([old[name][0], low]), torch.cat([old[name][1], high]))
            for name, (low, high) in boxes.items()
        }
        first, self.count = self.count, self.count + count
        return torch.arange(first, self.count)

    def take(self, numbers: Tensor) -> Boxes:
        return {name: (low[numbers], high[numbers]) for name, (low, high) in self.boxes.items()}

    def bytes(self) -> int:
        """That one set takes."""
        return sum(2 * low.shape[1] * low.element_size() for low, _ in self.boxes.values())
