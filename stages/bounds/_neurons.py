"""Linear bounds of single neurons, every row with an image of its own: no row is formed that nobody asked for.

`Chain.bound` takes the same functions for every image of its batch, so images would get as many rows as the one with
most open neurons. Here a row is a neuron of an image, lines are gathered by image, and coefficients [R, ...] of a map
are kept in windows (`_windows`) as long as a neuron sees little of it. What windows have no rule for is done on whole
maps; what depends on how many images there are, or is no elementwise function, is left to `Chain.bound`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from stages.bounds import _linear, _stored
from stages.bounds._backward import Chain
from stages.bounds._interval import TINY, Interval
from stages.bounds._lined import Lined, blocked
from stages.bounds._trace import Op, fill
from stages.bounds._windows import Frame, Side

COPIES = 12  # tensors of the size of the coefficients that live at once: those of `Chain.bound`, and gathered lines
_WHOLE = 0.6  # a window of that share of a map is the map
_NORM = "_native_batch_norm_legit_no_training"
_SAME = frozenset({"add", "sub", "neg", _NORM})


@dataclass(frozen=True, slots=True)
class One:
    """Coefficients of the neuron itself, before anything was pulled through: `scale` [R] of its entry, 0 elsewhere."""

    scale: Tensor


class Way:
    """From a value back to the image: the operations, the last first, and the frame of every value, None for whole."""

    def __init__(self, chain: Chain, name: str, ops: tuple[Op, ...], frames: Mapping[str, Frame | None]) -> None:
        self.chain, self.name, self.ops, self.frames = chain, name, ops, frames
        self._views: dict[tuple[str, int], Tensor] = {}

    def entries(self) -> int:
        """The most coefficients that a row has of a value."""
        sizes = []
        for name, frame in self.frames.items():
            shape = self.chain.shape(name)
            sizes.append(math.prod(shape[1:]) if frame is None else shape[1] * frame.area)
        return max(sizes)

    def taken(self, name: str, maps: Sequence[Tensor], rows: "Neurons") -> list[Tensor]:
        """Of maps [B, *shape of the value], what belongs to the coefficients of each row."""
        frame = self.frames[name]
        if frame is None:
            return [part[rows.images].unsqueeze(1) for part in maps]
        key = name, len(maps)
        if key not in self._views:
            self._views[key] = frame.views(torch.stack([part.permute(0, 2, 3, 1) for part in maps]))
        return list(frame.take(self._views[key], rows.images, rows.at))


def way(chain: Chain, name: str) -> Way | None:
    """None where an operation on the way, or the input's ball, has no rule here."""
    if chain.ends.ball is not None or not _plain(chain, name):
        return None
    shape = chain.shape(name)
    frames: dict[str, Frame | None] = {name: None}
    if len(shape) == 4:
        places = int(shape[2]), int(shape[3])
        frames[name] = Frame(Side(1, 0, 1), Side(1, 0, 1), places, places)
    ops, made = [], {op.result: op for op in chain.done}
    for op in reversed(chain.done):
        if op.result not in frames:
            continue
        if op.kind == "getitem" and op.args[1] == 0 and made[op.reads()[0]].kind == _NORM:
            frames[op.reads()[0]] = frames[op.result]  # the one of its results that depends on the image
            ops.append(op)
            continue
        operands = chain.operands(op)
        if not all(_plain(chain, operand) for operand in operands) or not _covered(chain, op):
            return None
        ops.append(op)
        for operand in operands:
            frame = _before(chain, op, operand, frames[op.result])
            if operand in frames:
                known = frames[operand]
                frame = None if frame is None or known is None else known.beside(frame)
            whole = frame is None or frame.area >= _WHOLE * math.prod(frame.shape)
            frames[operand] = None if whole else frame
    return Way(chain, name, tuple(ops), frames)


def _plain(chain: Chain, name: str) -> bool:
    """Whether a value is one tensor with the images first."""
    value, strides = chain.values[name], chain.graph.strides
    return (
        isinstance(value, Interval)
        and value.low.dim() > 1
        and len(value.low) == chain.batch
        and strides.get(name) == math.prod(value.low.shape[1:])
    )


