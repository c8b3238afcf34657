"""Network -> list of primitive operations, so that a layer made of primitives needs no code in this folder.

The network is recorded twice (`_record`), on 2 and on 3 images of different content. Both recordings have to be the
same but for sizes in the ratio 2 : 3, which stand for the count of images. A trace holds structure and names, no
weights: those are read from the network at every use, so a trace survives training and gradients reach the weights.
"""

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import FunctionType, MethodType, ModuleType, NoneType
from typing import Any
from weakref import ReferenceType, WeakKeyDictionary, ref

import numpy as np
import torch
from torch import Tensor, nn

from stages.bounds._record import FLOATS, Op, Recording, Ref, fill, substitute
from stages.method import InputError

__all__ = ["FLOATS", "MASKED", "Op", "Ref", "Trace", "fill", "substitute", "trace"]
MASKED = -1e30  # stands for -inf in masks; see `_attention`
_COUNTS = 2, 3  # images in the two recordings
_SHAPED = frozenset({"expand", "view", "permute", "unsqueeze", "squeeze", "full", "zeros", "repeat", "select", "slice"})
_SOFTMAX = frozenset({"_softmax", "_safe_softmax"})
# What a mask may go through on its way to a softmax: nothing that could bring it back.
_CARRIES = frozenset(
    {"where", "view", "_unsafe_view", "reshape", "expand", "permute", "transpose", "unsqueeze", "squeeze", "slice"}
    | {"select", "clone", "alias", "detach", "_to_copy", "repeat", "cat"}
)


@dataclass(frozen=True, slots=True)
class Trace:
    """Operations in order of execution. `moving` names the values that depend on the images.

    `strides` says whom an entry of a moving value belongs to: entry i of the value, counted row by row, is one of
    example (i // stride) mod B. A value is missing there if its place of the batch cannot be followed.
    `masks` names constants that nothing but a softmax sees, which may hold -inf as a mask. `entries` is how many a
    moving value has for an image; of several results, the first has. `read` are the paths of parameters and buffers of
    which the network reads numbers on its way (`.item()`, a condition), so that others may lead another way.
    """

    ops: tuple[Op, ...]
    input: str
    output: str
    stored: Mapping[str, str]
    literals: Mapping[str, Tensor]
    moving: frozenset[str]
    strides: Mapping[str, int]
    masks: frozenset[str]
    entries: Mapping[str, int]
    read: frozenset[str]

    def stride(self, name: str) -> int:
        """Raises `InputError` where it is not known which of a value's entries belong to which image."""
        if name not in self.strides:
            raise InputError(
                f'bounds: cannot tell which entries of "{name}" belong to which image; is the batch mixed?'
            )
        return self.strides[name]

    def constants(self, net: nn.Module) -> dict[str, Any]:
        """Every value that does not depend on the images, computed in the precision that the network computes it in."""
        values: dict[str, Any] = dict(self.literals)
        values |= {name: _stored(net, path) for name, path in self.stored.items()}
        for op in self.ops:
            if op.result not in self.moving:
                values[op.result] = op.target(*fill(op.args, values), **fill(dict(op.kwargs), values))
        return {name: _unmasked(value) if name in self.masks else value for name, value in values.items()}


def _stored(net: nn.Module, path: str) -> Any:
    owner, _, leaf = path.rpartition(".")
    return getattr(net.get_submodule(owner), leaf)


def _unmasked(value: Any) -> Any:
    """A constant with finite numbers for masks of -inf, or of the lowest number there is."""
    return value.clamp(min=MASKED) if isinstance(value, Tensor) and value.is_floating_point() else value


_kept: WeakKeyDictionary[nn.Module, tuple[object, Trace, dict[str, Tensor]]] = WeakKeyDictionary()
_CODE = type, ModuleType, FunctionType, MethodType
_PLAIN = {bool, int, float, str, NoneType}
_REGISTERED = {"_parameters", "_buffers", "_modules"}


def trace(net: nn.Module, image: Tensor) -> Trace:
    """The trace of `net` for images [B, ...] of the shape and type of `image`, for any B.

    Kept per network and made anew when a module, a shape, a hook, an attribute of a module or a weight that the network
    reads numbers of (`Trace.read`) has changed. Raises `InputError` where the network cannot be followed (control flow
    on pixel values, say).
    """
    for name, value in (*net.named_parameters(), *net.named_buffers()):
        if value.is_floating_point() and value.dtype not in FLOATS:
            raise InputError(f'bounds: "{name}" is {value.dtype}; they cover float32 and float64 alone: call .float()')
    state = _fingerprint(net, image)
    kept = _kept.get(net)
    if (
        kept is None
        or kept[0] != state
        or not all(torch.equal(_stored(net, path), was) for path, was in kept[2].items())
    ):
        found = _followed(net, image)
        kept = (state, found, {path: _stored(net, path).detach().clone() for path in found.read})
        _kept[net] = kept
    return kept[1]


