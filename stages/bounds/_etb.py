"""Expected tight bounds (Alsubaihi et al. 2019): an estimate of a network's range over a box. Not a certificate."""

from typing import Any

import torch
from torch import Tensor, nn

from stages.bounds._interval import Interval, Rounding
from stages.bounds._ops import unsupported
from stages.bounds._trace import fill, trace
from stages.bounds.base import Box
from stages.bounds.ibp import _keeps, check, propagate


def etb(net: nn.Module, box: Box, rows: Tensor) -> tuple[Tensor, Tensor]:
    """(low, high), [B, R] each: rows [B, R, K] @ logits, "in expectation" over networks with independent weights.

    Every ReLU becomes the mask 1[u > 0] of those that can fire at all, u from interval arithmetic; the network is then
    linear, with value mid at the centre of the box and Jacobian J, and low, high = mid -+ |J| r, r the box's radii. The
    absolute value is taken after all layers are multiplied, which is the whole gain over interval arithmetic, and why
    the answer is no bound: relu(x) + relu(-x) on [-1, 1] gives [0, 0]. It must never feed a certified figure.

    Source: the deep form of the authors' released code. Departures: the box may be cut with the data range, and rows
    are merged with the last layer. Raises `InputError` for non-linear operations other than ReLU.
    """
    check(box, rows)
    graph = trace(net, box.low)
    start = Interval(box.low.double(), box.high.double())
    made = {op.result: op for op in graph.ops if op.result in graph.moving}
    with torch.no_grad():
        fixed = {k: v.double() if _floats(v) else v for k, v in graph.constants(net).items()}
        names = {op.reads()[0] for op in graph.ops if op.kind == "relu"}
        boxes = propagate(graph, fixed, {graph.input: start}, names, Rounding()) if names else {}
    centre, radius = (part.detach() for part in start.split())
    centre.requires_grad_()
    values: dict[str, Any] = {**fixed, graph.input: centre}
    with torch.enable_grad():
        for op in graph.ops:
            if op.result not in graph.moving:
                continue
            if op.kind == "relu":
                name = op.reads()[0]
                values[op.result] = values[name] * (boxes[name].high > 0)
            elif not op.counts and not _keeps(op, made, graph):
                raise unsupported(op, "in expected tight bounds")
            else:
                values[op.result] = op.target(*fill(op.args, values), **fill(dict(op.kwargs), values))
        middle = torch.einsum("brk,bk->br", rows.double(), values[graph.output])
        slopes = [torch.autograd.grad(middle[:, r].sum(), centre, retain_graph=True)[0] for r in range(rows.shape[1])]
    reach = torch.stack([(slope.abs() * radius).flatten(1).sum(1) for slope in slopes], 1)
    return middle.detach() - reach, middle.detach() + reach


def _floats(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()