def _covered(chain: Chain, op: Op) -> bool:
    front = chain.fronts.get(op.result)
    if front is not None:
        shape = chain.shape(op.result)
        return isinstance(front, Lined) and all(chain.shape(name) == shape for name in front.slopes)
    counted = [n for n in op.reads() if n in chain.graph.moving and not isinstance(chain.values[n], Interval)]
    return op.kind != "getitem" and (not counted or op.kind in _linear.COPIES)


def _same(chain: Chain, op: Op) -> bool:
    """Whether an entry of the result depends on the same entry of every operand: none is spread over a map."""
    return op.kind in _SAME and all(chain.shape(name) == chain.shape(op.result) for name in chain.operands(op))


def _before(chain: Chain, op: Op, operand: str, frame: Frame | None) -> Frame | None:
    shape = chain.shape(operand)
    if frame is None or len(shape) != 4:
        return None
    if op.result in chain.fronts or _same(chain, op):
        return frame
    args = fill(op.args, chain.values)
    if op.kind != "convolution" or args[6] or not isinstance(args[0], Interval):
        return None
    weight, steps, pads, holes = args[1], *(_linear.each(args[i], 2) for i in (3, 4, 5))
    rows, columns = (
        side.before(int(weight.shape[2 + i]), steps[i], pads[i], holes[i])
        for i, side in enumerate((frame.rows, frame.columns))
    )
    return Frame(rows, columns, frame.places, (int(shape[2]), int(shape[3])))