@dataclass(frozen=True, slots=True, eq=False)
class _This:
    """One object, which is not kept alive by it; what is gone equals nothing, whoever has its address now."""

    ref: ReferenceType[Any]
    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        found = self.ref()
        return found is not None and isinstance(other, _This) and found is other.ref()


def _fingerprint(net: nn.Module, image: Tensor) -> object:
    """What a trace depends on: all but the values of parameters and buffers. Equal to another one, or not."""
    paths = dict(net.named_modules(remove_duplicate=False))
    known = {id(module) for module in paths.values()}
    kinds = {kind: _shared(kind, known) for kind in {type(module) for module in paths.values()}}
    modules = [
        (
            (path, type(module), kinds[type(module)]),
            [(name, _seen(value, known)) for name, value in vars(module).items() if name not in _REGISTERED],
        )
        for path, module in paths.items()
    ]
    state = (*net.named_parameters(remove_duplicate=False), *net.named_buffers(remove_duplicate=False))
    first: dict[int, str] = {}  # two names of one tensor, which the trace knows by one of them
    shapes = [(name, value.shape, value.dtype, first.setdefault(id(value), name)) for name, value in state]
    return modules, shapes, image.shape[1:], image.dtype, image.device


def _shared(kind: type, known: set[int]) -> object:
    """What a class says for all its modules: methods and attributes, its bases' too."""
    classes = kind.__mro__[: kind.__mro__.index(nn.Module)]
    parts = [(name, value) for one in classes for name, value in vars(one).items() if not name.startswith("__")]
    return [(name, _seen(value, known)) for name, value in parts]


def _seen(value: Any, known: set[int]) -> object:
    """An attribute as it is now, equal to what it was where nothing was replaced or written into."""
    if type(value) in _PLAIN:  # as most are
        return repr(value)
    if isinstance(value, Tensor):
        return _This(ref(value)), -1 if value.is_inference() else value._version
    if isinstance(value, dict) and not value:  # as most places for hooks are
        return None
    if isinstance(value, np.ndarray):  # printed, it would be cut short
        return value.shape, value.dtype, value.tobytes()
    whole = not isinstance(value, _CODE) and hasattr(value, "__dict__")
    if isinstance(value, list | tuple | dict) or whole:
        if id(value) in known:
            return "seen"
        inner = {**vars(value), "": type(value)} if whole else value
        inside = {*known, id(value)}
        if isinstance(inner, dict):
            return [(repr(key), _seen(part, inside)) for key, part in inner.items()]
        return [_seen(part, inside) for part in inner]
    return _This(ref(value)) if isinstance(value, FunctionType | MethodType) else repr(value)


def _followed(net: nn.Module, image: Tensor) -> Trace:
    sizes = image.shape[1:]
    content = torch.linspace(0.25, 1, math.prod(sizes), dtype=image.dtype, device=image.device).view(sizes)
    few, many = (Recording(net) for _ in _COUNTS)
    try:
        few.record(net, image.new_zeros((_COUNTS[0], *sizes)))
        many.record(net, content.expand(_COUNTS[1], *sizes).contiguous())
        found = _joined(few, many)
        _each_alone(net, content)
        return found
    except Exception as error:  # a network may raise whatever it likes
        reason = str(error).strip().splitlines()[:1]
        raise InputError(
            f"bounds: {type(net).__name__} cannot be followed to primitive operations: {type(error).__name__}: "
            f"{''.join(reason)}; bounds need a network without control flow on pixel values and with a free batch size"
        ) from error


@torch.no_grad()
def _each_alone(net: nn.Module, content: Tensor) -> None:
    """Raises `InputError` where an image's logits depend on another one: bounds speak of one image, the rest as it is.

    One image of three is not a number. Sums, products, maxima and rearrangements carry that on, whatever their weights;
    what does not is told by other values."""
    images = torch.stack([content, content.flip(-1), 1 - content])
    logits = net(images)
    if bool(logits.isnan().any()):
        raise InputError("its logits are NaN; is a row of attention masked all through?")
    for i in range(len(images)):
        changed = images.index_fill(0, torch.tensor([i], device=images.device), torch.nan)
        others = torch.arange(len(images), device=images.device) != i
        if not torch.allclose(net(changed)[others], logits[others]):
            raise InputError("an image's logits depend on other images of the batch")


