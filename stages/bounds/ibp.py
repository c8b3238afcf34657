"""Interval bound propagation (Gowal et al. 2018), with everything affine at the end merged into the margin."""

from collections import Counter
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from stages.bounds import _layout, _linear, _ops
from stages.bounds._interval import DOUBLE, SINGLE, TINY, UNITS, Interval, Rounding, gamma, low_ends, outward
from stages.bounds._trace import FLOATS, Op, Trace, fill, substitute, trace
from stages.bounds.base import Ball, Box, Certifier
from stages.method import InputError

_CACHE = 2**22  # bytes
_APART = frozenset({"view", "_unsafe_view", "reshape", "mean", "sum", "clone", "alias", "squeeze", "unsqueeze"})
_POOLS = frozenset({"adaptive_avg_pool2d", "_adaptive_avg_pool2d"})


class IBP(Certifier):
    """Each operation maps a box to a box; the last affine operations are bounded in one piece.

    Let h be the values that the affine tail of the network reads (the outputs of the last non-linear operations, or
    the image itself), z = A h + b its logits and [m - r, m + r] the box of h. Then, with C = rows,

        C z >= C A m + C b - |C A| r,

    which is exact on an affine network and never looser than bounding the logits and subtracting. C A comes from
    automatic differentiation of the tail, so no operation needs a transpose of its own.

    Rounding. Boxes are carried in the network's precision and every step is widened by more than that can lose
    (`Rounding`); the tail is computed in float64, where it is smallest. With arithmetic = "float32" (default) each step
    is widened too by what float32 can lose in the network itself, so the bounds hold for the network in exact
    arithmetic and for any float32 execution of the same operations that sums products one by one in whatever order.
    For the tail: if one operation loses at most g_i (|L_i| |h| + |b_i|), all of them together lose at most
    (sum_i g_i) M where M bounds the logits of the network with every L_i, b_i and h replaced by absolute values (by
    induction over the tail; |L_i| carries earlier losses on). "real" covers exact arithmetic alone, in float64.

    Memory: images are taken in groups whose widest value takes 4 MiB, and a value is dropped when nobody reads it any
    more: a group holds some 8 times that for every branch of the network that is open at once.
    Departures: the paper merges one linear layer, and says nothing of rounding. Differentiable in the weights.
    Raises `InputError` for an operation without a rule, or bounds that are not finite.
    """

    arithmetic: Literal["real", "float32"] = "float32"
    cheap: ClassVar[bool] = True

    def lower(self, net: nn.Module, box: Box, rows: Tensor) -> Tensor:
        check(box, rows)
        _layout.keep_pages()
        graph = trace(net, box.low)
        tail = split(graph)
        double = self.arithmetic == "real" or box.low.dtype == torch.float64
        kind = torch.float64 if double else torch.float32
        constants = graph.constants(net)
        last = not _layout.trained(net)
        single = {name: _layout.last(_cast(value, kind), last) for name, value in constants.items()}
        ends = {name: _cast(value, torch.float64) for name, value in constants.items() if name in tail.reads}
        size = max(1, _CACHE // (8 if double else 4) // max(graph.entries.values()))
        found = []
        for at in range(0, len(rows), size):
            here = slice(at, at + size)
            low, high = outward(box.low[here], kind, -torch.inf), outward(box.high[here], kind, torch.inf)
            start = Interval(_layout.last(low, last), _layout.last(high, last))
            wanted = {*tail.fronts, *tail.counts}
            rounding = Rounding(UNITS[self.arithmetic], DOUBLE if double else SINGLE)
            inside = propagate(graph, single, {graph.input: start}, wanted, rounding)
            inside = {name: _double(value) for name, value in inside.items()}
            rounding = Rounding(UNITS[self.arithmetic])
            found.append(_merged(graph, tail, ends, inside, rows[here].double(), rounding))
        bound = torch.cat(found)
        if bound.shape != rows.shape[:2]:
            raise InputError(
                f"ibp: expected bounds {tuple(rows.shape[:2])}, one for each row, got {tuple(bound.shape)}"
            )
        if not bool(torch.isfinite(bound).all()):
            raise InputError("ibp: the bounds are not finite; are the weights, or does the box reach too far?")
        return outward(bound, rows.dtype, -torch.inf)


def check(box: Box, rows: Tensor) -> None:
    """Raises `InputError` for an empty, inverted or infinite box, one of whole numbers or half precision, a ball or
    rows that do not fit it."""
    if box.low.shape != box.high.shape or box.low.dim() < 2 or len(box.low) == 0:
        raise InputError(
            f"box: expected two equal shapes [B, ...], got {tuple(box.low.shape)}, {tuple(box.high.shape)}"
        )
    if any(end.dtype not in FLOATS for end in (box.low, box.high)):
        kinds = f"{box.low.dtype}, {box.high.dtype}"
        raise InputError(f"box: expected float32 or float64, got {kinds}; pixels of bytes are divided by 255 first")
    finite = all(bool(torch.isfinite(end.detach().sum())) for end in (box.low, box.high)) or all(
        bool(torch.isfinite(end).all()) for end in (box.low, box.high)
    )
    if not finite or not bool((box.low <= box.high).all()):
        raise InputError("box: expected finite bounds with low <= high for every pixel")
    if box.ball is not None:
        _check_ball(box.ball, box.low)
    if rows.dim() != 3 or len(rows) != len(box.low):
        raise InputError(f"rows: expected [B, R, K] with B = {len(box.low)}, got {tuple(rows.shape)}")
    if rows.dtype not in FLOATS or not bool(torch.isfinite(rows).all()):
        raise InputError(f"rows: expected finite numbers of float32 or float64, got {rows.dtype}")


def _check_ball(ball: Ball, low: Tensor) -> None:
    if ball.centre.shape != low.shape or ball.centre.dtype not in FLOATS or not bool(ball.centre.isfinite().all()):
        found = f"{tuple(ball.centre.shape)} of {ball.centre.dtype}"
        raise InputError(f"ball: expected centres {tuple(low.shape)}, finite, of float32 or float64, got {found}")
    if ball.norm not in ("l2", "l1") or not 0 <= ball.eps < torch.inf:
        raise InputError(f"ball: expected l2 or l1 and a finite eps of at least 0, got {ball.norm} and {ball.eps:g}")


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
    """The affine end of a network: its operations in order, the values it reads, and the whole numbers among them.

    `reads` are the names of all that its operations read.
    """

    ops: tuple[Op, ...]
    fronts: tuple[str, ...]
    counts: tuple[str, ...]
    reads: frozenset[str]


def split(graph: Trace) -> Tail:
    """Everything affine that leads to the output and starts at non-linear operations or at the image.

    An operation there that uses every entry of the one value it reads at most once (`_APART`) is left out: its result's
    box is exact, with entries that range independently.
    """
    made = {op.result: op for op in graph.ops if op.result in graph.moving}
    readers = Counter(name for op in graph.ops for name in op.reads())
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
    ops = [op for op in graph.ops if op.result in inside]
    for op in list(ops):
        sources = [name for name in op.reads() if name in graph.moving and name not in counts]
        alone = len(sources) == 1 and sources[0] in fronts and readers[sources[0]] == 1
        if alone and op.result != graph.output and _apart(op):
            ops.remove(op)
            del fronts[sources[0]]
            fronts[op.result] = None
    return Tail(tuple(ops), tuple(fronts), tuple(counts), frozenset(name for op in ops for name in op.reads()))


def _apart(op: Op) -> bool:
    return op.kind in _APART or (op.kind in _POOLS and list(op.args[1]) == [1, 1])


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
    fronts: dict[str, Interval] = {name: inside[name] for name in tail.fronts}
    fixed = {**constants, **{name: inside[name] for name in tail.counts}}
    # With every operand replaced by +- its size: shapes for the way back, and M.
    values: dict[str, Any] = {**fixed, **{name: Interval(-box.size(), box.size()) for name, box in fronts.items()}}
    at_zero: dict[str, Any] = {**fixed, **{name: torch.zeros_like(box.low) for name, box in fronts.items()}}
    # The products with rows, slopes and boxes are formed here alone, in float64.
    shares = Rounding().share(rows.shape[2] + sum(front.low.numel() for front in fronts.values()) // len(rows))
    for op in tail.ops:
        values[op.result] = _apply(op, values, rounding)
        result = values[op.result][0] if isinstance(values[op.result], tuple) else values[op.result]
        if not op.counts:
            back = _linear.products(op, values, result.low.shape, len(rows))
            shares += rounding.share(_terms(op, values)) + gamma(back + 4, DOUBLE)
        at_zero[op.result] = op.target(*fill(op.args, at_zero), **fill(dict(op.kwargs), at_zero))
    largest: Interval = values[graph.output]
    if largest.low.shape != (rows.shape[0], rows.shape[2]):
        raise InputError(f"rows: expected [B, R, K] for logits {tuple(largest.low.shape)}, got {tuple(rows.shape)}")
    offset: Tensor = at_zero[graph.output]
    bound = torch.einsum("brk,bk->br", rows, offset)
    for name, slope in _pulled(graph, tail, values, rows).items():
        lies = fronts[name].low.dim(), len(rows), graph.stride(name)
        flat, middle, radius = (_layout.by_image(part, *lies) for part in (slope, *fronts[name].split()))
        bound = bound + torch.einsum("rbn,bn->br", flat, middle) - torch.einsum("rbn,bn->br", flat.abs(), radius)
    return bound - shares * torch.einsum("brk,bk->br", rows.abs(), largest.size()) - TINY


def _pulled(graph: Trace, tail: Tail, values: dict[str, Any], rows: Tensor) -> dict[str, Tensor]:
    """[R, B, ...] of every front: the coefficients of rows @ logits."""
    waiting: dict[str, Any] = {graph.output: rows.transpose(0, 1)}
    for op in reversed(tail.ops):
        here = waiting.pop(op.result, None)
        if here is None:
            continue
        if op.kind == "getitem":
            source = waiting.setdefault(op.reads()[0], {})
            source[op.args[1]] = source[op.args[1]] + here if op.args[1] in source else here
            continue
        for name, part in _linear.pull(op, values, here).items():
            waiting[name] = waiting[name] + part if name in waiting else part
    return waiting


def _terms(op: Op, values: dict[str, Any]) -> int:
    args = fill(op.args, values)
    return _ops.parts(op, args, fill(dict(op.kwargs), values)).terms if _ops.is_affine(op, args) else 1


def _apply(op: Op, values: dict[str, Any], rounding: Rounding) -> Any:
    args, kwargs = fill(op.args, values), fill(dict(op.kwargs), values)
    if op.counts:
        return _cast(op.target(*low_ends(args), **kwargs), torch.float64 if rounding.own == DOUBLE else torch.float32)
    return _ops.step(op, args, kwargs, rounding)


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


def _cast(value: Any, kind: torch.dtype) -> Any:
    return value.to(kind) if isinstance(value, Tensor) and value.is_floating_point() else value


def _double(value: Any) -> Any:
    """A tensor, an interval or a tuple of them, in float64."""
    if isinstance(value, Interval):
        return Interval(value.low.double(), value.high.double())
    return tuple(_double(part) for part in value) if isinstance(value, tuple) else _cast(value, torch.float64)