class Neurons:
    """Rows sign v_entry of images, for `Chain.bound`'s callers: a batch of R with one row each.

    images, entries int64 [R] (entries in the order of `Chain.flat`), signs [R].
    """

    def __init__(self, way: Way, images: Tensor, entries: Tensor, signs: Tensor) -> None:
        self.way, self.chain, self.kind, self.batch = way, way.chain, way.chain.kind, len(images)
        self.images, self.entries, self.signs = images, entries, signs
        shape = self.chain.shape(way.name)
        self.channel, place = entries // math.prod(shape[2:]), entries % math.prod(shape[2:])
        self.at = place // shape[-1], place % shape[-1]
        self.kept: dict[str, dict[str, Any]] | None = None  # lines, where rows have free slopes and come again

    def bound(
        self,
        name: str,
        slopes: Tensor,
        lower: Mapping[str, Tensor] | None = None,
        push: Mapping[str, Tensor] | None = None,
        watch: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """[1, R] float64. `slopes` [1, R] multiply the rows, `lower` gives slopes as `drawn` does.

        `watch` is filled with the coefficients of the image where they are not in windows.
        """
        if push or name != self.way.name:
            raise ValueError("single neurons are bounded without constraints, and of one value")
        if lower is not None and self.kept is None:
            self.kept = {}
        scale = self.signs * slopes[0]
        total = self._start(scale)
        waiting: dict[str, Tensor | One] = {name: One(scale)}
        for op in self.way.ops:
            here = waiting.pop(op.result, None)
            if here is None:
                continue
            if op.result in self.chain.fronts:
                dense = self._dense(here, op.result)
                pulled, bias = self._front(op, dense, None if lower is None else lower.get(op.result))
                total = total + bias
            elif op.kind == "getitem":
                pulled = {op.reads()[0]: here}
            else:
                pulled = self._pull(op, here)
            for operand, part in pulled.items():
                waiting[operand] = self._both(operand, waiting[operand], part) if operand in waiting else part
        if self.chain.graph.input in waiting:
            dense = self._dense(waiting.pop(self.chain.graph.input), self.chain.graph.input)
            if watch is not None and self._frame(self.chain.graph.input) is None:
                watch[self.chain.graph.input] = dense
            total = total + self.least_of(dense)
        return total.unsqueeze(0)

    def drawn(self) -> dict[str, Tensor]:
        """The slopes below that CROWN takes at ReLUs on the way, of the shape of their coefficients."""
        first = {}
        self.kept = {}
        for op in self.way.ops:
            if op.kind == "relu" and op.result in self.chain.fronts:
                [(down, up)] = self._lines(op)["slopes"].values()
                if bool((down != up).any()):
                    first[op.result] = down
        return first

    def _start(self, scale: Tensor) -> Tensor:
        total = -self.chain.faint[self.images]
        for store, factor in ((self.chain.offset, scale), (self.chain.slack, -1.001 * scale.abs())):
            if self.way.name in store:
                value = store[self.way.name].expand(self.chain.shape(self.way.name))
                place = (self.at[0], self.at[1]) if value.dim() == 4 else ()
                if value.dim() in (2, 4):
                    total = total + factor.double() * value[(self.images, self.channel, *place)].double()
                else:
                    total = total + factor.double() * value.flatten(1)[self.images, self.entries].double()
        return total

    def _frame(self, name: str) -> Frame | None:
        return self.way.frames[name]

    def _dense(self, here: Tensor | One, name: str) -> Tensor:
        """Coefficients [R, C, height, width] in the frame of the value, or [R, 1, *shape] whole."""
        if isinstance(here, Tensor):
            return here
        shape, frame = self.chain.shape(name), self._frame(name)
        if frame is not None:
            first = Frame(Side(1, 0, 1), Side(1, 0, 1), frame.places, frame.places)
            units = here.scale.new_zeros(self.batch, shape[1])
            units = units.scatter(1, self.channel.unsqueeze(1), here.scale.unsqueeze(1))
            return first.widened(units.view(self.batch, -1, 1, 1), frame)
        units = here.scale.new_zeros(self.batch, math.prod(shape[1:]))
        units = units.scatter(1, self.entries.unsqueeze(1), here.scale.unsqueeze(1))
        return units.view(self.batch, 1, *shape[1:])

    def _both(self, name: str, one: Tensor | One, other: Tensor | One) -> Tensor | One:
        if isinstance(one, One) and isinstance(other, One):
            return One(one.scale + other.scale)
        return self._dense(one, name) + self._dense(other, name)

    def _pull(self, op: Op, here: Tensor | One) -> dict[str, Tensor | One]:
        args = fill(op.args, self.chain.values)
        if isinstance(here, One):
            found = self._pull_one(op, args, here)
            if found is not None:
                return found
            here = self._dense(here, op.result)
        frame = self._frame(op.result)
        if frame is None:
            return dict(self._pull_whole(op, here))
        operands = self.chain.operands(op)
        if _same(self.chain, op):
            some = dict.fromkeys(operands, Interval(here[:1], here[:1]))
            parts = _linear.pull(op, {**self.chain.values, **some}, here.unsqueeze(1))
            return {n: self._fitted(n, part.squeeze(1), frame) for n, part in parts.items()}
        if op.kind == "convolution" and _before(self.chain, op, operands[0], frame) is not None:
            [name] = operands
            return {name: self._convolution(op, args, here, frame)}
        return dict(self._pull_whole(op, frame.place(here, self.at).unsqueeze(1)))

    def _pull_whole(self, op: Op, here: Tensor) -> _linear.Pulled:
        """By the rules for one image, which all rows have in common."""
        one = {}
        for name in self.chain.operands(op):
            value = self.chain.values[name]
            one[name] = Interval(value.low[:1], value.high[:1])
        return _linear.pull(op, {**self.chain.values, **one}, here)

    def _pull_one(self, op: Op, args: tuple[Any, ...], here: One) -> dict[str, Tensor | One] | None:
        """Rows of weights, where a neuron's own are all that counts."""
        scale, operands = here.scale, self.chain.operands(op)
        if op.kind == "addmm" and isinstance(args[1], Interval):
            picked = args[2].T[self.entries] * scale.unsqueeze(1)
            return {operands[0]: picked.unsqueeze(1)}
        if op.kind == "neg":
            return {operands[0]: One(-scale)}
        if op.kind in {"add", "sub"} and all(self.chain.shape(o) == self.chain.shape(op.result) for o in operands):
            found: dict[str, Tensor | One] = {}
            for place, arg in enumerate(op.args[:2]):
                if getattr(arg, "name", None) in operands:
                    part = One(scale if place == 0 or op.kind == "add" else -scale)
                    found[arg.name] = self._both(arg.name, found[arg.name], part) if arg.name in found else part
            return found
        if op.kind == _NORM and len(self.chain.shape(op.result)) == 4:
            return {operands[0]: One(scale * _stored.scale(args)[self.channel])}
        frame = self._frame(op.result)
        if op.kind != "convolution" or frame is None or args[8] != 1 or math.prod(args[5]) != 1:
            return None
        before = _before(self.chain, op, operands[0], frame)
        if before is None:
            return None
        weight = args[1].permute(0, 2, 3, 1)[self.channel].permute(0, 3, 1, 2)
        return {operands[0]: self._fitted(operands[0], weight * scale.view(-1, 1, 1, 1), before, fresh=True)}

    def _convolution(self, op: Op, args: tuple[Any, ...], here: Tensor, frame: Frame) -> Tensor:
        [name] = self.chain.operands(op)
        before = _before(self.chain, op, name, frame)
        assert before is not None
        _, weight, _, stride, _, dilation, _, _, groups = args
        if groups == 1 and _linear.narrow(weight, stride, dilation):
            patches = weight.flatten(1).T @ here.flatten(2)
            sizes = before.rows.size, before.columns.size
            back = F.fold(patches, sizes, weight.shape[2:], stride=stride)
        else:
            back = torch.ops.aten.convolution(here, weight, None, stride, [0, 0], dilation, True, [0, 0], groups)
        return self._fitted(name, back, before, fresh=True)

    def _fitted(self, name: str, part: Tensor, frame: Frame, fresh: bool = False) -> Tensor:
        """In the frame of the value. Lines and the image are 0 beyond its edges; before anything else, so is this."""
        wanted = self._frame(name)
        if wanted is None:
            return frame.place(part, self.at).unsqueeze(1)
        if fresh and name not in self.chain.fronts and name != self.chain.graph.input:
            part = frame.inside(part, self.at)
        return frame.widened(part, wanted)

    def _front(self, op: Op, here: Tensor, lower: Tensor | None) -> tuple[dict[str, Tensor | One], Tensor]:
        lines, frame = self._lines(op), self._frame(op.result)
        negative = here.clamp(max=0)
        base, extra = lines["floor"], lines["gap"]
        found: dict[str, Tensor | One] = {}
        for name, (fixed, up) in lines["slopes"].items():
            down = fixed
            if lower is not None:
                down = torch.where(fixed != up, lower, fixed)
                change = (down - fixed) * lines["shift"]
                base, extra = base + change, extra - change
            part = torch.addcmul(here * down, negative, up - down)
            found[name] = part if frame is None else self._fitted(name, part, frame)
        terms = torch.addcmul(here * base, negative, extra)
        return found, blocked((terms.movedim(-3, -1) if terms.dim() > 3 else terms).flatten(1))

    def _lines(self, op: Op) -> dict[str, Any]:
        """The lines of the rows' images, in the frame of the result."""
        if self.kept is not None and op.result in self.kept:
            return self.kept[op.result]
        front = self.chain.fronts[op.result]
        assert isinstance(front, Lined)
        shape = self.chain.shape(op.result)
        maps = [front.floor, front.gap, *(slope for pair in front.slopes.values() for slope in pair)]
        maps += [] if self.kept is None or front.shift is None else [front.shift]
        taken = self.way.taken(op.result, [part.expand(shape) for part in maps], self)
        pairs = {name: (taken[2 + 2 * i], taken[3 + 2 * i]) for i, name in enumerate(front.slopes)}
        found = {"floor": taken[0], "gap": taken[1], "slopes": pairs, "shift": taken[-1]}
        if self.kept is not None:
            self.kept[op.result] = found
        return found

    def least_of(self, here: Tensor) -> Tensor:
        """[R] float64: the least value over the box of coefficients of the image."""
        name = self.chain.graph.input
        share = 4 * self.chain.own * self.chain.reads[name]
        middle, wide = self.chain.ends.parts(share)
        a, b = self.way.taken(name, [middle, wide], self)
        terms = here * a - here.abs() * b
        return terms.flatten(1).double().sum(1) - TINY
