"""Backward propagation of linear bounds: a^T v >= A x + c for a value v of the network, over all x in the box.

Rounding. All is computed with unit roundoff `own` (float32's where the network is float32), and the bounds cover that
and the network's own rounding alike, at no cost per row. Say that an operation computes y = L x + b with an error of at
most g S, S = |L| |x| + |b|, and that its transpose turns coefficients a into L^T a with an error of at most
g' |L|^T |a|. Then a^T y differs from what is bounded by at most (g + g') |a|^T S, and S does not depend on a. So each
value carries a slack e, e_y = |L| e_x + (g + g') S, from one non-linear operation to the next, where it moves the lines
outward: |a^T| e at the operand is at most |slope| |a|^T e at the result. The offsets b travel forward in the same way,
so the backward pass only transposes and sums intercepts. Sums over a value are formed in parts and added in float64.
Coefficients that are too small for the arithmetic become 0 (`faint`): a value of N entries passes on sums of no more
than 8 N products, each off by less than the smallest normal number, and what they multiply is no larger than |x| + |b|.

Values of images and the coefficients of their entries are channels-last (`_layout`).
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from stages.bounds import _layout, _linear, _lined, _ops, _relax, _slack
from stages.bounds._ball import Ends
from stages.bounds._interval import DOUBLE, SINGLE, TINY, Interval, Rounding, gamma, low_ends
from stages.bounds._trace import Op, Trace, fill, trace
from stages.bounds.base import Box
from stages.bounds.ibp import split

_EXACT = frozenset(
    {"relu", "hardtanh", "clamp", "clamp_min", "clamp_max", "abs", "maximum", "minimum", "amax", "amin", "where"}
)
_DIAGONAL = frozenset(
    {"_native_batch_norm_legit_no_training", "getitem", "mul", "div", "add", "sub", "neg", "view", "_unsafe_view"}
    | {"reshape", "permute", "squeeze", "unsqueeze", "clone", "alias", "detach", "_to_copy", "slice", "select", "flip"}
)
_PAYING = _linear.COPIES | {"add", "sub", "convolution", "addmm", "getitem", "_native_batch_norm_legit_no_training"}
# A chain is given, not kept: with one in its own front it would stay in memory until the collector comes.
Pull = Callable[["Chain", Tensor, Tensor | None], tuple[_linear.Pulled, Tensor]]


class Chain:
    """A network over a batch of boxes, followed from the image on: boxes, offsets, slacks and lines of every value.

    `follow` extends it by one operation; `bound` bounds rows on any value followed so far; `tighten` replaces the box
    of a value by its intersection with a better one, which later operations then use.
    """

    def __init__(self, net: nn.Module, box: Box, unit: float, double: bool, graph: Trace | None = None) -> None:
        self.graph: Trace = trace(net, box.low) if graph is None else graph
        self.kind = torch.float64 if double or box.low.dtype == torch.float64 else torch.float32
        self.own = DOUBLE if self.kind == torch.float64 else SINGLE
        self.rounding = Rounding(unit, self.own)
        self.batch = len(box.low)
        self._last = not _layout.trained(net)
        self.ends = Ends(box, self.kind, self._last)
        self.values: dict[str, Any] = {name: self.cast(value) for name, value in self.graph.constants(net).items()}
        self.values[self.graph.input] = self.ends.inside
        self.offset: dict[str, Any] = {}
        self.slack: dict[str, Any] = {}
        self.fronts: dict[str, Pull] = {}
        self.fresh: set[str] = set()  # those whose fronts make coefficients that nobody else reads
        self.begins: set[str] = set()  # values whose boxes are as good as the image's, where the way back ends
        self.lines: dict[str, _relax.Lines] = {}
        self.done: list[Op] = []
        # 2: the entries range over their boxes independently; 1: every end of the box is reached.
        self.sharp: dict[str, int] = {} if box.ball else {self.graph.input: 2}
        self.tight: set[str] = set()
        self.empty = torch.zeros(self.batch, dtype=torch.bool, device=box.low.device)
        self._faint = torch.full((self.batch,), TINY, dtype=torch.float64, device=box.low.device)
        self._small: list[Tensor] = []
        # Linear results whose slack covers what a ReLU's line makes of it, too (`_lined.relu`).
        self.paid: set[str] = set()
        self.mosts: dict[str, Tensor] = {}
        self._insides: dict[str, Ends] = {}
        self._counts: set[str] = set()
        self._linear: dict[str, bool] = {}
        self._before_relu: set[str] = set()
        for op in reversed(self.graph.ops):
            if op.kind == "relu" or (op.result in self._before_relu and op.kind in _PAYING):
                self._before_relu.update(op.reads())
        self.reads = Counter(name for op in self.graph.ops for name in op.reads())
        self.dots = gamma(_lined.BLOCK + 8, self.own) + gamma(8192, DOUBLE)

    def follow(self, op: Op) -> None:
        """The box, and either offset and slack (linear operations) or lines (the rest), of one more operation."""
        args, kwargs = fill(op.args, self.values), fill(dict(op.kwargs), self.values)
        if op.counts:
            self.values[op.result] = self.cast(op.target(*low_ends(args), **kwargs))
            self._counts.add(op.result)
            return
        self.values[op.result] = _ops.step(op, args, kwargs, self.rounding)
        self.done.append(op)
        if self.is_linear(op):
            self._carry(op, args, kwargs)
            moving = [
                name for name in dict.fromkeys(op.reads()) if name in self.graph.moving and name not in self._counts
            ]
            if len(moving) == 1 and moving[0] in self.sharp:
                keeps = op.kind in _DIAGONAL
                if keeps or self.sharp[moving[0]] == 2:
                    self.sharp[op.result] = self.sharp[moving[0]] if keeps else 1
        else:
            self._draw(op)
        entries = 8 * self.shape(op.result).numel() / self.batch * torch.finfo(self.kind).tiny
        for name in self.operands(op):
            self._small.append((entries * self.graph.entries[name]) * _slack.most(self, name))
        if op.kind == "relu":
            self.mosts[op.result] = self.mosts[op.reads()[0]]

    @property
    def faint(self) -> Tensor:
        """[B] float64"""
        if self._small:
            self._faint = self._faint + torch.stack([small.expand(self.batch) for small in self._small]).sum(0)
            self._small = []
        return self._faint

    def is_linear(self, op: Op) -> bool:
        if op.result not in self._linear:
            self._linear[op.result] = _ops.keeps_affine(op, fill(op.args, self.values))
        return self._linear[op.result]

    def operands(self, op: Op) -> list[str]:
        """The bounded values that an operation reads, each once."""
        return list(dict.fromkeys(name for name in op.reads() if isinstance(self.values[name], Interval)))

    def tighten(self, name: str, low: Tensor, high: Tensor) -> None:
        """Intersects the box of a value; where nothing is left, the image's set is `empty` and its old ends stay."""
        old = self.values[name]
        low, high = torch.maximum(low, old.low), torch.minimum(high, old.high)
        sane = low <= high
        self.empty |= self.flat(name, low > high).any(1)  # a NaN says nothing
        self.values[name] = Interval(torch.where(sane, low, old.low), torch.where(sane, high, old.high))
        self._insides.pop(name, None)

    def bound(
        self,
        name: str,
        slopes: Tensor,
        lower: Mapping[str, Tensor] | None = None,
        push: Mapping[str, Tensor] | None = None,
        boxes: bool = False,
        watch: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """[R, B] float64: lower bounds of slopes [R, *shape of the value] times the value, summed per example.

        `lower` gives slopes in [0, 1] for the lower lines of ReLUs, by result, [1 or R, ...]; `push` gives coefficients
        of what operations read, by result, which are added on the way (multipliers of constraints on it). With `boxes`
        they are the larger ones of these and of interval arithmetic with a merged tail (`ibp.split`). `watch` is filled
        with the coefficients of non-linear operations' results, and of the image where it comes to that.
        """
        total = self.start(name, slopes) - self.faint
        waiting: dict[str, Any] = {name: slopes}
        least = None
        tail = {*self.fronts, *self.begins, *split(self.graph).fronts} if boxes else set()
        for op in reversed(self.done):
            if least is None and op.result in tail and op.result in waiting:
                least = self._boxed(total, waiting, tail)
            here = None if op.result in self.begins else waiting.pop(op.result, None)
            pulled: _linear.Pulled = {}
            if here is None:
                pass
            elif op.result in self.fronts:
                if watch is not None:
                    watch[op.result] = here[0] if isinstance(here, dict) else here
                pulled, bias = self.fronts[op.result](self, here, None if lower is None else lower.get(op.result))
                total = total + bias
            else:
                more = self._pull(op, here, waiting)
                total = total if more is None else total + more
            if push is not None and op.result in push:
                total = total + self._pushed(op.reads()[0], pulled, push[op.result])
            _add(waiting, pulled, op.result in self.fresh)
        if watch is not None and self.graph.input in waiting:
            watch[self.graph.input] = waiting[self.graph.input]
        total = self._closed(total, waiting)
        return total if least is None else torch.maximum(total, least)

    def _pull(self, op: Op, here: Any, waiting: dict[str, Any], lent: bool = False) -> Tensor | None:
        """Moves the coefficients of a linear operation's result to what it reads; [R, B]: what they give on the way.

        `lent`: somebody else reads the coefficients, too.
        """
        del lent
        if op.kind == "getitem":
            source = waiting.setdefault(op.reads()[0], {})
            source[op.args[1]] = source[op.args[1]] + here if op.args[1] in source else here
        else:
            # What a convolution makes belongs to nobody else.
            _add(waiting, _linear.pull(op, self.values, here), op.kind == "convolution" and not torch.is_grad_enabled())
        return None

    def _boxed(self, total: Tensor, waiting: dict[str, Any], tail: set[str]) -> Tensor:
        """The bound with all that comes before `tail` by its box; `waiting` stays as it is."""
        waiting = {name: dict(here) if isinstance(here, dict) else here for name, here in waiting.items()}
        for op in reversed(self.done):
            if op.result in waiting and op.result not in tail:
                more = self._pull(op, waiting.pop(op.result), waiting, lent=True)
                total = total if more is None else total + more
        return self._closed(total, waiting)

    def _closed(self, total: Tensor, waiting: dict[str, Any]) -> Tensor:
        """Adds what is least of the rest, over the image's set and over the boxes of values."""
        for name, here in waiting.items():
            if name == self.graph.input:
                total = total + self.ends.least(here, self.input_loss())
            else:
                total = total + self._inside(name, here[0] if isinstance(here, dict) else here)
        return total

    def input_loss(self) -> float:  # what adding up the coefficients of its several readers may lose of |a|^T |x|
        return 4 * self.own * self.reads[self.graph.input]

    def _pushed(self, name: str, pulled: _linear.Pulled, more: Tensor) -> Tensor:
        """Adds `more` to the coefficients of a value; [R, B]: its offset and slack, less what the sum may lose."""
        if name in pulled:
            more = more.expand_as(pulled[name])
            pulled[name] = pulled[name] + more
        else:  # no coefficient came by
            pulled[name] = more
        return self.start(name, more) - 4 * self.own * self.dot(name, pulled[name].abs(), self.values[name].size())

    def _inside(self, name: str, slopes: Tensor) -> Tensor:
        box = self._box(name)
        if not self.in_order(name):
            box, slopes = Interval(self.flat(name, box.low), self.flat(name, box.high)), self.flat(name, slopes)
        if name not in self._insides:
            self._insides[name] = Ends(Box(box.low, box.high), self.kind, self._last)
        return self._insides[name].least(slopes, 4 * self.own * self.readers(name))

    def in_order(self, name: str) -> bool:
        """Whether a value holds one image after the other."""
        first, *rest = self.shape(name)
        return bool(rest) and first == self.batch and self.graph.strides.get(name) == math.prod(rest)

    def flat(self, name: str, value: Tensor) -> Tensor:
        """[..., B, n] from [..., *shape]: the entries of every example, in order."""
        return _layout.by_image(value, len(self.shape(name)), self.batch, self.graph.stride(name))

    def unflat(self, name: str, value: Tensor) -> Tensor:
        """The inverse of `flat`."""
        laid = _layout.from_images(value, self.shape(name), self.graph.stride(name))
        return _layout.alike(laid, self._box(name).low)

    def shape(self, name: str) -> torch.Size:
        return self._box(name).low.shape

    def _box(self, name: str) -> Interval:
        found: Interval = self.values[name][0] if isinstance(self.values[name], tuple) else self.values[name]
        return found

    def cast(self, value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point():
            value = _layout.last(value.to(self.kind), self._last)
            return value if torch.is_grad_enabled() else value.detach()
        return value

    def start(self, name: str, slopes: Tensor) -> Tensor:
        total = torch.zeros(len(slopes), self.batch, dtype=torch.float64, device=slopes.device)
        if name in self.offset:
            total = total + self.dot(name, slopes, self.offset[name])
        if name in self.slack:
            total = total - 1.001 * self.dot(name, slopes.abs(), self.slack[name])
        return total

    def dot(self, name: str, slopes: Tensor, weights: Tensor) -> Tensor:
        """[R, B] float64: slopes [R, *shape] times weights (broadcast to [*shape] or [R, *shape]), per example."""
        return self.sums(name, (slopes, weights))

    def sums(self, name: str, *pairs: tuple[Tensor, Tensor]) -> Tensor:
        """The sum of several `dot`, in one pass."""
        (slopes, weights), *more = pairs
        terms = slopes * weights
        for others, theirs in more:
            terms = terms.addcmul_(others, theirs)
        return _lined.blocked(self.entries(name, terms))

    def entries(self, name: str, terms: Tensor) -> Tensor:
        """`flat` in whatever order, so that channels-last terms need no copy."""
        if terms.dim() == 5 and self.graph.stride(name) == terms[0, 0].numel():
            terms = terms.permute(0, 1, 3, 4, 2)
            return terms.reshape(*terms.shape[:2], -1)
        return self.flat(name, terms)

    def _carry(self, op: Op, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Offset and slack of a linear operation's result."""
        if op.kind == "getitem":
            source, place = op.reads()[0], op.args[1]
            for store in (self.offset, self.slack):
                if source in store:
                    store[op.result] = store[source][place]
            if op.result not in self.slack:
                self.slack[op.result] = torch.zeros_like(self.values[op.result].low)
            self.slack[op.result] = self.fans(op, self.slack[op.result])
            if source in self.paid:
                self.paid.add(op.result)
            return
        names = self.operands(op)
        known = self.offset.keys() | self.slack.keys()
        if op.kind in _linear.COPIES and self.readers(op.result) == 1 and not known & set(names):
            return
        if op.kind in {"convolution", "addmm"} and not self.offset.keys() & set(names):
            bias = args[2 if op.kind == "convolution" else 0]
            if bias is not None:
                shape = self.shape(op.result)
                column = bias.view(-1, *(1,) * (len(shape) - 2)) if op.kind == "convolution" else bias
                self.offset[op.result] = column.expand(shape)
        elif op.kind in {"add", "sub", "_native_batch_norm_legit_no_training"} and _slack.alike(self, op):
            thin = {name: _slack.thin(self.offset_of(name)) for name in names}
            found = op.target(*fill(op.args, {**self.values, **thin}), **kwargs)
            offset = found[0] if isinstance(found, tuple) else found
            wide = offset.expand(self.shape(op.result))
            self.offset[op.result] = (wide, *found[1:]) if isinstance(found, tuple) else wide
        else:
            zero = {**self.values, **{name: self.offset_of(name) for name in names}}
            self.offset[op.result] = op.target(*fill(op.args, zero), **kwargs)
        self.slack[op.result] = self._new_slack(op, args, kwargs)

    def offset_of(self, name: str) -> Tensor:
        offset: Tensor | None = self.offset.get(name)
        return self.values[name].low.new_zeros(()).expand(self.shape(name)) if offset is None else offset

    def _new_slack(self, op: Op, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The slack of a linear result: `paid` where its operands' is, or where they have neither it nor an offset.

        Beyond (g + g') S, a paid slack holds what `_lined.relu` asks for: 30 units of the value and of its offset, and
        what sums over blocks lose of the offset.
        """
        names = self.operands(op)
        sums = gamma(_linear.products(op, self.values, self.shape(op.result), self.batch) + 4, self.own)
        ready = all(name in self.paid or not (name in self.slack or name in self.offset) for name in names)
        ready = ready and op.result in self._before_relu
        if ready and (_ops.is_affine(op, args) or (op.kind in {"add", "sub"} and _slack.alike(self, op))):
            self.paid.add(op.result)
            return _slack.paid(self, op, args, kwargs, sums + 30 * self.own)
        return _slack.general(self, op, args, kwargs, sums)

    def share(self, terms: int) -> float:
        """The network's rounding in a sum of so many products, and ours where its offset is formed."""
        return gamma(terms + 2, self.rounding.unit) + gamma(terms + 4, self.own)

    def fans(self, op: Op, slack: Any) -> Any:
        """What adding up the coefficients of several readers may lose."""
        extra = 4 * self.own * (self.readers(op.result) - 1)
        if extra <= 0 or not isinstance(slack, Tensor):
            return slack
        return slack + extra * (self.values[op.result].size() + self.offset_of(op.result).abs())

    def _draw(self, op: Op) -> None:
        special = SPECIAL.get(op.kind)
        if special is not None:
            self.fronts[op.result] = special(self, op)
            return
        result = self.values[op.result]
        if isinstance(result, tuple):
            raise _ops.unsupported(op, "with several results, in linear bounds")
        lines = _relax.elementwise(op, self.values, self.kind)
        if lines is None:
            lines = _relax.constant(result)
        elif op.kind not in _EXACT:
            loss = self.rounding.share(12) * (1 + result.size().double())
            lines = _relax.Lines(lines.slopes, lines.low - loss, lines.high + loss)
        self.lines[op.result] = lines
        paid = op.kind == "relu" and op.reads()[0] in self.paid
        self.fronts[op.result] = (_lined.relu if paid else _lined.elementwise)(self, op, lines)

    def ends_of_lines(
        self, low: Tensor, high: Tensor, size: Tensor, free: Tensor | float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """Intercepts below, and how much higher those above are, moved outward by what sums with them may lose."""
        loss = 2.1 * self.dots * (low.abs() + high.abs() + free) + 16 * self.own * size + TINY
        return (low - loss).to(self.kind), (high - low + 2 * loss).to(self.kind)

    def readers(self, name: str) -> int:
        return self.reads.get(name, 1)

    def folded(self, name: str, op: Op, kind: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
        """Offset and slack of an operand, with what its coefficient loses when it is formed."""
        box = self.values[name]
        offset = self.offset_of(name).to(kind)
        sums = gamma(_linear.products(op, self.values, self.shape(op.result), self.batch) + 4, self.own)
        slack = self.slack.get(name, torch.zeros_like(box.low)).to(kind)
        return offset, 1.001 * slack + (2 * sums + 16 * self.own) * (box.size().to(kind) + offset.abs())

    def reach(self, name: str) -> Tensor:
        """No less than what a value and its offset are made of, float64."""
        size: Tensor = self.values[name].size().double()
        return size + self.offset_of(name).double().abs()


def _add(waiting: dict[str, Any], parts: _linear.Pulled, fresh: bool = False) -> None:
    for name, part in parts.items():
        before = waiting.get(name)
        waiting[name] = part if before is None else part.add_(before) if fresh else before + part


SPECIAL: dict[str, Callable[[Chain, Op], Pull]] = {}
