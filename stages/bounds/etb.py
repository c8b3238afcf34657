"""Expected tight bounds (Alsubaihi et al. 2019): an estimate of a network's range over a box. Not a certificate."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from stages.bounds import _layout
from stages.bounds._interval import Interval, Rounding
from stages.bounds._ops import unsupported
from stages.bounds._trace import Op, Trace, fill, trace
from stages.bounds.base import Ball, Box, Estimator
from stages.bounds.ibp import _ancestors, _keeps, check, propagate
from stages.method import InputError


class ETB(Estimator):
    """Interval "in expectation" over networks with independent random weights; true bounds may lie outside.

    Every ReLU becomes the mask 1[u > 0] of those that can fire at all, u from interval arithmetic; the network is then
    linear, with value mid at the centre of the box and Jacobian J, and low, high = mid -+ |J| r, r the box's radii. The
    absolute value is taken after all layers are multiplied, which is the whole gain over interval arithmetic, and why
    the answer is no bound: relu(x) + relu(-x) on [-1, 1] gives [0, 0].

    "deep" does so once for the whole network (the authors' released code). "blocks" does so for every affine, ReLU,
    affine in turn, whose interval, after the ReLU that follows, is the next one's box (the paper; the precise recursion
    from memory); one backward pass for every pre-activation where a block ends.

    Departures: the box may be cut with the data range; rows are merged with the last layer; for balls the Jacobian's
    dual norm times eps takes the place of |J| r, around the ball's centre and without the cut.
    Raises `InputError` for non-linear operations other than ReLU and, in blocks, for a network with branches.
    """

    instead: ClassVar[str] = "estimates bounds and proves nothing"
    form: Literal["deep", "blocks"] = "deep"

    def estimate(self, net: nn.Module, box: Box, rows: Tensor) -> tuple[Tensor, Tensor]:
        check(box, rows)
        graph = trace(net, box.low)
        ops = [op for op in graph.ops if op.result in graph.moving]
        with torch.no_grad():
            fixed = {k: v.double() if _floats(v) else v for k, v in graph.constants(net).items()}
        start = Interval(box.low.double(), box.high.double())
        at = _At(graph.input, start, {}, len(rows), graph.stride(graph.input), box.ball)
        for cut in _cuts(graph, ops) if self.form == "blocks" else ():
            centre, block, counts = _linear(graph, ops, fixed, at, cut.reads()[0])
            stride = graph.stride(cut.reads()[0])
            flat = _layout.by_image(block, block.dim(), len(rows), stride)
            reach = _layout.from_images(_reach(flat, centre, at), block.shape, stride)
            ends = (cut.target(end) for end in (block.detach() - reach, block.detach() + reach))
            at = _At(cut.result, Interval(*ends), counts, len(rows), graph.stride(cut.result))
            ops = ops[ops.index(cut) + 1 :]
        centre, logits, _ = _linear(graph, ops, fixed, at, graph.output)
        with torch.enable_grad():
            leads = torch.einsum("brk,bk->br", rows.double(), logits)
        reach = _reach(leads, centre, at)
        return leads.detach() - reach, leads.detach() + reach


@dataclass(frozen=True, slots=True)
class _At:
    """Where a block starts: the value's name, its box, the whole numbers (batch sizes, say) known by then, and how its
    entries lie (`Trace.strides`)."""

    name: str
    box: Interval
    counts: Mapping[str, Any]
    batch: int
    stride: int
    ball: Ball | None = None

    def centre(self) -> Tensor:
        return self.box.split()[0] if self.ball is None else self.ball.centre.double()

    def reach(self, slope: Tensor) -> Tensor:
        """[B]: how far a function of these slopes [B, ...] gets from its value at the centre."""
        if self.ball is None:
            moves = slope.abs() * self.box.split()[1]
            return _layout.by_image(moves, moves.dim(), self.batch, self.stride).sum(1)
        dual = {"l2": 2.0, "l1": float("inf")}[self.ball.norm]
        wide: Tensor = torch.linalg.vector_norm(slope.flatten(1), dual, dim=1)
        return self.ball.eps * wide


def _cuts(graph: Trace, ops: Sequence[Op]) -> tuple[Op, ...]:
    """Every second ReLU of a chain."""
    for name in (graph.input, *(op.result for op in ops if not op.counts)):
        readers = sum(name in op.reads() for op in ops if not op.counts)
        if readers != (name != graph.output):
            raise InputError(f'etb: "{name}" starts or ends a branch, and blocks follow chains; take form = "deep"')
    return tuple(op for op in ops if op.kind == "relu")[1::2]


def _linear(
    graph: Trace, ops: Sequence[Op], fixed: Mapping[str, Any], at: _At, until: str
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """The centre of the box, the value `until` as a linear function of it, and the whole numbers met on the way."""
    made = {op.result: op for op in graph.ops if op.result in graph.moving}
    needed = _ancestors(graph, {until}, {at.name: None, **at.counts})
    known = {at.name: at.box, **at.counts}
    names = {op.reads()[0] for op in ops if op.kind == "relu" and op.result in needed}
    with torch.no_grad():
        boxes = propagate(graph, dict(fixed), known, names, Rounding()) if names else {}
    centre = at.centre().detach().clone().requires_grad_()
    values: dict[str, Any] = {**fixed, **at.counts, at.name: centre}
    with torch.enable_grad():
        for op in ops:
            known_count = op.counts and all(name in values for name in op.reads())
            if op.result not in needed and not known_count:
                continue
            if op.kind == "relu":
                name = op.reads()[0]
                values[op.result] = values[name] * (boxes[name].high > 0)
            elif not op.counts and not _keeps(op, made, graph):
                raise unsupported(op, "in expected tight bounds")
            else:
                values[op.result] = op.target(*fill(op.args, values), **fill(dict(op.kwargs), values))
    counts = {op.result: values[op.result] for op in ops if op.counts and op.result in values}
    return centre, values[until], {**at.counts, **counts}


def _reach(values: Tensor, centre: Tensor, at: _At) -> Tensor:
    """[B, D] for the values [B, D]: one backward pass for each of the D."""
    slopes = (torch.autograd.grad(values[:, d].sum(), centre, retain_graph=True)[0] for d in range(values.shape[1]))
    return torch.stack([at.reach(slope).detach() for slope in slopes], 1)


def _floats(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()
