"""Network -> list of primitive operations, so that a layer made of primitives needs no code in this folder.

`torch.export` follows the network with a symbolic batch and lowers it to core ATen; activations that bounds can treat
better whole (SiLU, GELU, hard swish, ...) and adaptive pooling are left whole. A trace holds structure and names, no
weights: those are read from the network at every use, so a trace survives training and gradients reach the weights.
"""

import math
import warnings
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import Node
from torch.fx.node import map_arg

from stages.method import InputError

_aten = torch.ops.aten
_WHOLE = (
    _aten.silu.default,
    _aten.hardswish.default,
    _aten.hardsigmoid.default,
    _aten.gelu.default,
    _aten.elu.default,
    _aten.leaky_relu.default,
    _aten.softplus.default,
    _aten.adaptive_avg_pool2d.default,
)


@dataclass(frozen=True, slots=True)
class Ref:
    """A value of the trace, by name."""

    name: str


@dataclass(frozen=True, slots=True)
class Op:
    """One operation: `result = target(*args, **kwargs)`, with a `Ref` wherever a value of the trace goes in.

    `kind` is the operator's name without its overload ("convolution"); `module` the path of the layer it came from.
    `counts` marks an operation whose result is a whole number (the batch size, say), not a tensor.
    """

    result: str
    kind: str
    target: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    module: str
    counts: bool = False

    def reads(self) -> tuple[str, ...]:
        """The names of the values that go in."""
        found: list[str] = []
        substitute((self.args, dict(self.kwargs)), lambda ref: found.append(ref.name))
        return tuple(found)


@dataclass(frozen=True, slots=True)
class Trace:
    """Operations in order of execution. `moving` names the values that depend on the images.

    `strides` says whom an entry of a moving value belongs to: entry i of the value, counted row by row, is one of
    example (i // stride) mod B. A value is missing there if its place of the batch cannot be followed.
    """

    ops: tuple[Op, ...]
    input: str
    output: str
    stored: Mapping[str, str]
    literals: Mapping[str, Tensor]
    moving: frozenset[str]
    strides: Mapping[str, int]

    def constants(self, net: nn.Module) -> dict[str, Any]:
        """Every value that does not depend on the images, computed in the precision that the network computes it in."""
        values: dict[str, Any] = dict(self.literals)
        for name, path in self.stored.items():
            owner, _, leaf = path.rpartition(".")
            values[name] = getattr(net.get_submodule(owner), leaf)
        for op in self.ops:
            if op.result not in self.moving:
                values[op.result] = op.target(*fill(op.args, values), **fill(dict(op.kwargs), values))
        return values


def substitute(tree: Any, swap: Callable[[Ref], Any]) -> Any:
    """`tree` (nested lists, tuples, mappings) with every `Ref` replaced."""
    if isinstance(tree, Ref):
        return swap(tree)
    if isinstance(tree, list | tuple):
        return type(tree)(substitute(branch, swap) for branch in tree)
    if isinstance(tree, dict):
        return {key: substitute(branch, swap) for key, branch in tree.items()}
    return tree


def fill(tree: Any, values: Mapping[str, Any]) -> Any:
    """`tree` with every `Ref` replaced by its value."""
    return substitute(tree, lambda ref: values[ref.name])


_kept: WeakKeyDictionary[nn.Module, tuple[Hashable, Trace]] = WeakKeyDictionary()


def trace(net: nn.Module, image: Tensor) -> Trace:
    """The trace of `net` for images [B, ...] of the shape and type of `image`, for any B.

    Kept per network and made anew when a module, a shape or a plain attribute of a module has changed. Raises
    `InputError` where the network cannot be followed (control flow on pixel values, say).
    """
    state = _fingerprint(net, image)
    kept = _kept.get(net)
    if kept is None or kept[0] != state:
        kept = (state, _read(_export(net, image)))
        _kept[net] = kept
    return kept[1]


def _fingerprint(net: nn.Module, image: Tensor) -> Hashable:
    plain = (bool, int, float, str, tuple, torch.Size, type(None))
    modules = tuple(
        (path, type(module), tuple((k, v) for k, v in vars(module).items() if isinstance(v, plain)).__repr__())
        for path, module in net.named_modules()
    )
    shapes = tuple((name, value.shape) for name, value in net.state_dict(keep_vars=True).items())
    return modules, shapes, image.shape[1:], image.dtype, image.device