def _joined(few: Recording, many: Recording) -> Trace:
    """One trace for any count of images; `InputError` where the recordings differ otherwise."""
    if [op.kind for op in few.ops] != [op.kind for op in many.ops] or few.output != many.output:
        raise InputError("other images take another way through it")
    needed = {few.output}
    for op in reversed(few.ops):
        if op.result in needed:
            needed.update(op.reads())
    joint = _Joint()
    for one, other in zip(few.ops, many.ops, strict=True):
        if one.result in needed:
            joint.add(one, other)
    for name in needed & few.literals.keys():
        if not torch.equal(few.literals[name], many.literals[name]):
            raise InputError("a constant in it depends on the images")
    places = {"image": _Place(1, math.prod(few.shapes["image"][1:]))}
    ops = joint.ops
    if few.output not in joint.moving - joint.counted:
        raise InputError("its output does not depend on the image")
    for op in ops:
        place = None if op.counts else _place(op, few.shapes[op.result], many.shapes[op.result], places)
        if place is not None:
            places[op.result] = place
    strides = {name: place.stride for name, place in places.items()}
    stored = {name: path for name, path in few.stored.items() if name in needed}
    literals = {name: value for name, value in few.literals.items() if name in needed}
    seen = _seen_elsewhere(ops, few.output, joint.moving)
    ops = [replace(op, masked=True) if op.kind == "add" and op.result not in seen else op for op in ops]
    masks = {name for op in ops if op.result in joint.moving for name in op.reads()} - joint.moving - seen
    moving = [op.result for op in ops if op.result in joint.moving and not op.counts]
    entries = {name: math.prod(few.shapes[name]) // _COUNTS[0] for name in ("image", *moving)}
    return Trace(
        tuple(ops),
        "image",
        few.output,
        stored,
        literals,
        frozenset(joint.moving),
        strides,
        frozenset(masks),
        entries,
        frozenset(few.read | many.read),
    )


def _seen_elsewhere(ops: Sequence[Op], output: str, moving: set[str]) -> set[str]:
    """The values that anything but a softmax sees, directly or through sums and rearrangements: none is a mask."""
    found = {output}
    for op in reversed(ops):
        carries = op.kind in _CARRIES or (op.kind == "add" and not op.counts)
        if op.result in moving and op.kind not in _SOFTMAX and not (carries and op.result not in found):
            found.update(op.reads())
    return found


@dataclass(slots=True)
class _Joint:
    """The operations of two recordings in one list; `moving` depend on the images, `counted` on their count alone,
    of which `numbers` are no tensors."""

    ops: list[Op] = field(default_factory=list)
    moving: set[str] = field(default_factory=lambda: {"image"})
    counted: set[str] = field(default_factory=set)
    numbers: set[str] = field(default_factory=set)

    def add(self, one: Op, other: Op) -> None:
        op = replace(one, args=self._both(one.args, other.args), kwargs=self._both(one.kwargs, other.kwargs))
        reads = set(op.reads())
        if reads & self.numbers and op.kind not in _SHAPED:
            raise InputError(f"the count of images goes into {op.kind}")
        if reads & self.moving:
            self.moving.add(op.result)
            if not reads & (self.moving - self.counted):
                self.counted.add(op.result)
                op = replace(op, counts=True)
        self.ops.append(op)

    def _both(self, one: Any, other: Any) -> Any:
        if isinstance(one, list | tuple) and len(one) == len(other):
            return type(one)(self._both(a, b) for a, b in zip(one, other, strict=True))
        if isinstance(one, dict) and one.keys() == other.keys():
            return {key: self._both(value, other[key]) for key, value in one.items()}
        if type(one) is int and type(other) is int and one != other:
            return self._count(one, other)
        if one != other:
            raise InputError(f"the count of images changes {one} to {other}")
        return one

    def _count(self, one: int, other: int) -> Ref:
        times, rest = divmod(one, _COUNTS[0])
        if rest or times <= 0 or times * _COUNTS[1] != other:
            raise InputError(f"the count of images changes {one} to {other}")
        self._counting("count", Op("count", "sym_size", torch.ops.aten.sym_size.int, (Ref("image"), 0), {}, "", True))
        if times == 1:
            return Ref("count")
        name = f"count_{times}"
        self._counting(name, Op(name, "mul", operator.mul, (Ref("count"), times), {}, "", True))
        return Ref(name)

    def _counting(self, name: str, op: Op) -> None:
        if name not in self.numbers:
            self.ops.append(op)
            self.numbers.add(name)
            self.counted.add(name)
            self.moving.add(name)


@dataclass(frozen=True, slots=True)
class _Place:
    """Where the batch lies in a value: inside its dimension of symbolic length, `inner` entries of it apart."""

    inner: int
    stride: int


def _place(op: Op, few: torch.Size, many: torch.Size, places: Mapping[str, _Place]) -> _Place | None:
    """The batch's place after an operation: a view keeps the order of the entries, the rest keeps whole dimensions."""
    before = [places[name] for name in op.reads() if name in places]
    grown = [i for i, (a, b) in enumerate(zip(few, many, strict=True)) if a != b]
    if not before or len(grown) != 1:
        return None
    tail = math.prod(few[grown[0] + 1 :])
    if op.kind in {"view", "_unsafe_view", "reshape"}:
        inner, rest = divmod(before[0].stride, tail)
        return None if rest else _Place(inner, before[0].stride)
    inner = before[0].inner
    return _Place(inner, inner * tail) if all(place.inner == inner for place in before) else None
