"""Interval bound propagation (Gowal et al. 2018), with everything affine at the end merged into the margin."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from stages.bounds import _ops
from stages.bounds._interval import TINY, Interval, Rounding, low_ends
from stages.bounds._trace import Op, Trace, fill, substitute, trace
from stages.bounds.base import Box, Certifier
from stages.method import InputError

_UNITS = {"real": 0.0, "float32": 2.0**-24}


class IBP(Certifier):
    """Each operation maps a box to a box; the last affine operations are bounded in one piece.

    Let h be the values that the affine tail of the network reads (the outputs of the last non-linear operations, or
    the image itself), z = A h + b its logits and [m - r, m + r] the box of h. Then, with C = rows,

        C z >= C A m + C b - |C A| r,

    which is exact on an affine network and never looser than bounding the logits and subtracting. C A comes from
    automatic differentiation of the tail, so no operation needs a transpose of its own.

    Rounding. All is computed in float64, and every step is widened by more than float64 can lose (`Rounding`). With
    arithmetic = "float32" (default) each step is widened too by what float32 can lose in it, so the bounds hold for
    the network in exact arithmetic and for any float32 execution of the same operations that sums products one by one
    in whatever order. For the tail: if one operation loses at most g_i (|L_i| |h| + |b_i|), all of them together lose
    at most (sum_i g_i) M where M bounds the logits of the network with every L_i, b_i and h replaced by absolute
    values (by induction over the tail; |L_i| carries earlier losses on). "real" covers exact arithmetic alone.

    Departures: the paper merges one linear layer, and says nothing of rounding. Differentiable in the weights.
    Raises `InputError` for an operation without a rule, or bounds that are not finite.
    """

    arithmetic: Literal["real", "float32"] = "float32"
    cheap: ClassVar[bool] = True

    def lower(self, net: nn.Module, box: Box, rows: Tensor) -> Tensor:
        check(box, rows)
        rounding = Rounding(_UNITS[self.arithmetic])
        graph = trace(net, box.low)
        tail = split(graph)
        constants = {name: _double(value) for name, value in graph.constants(net).items()}
        start = Interval(box.low.double(), box.high.double())
        inside = propagate(graph, constants, {graph.input: start}, {*tail.fronts, *tail.counts}, rounding)
        bound = _merged(graph, tail, constants, inside, rows.double(), rounding)
        if not bool(torch.isfinite(bound).all()):
            raise InputError("ibp: the bounds are not finite; are the weights, or does the box reach too far?")
        return _down(bound, rows.dtype)


def check(box: Box, rows: Tensor) -> None:
    """Raises `InputError` for an empty, inverted or infinite box, one of whole numbers, or rows that do not fit it."""
    if box.low.shape != box.high.shape or box.low.dim() < 2 or len(box.low) == 0:
        raise InputError(
            f"box: expected two equal shapes [B, ...], got {tuple(box.low.shape)}, {tuple(box.high.shape)}"
        )
    if not (box.low.is_floating_point() and box.high.is_floating_point()):
        raise InputError(f"box: expected floats, got {box.low.dtype}; pixels of bytes are divided by 255 first")
    if not bool((torch.isfinite(box.low) & torch.isfinite(box.high) & (box.low <= box.high)).all()):
        raise InputError("box: expected finite bounds with low <= high for every pixel")
    if rows.dim() != 3 or len(rows) != len(box.low):
        raise InputError(f"rows: expected [B, R, K] with B = {len(box.low)}, got {tuple(rows.shape)}")


def propagate(
    graph: Trace, constants: dict[str, Any], known: dict[str, Any], wanted: set[str], rounding: Rounding
) -> dict[str, Any]:
    """Intervals of the values `wanted`, from those `known`; what nobody reads any more is dropped on the way."""
    needed = _ancestors(graph, wanted, known)
    todo = [op for op in graph.ops if op.result in needed]
    last = {name: i for i, op in enumerate(todo) for name in op.reads()}
    values: dict[str, Any] = {**constants, **known}
    for i, op in enumerate(todo):
        values[op.result] = _apply(op, values, rounding)
        for name in op.reads():
            if last[name] == i and name not in wanted and name not in constants:
                values.pop(name, None)
    return {name: values[name] for name in wanted}


@dataclass(frozen=True, slots=True)
class Tail:
    """The affine end of a network: its operations in order, the values it reads, and the whole numbers among them."""

    ops: tuple[Op, ...]
    fronts: tuple[str, ...]
    counts: tuple[str, ...]


def split(graph: Trace) -> Tail:
    """Everything affine that leads to the output and starts at non-linear operations or at the image."""
    made = {op.result: op for op in graph.ops if op.result in graph.moving}
    inside: set[str] = set()
    fronts: dict[str, None] = {}
    counts: dict[str, None] = {}
    todo = [graph.output]
    while todo:
        name = todo.pop()
        op = made.get(name)
        if op is not None and op.counts:
            counts[name] = None
        elif op is None or not _keeps(op, made, graph):
            fronts[name] = None
        elif name not in inside:
            inside.add(name)
            todo += [read for read in op.reads() if read in graph.moving]
    return Tail(tuple(op for op in graph.ops if op.result in inside), tuple(fronts), tuple(counts))


def _keeps(op: Op, made: dict[str, Op], graph: Trace) -> bool:
    if op.kind == "getitem":
        source = made.get(op.reads()[0])
        return source is not None and _keeps(source, made, graph)
    stand_in = Interval(torch.empty(0), torch.empty(0))
    moves = {name for name in op.reads() if name in graph.moving and not (name in made and made[name].counts)}
    return _ops.keeps_affine(op, substitute(op.args, lambda ref: stand_in if ref.name in moves else None))


def _merged(
    graph: Trace, tail: Tail, constants: dict[str, Any], inside: dict[str, Any], rows: Tensor, rounding: Rounding
) -> Tensor:
    """[B, R]: rows @ logits bounded over the box of what the tail reads."""
    live = torch.is_grad_enabled()
    fronts: dict[str, Interval] = {name: inside[name] for name in tail.fronts}
    fixed = {**constants, **{name: inside[name] for name in tail.counts}}
    with torch.enable_grad():
        zeros = {name: torch.zeros_like(front.low).requires_grad_() for name, front in fronts.items()}
        values: dict[str, Any] = {**fixed, **zeros}
        for op in tail.ops:
            values[op.result] = op.target(*fill(op.args, values), **fill(dict(op.kwargs), values))
        logits: Tensor = values[graph.output]
        if logits.shape != (rows.shape[0], rows.shape[2]):
            raise InputError(f"rows: expected [B, R, K] for logits {tuple(logits.shape)}, got {tuple(rows.shape)}")
        slopes = [
            torch.autograd.grad(
                logits, list(zeros.values()), rows[:, r], retain_graph=True, create_graph=live, materialize_grads=True
            )
            for r in range(rows.shape[1])
        ]
    bound = torch.einsum("brk,bk->br", rows, logits)
    for place, front in enumerate(fronts.values()):
        middle, radius = (part.flatten(1) for part in front.split())
        slope = torch.stack([columns[place].flatten(1) for columns in slopes], 1)
        bound = bound + torch.einsum("brn,bn->br", slope, middle) - torch.einsum("brn,bn->br", slope.abs(), radius)
    return (bound if live else bound.detach()) - _loss(graph, tail, fixed, fronts, rows, rounding)


def _loss(
    graph: Trace,
    tail: Tail,
    fixed: dict[str, Any],
    fronts: dict[str, Interval],
    rows: Tensor,
    rounding: Rounding,
) -> Tensor:
    """[B, R]: what rounding can cost in the tail, (sum of shares) |rows| M."""
    values = {**fixed, **{name: Interval(-front.size(), front.size()) for name, front in fronts.items()}}
    # The products with rows, slopes and boxes are formed here alone, in float64.
    shares = Rounding().share(rows.shape[2] + sum(front.low[0].numel() for front in fronts.values()))
    for op in tail.ops:
        shares += rounding.share(_terms(op, values))
        values[op.result] = _apply(op, values, rounding)
    largest: Interval = values[graph.output]
    return shares * torch.einsum("brk,bk->br", rows.abs(), largest.size()) + TINY


def _terms(op: Op, values: dict[str, Any]) -> int:
    args = fill(op.args, values)
    return _ops.parts(op, args, fill(dict(op.kwargs), values)).terms if _ops.is_affine(op, args) else 1


def _apply(op: Op, values: dict[str, Any], rounding: Rounding) -> Any:
    args, kwargs = fill(op.args, values), fill(dict(op.kwargs), values)
    return _double(op.target(*low_ends(args), **kwargs)) if op.counts else _ops.step(op, args, kwargs, rounding)


def _ancestors(graph: Trace, wanted: set[str], known: dict[str, Any]) -> set[str]:
    made = {op.result: op for op in graph.ops if op.result in graph.moving}
    needed: set[str] = set()
    todo = list(wanted)
    while todo:
        name = todo.pop()
        if name not in needed and name not in known and name in made:
            needed.add(name)
            todo += made[name].reads()
    return needed


def _double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _down(bound: Tensor, dtype: torch.dtype) -> Tensor:
    """`bound` in `dtype`, never above it: rounded to nearest, then one step down."""
    if dtype == bound.dtype:
        return bound
    near = bound.to(dtype)
    with torch.no_grad():
        last_place = torch.nextafter(near, torch.full_like(near, -torch.inf)) - near
    return near + last_place