def _export(net: nn.Module, image: Tensor) -> ExportedProgram:
    example = image.new_zeros((2, *image.shape[1:]))
    table: dict[Any, Any] = {**torch.export.default_decompositions()}
    for whole in _WHOLE:
        table.pop(whole, None)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about torch's own deprecations, which the user cannot act on
            followed = torch.export.export(net, (example,), dynamic_shapes=({0: Dim("batch")},), strict=False)
            program: ExportedProgram = followed.run_decompositions(table)
    except Exception as error:  # torch.export raises dozens of unrelated types
        reason = str(error).strip().splitlines()[:1]
        raise InputError(
            f"bounds: {type(net).__name__} cannot be followed to primitive operations: {type(error).__name__}: "
            f"{''.join(reason)}; bounds need a network without control flow on pixel values and with a free batch size"
        ) from error
    return program


def _read(program: ExportedProgram) -> Trace:
    stored: dict[str, str] = {}
    literals: dict[str, Tensor] = {}
    source = ""
    for spec in program.graph_signature.input_specs:
        name, target = str(getattr(spec.arg, "name", "")), str(spec.target)
        if spec.kind == InputKind.USER_INPUT:
            source = name
        elif spec.kind == InputKind.CONSTANT_TENSOR:
            literals[name] = program.constants[target]
        else:
            stored[name] = target
    ops, moving, output = [], {source}, ""
    places: dict[str, _Place] = {}
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name == source:
            places[source] = _Place(1, _tail(node, 0))
        if node.op == "output":
            results = node.args[0]
            if len(results) != 1 or not isinstance(results[0], Node):
                raise InputError(f"bounds: expected a network with one output, the logits, got {len(results)}")
            output = results[0].name
        elif node.op == "call_function" and node.users:  # what nobody reads asserts something about types
            op = _op(node)
            if not moving.isdisjoint(op.reads()):
                moving.add(op.result)
                place = _place(node, op, places)
                if place is not None:
                    places[op.result] = place
                    if op.kind == "getitem" and op.args[1] == 0:
                        places[op.reads()[0]] = place
            ops.append(op)
    strides = {name: place.stride for name, place in places.items()}
    return Trace(tuple(ops), source, output, stored, literals, frozenset(moving), strides)


@dataclass(frozen=True, slots=True)
class _Place:
    """Where the batch lies in a value: inside its dimension of symbolic length, `inner` entries of it apart."""

    inner: int
    stride: int


def _place(node: Node, op: Op, places: Mapping[str, _Place]) -> _Place | None:
    """The batch's place after an operation: a view keeps the order of the entries, the rest keeps whole dimensions."""
    before = [places[name] for name in op.reads() if name in places]
    at = _symbolic(node)
    if not before or op.counts:
        return None
    if at is None:
        # A tuple of values: `getitem` asks for the batch's place in what it picks from.
        return before[0] if isinstance(node.meta.get("val"), tuple | list) or node.meta.get("val") is None else None
    tail = _tail(node, at)
    if op.kind in {"view", "_unsafe_view", "reshape"}:
        inner, rest = divmod(before[0].stride, tail)
        return None if rest else _Place(inner, before[0].stride)
    inner = before[0].inner
    return _Place(inner, inner * tail) if all(place.inner == inner for place in before) else None


def _symbolic(node: Node) -> int | None:
    """The one dimension of a value whose length depends on the batch."""
    found = [i for i, size in enumerate(getattr(node.meta.get("val"), "shape", ())) if not isinstance(size, int)]
    return found[0] if len(found) == 1 else None


def _tail(node: Node, at: int) -> int:
    return math.prod(int(size) for size in node.meta["val"].shape[at + 1 :])


def _op(node: Node) -> Op:
    packet = getattr(node.target, "overloadpacket", node.target)
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    args, kwargs = map_arg(node.args, lambda n: Ref(n.name)), map_arg(node.kwargs, lambda n: Ref(n.name))  # type: ignore[arg-type,return-value]
    kind = str(getattr(packet, "__name__", packet))
    counts = isinstance(node.meta.get("val"), int | torch.SymInt)
    module = str(stack[-1][0]) if stack else ""
    return Op(node.name, kind, _callable(node), _plain(args), _plain(kwargs), module, counts)


def _callable(node: Node) -> Callable[..., Any]:
    if not callable(node.target):
        raise InputError(f"bounds: the trace calls {node.target!r}, which is no operation")
    return node.target


def _plain(tree: Any) -> Any:
    """torch.fx's immutable lists and dictionaries as ordinary ones."""
    if isinstance(tree, list):
        return [_plain(branch) for branch in tree]
    if isinstance(tree, tuple):
        return tuple(_plain(branch) for branch in tree)
    if isinstance(tree, dict):
        return {key: _plain(branch) for key, branch in tree.items()}
    return tree
