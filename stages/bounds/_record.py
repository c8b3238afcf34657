"""The operations of one forward pass as they reach torch's dispatcher, those that torch can decompose in their parts.

Activations that bounds can treat better whole (SiLU, GELU, hard swish, ...) are left whole. `torch.export` would do the
same and more, and takes far longer, most of it to load a compiler.
"""

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._decomp import core_aten_decompositions
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from stages.bounds import _decompose
from stages.method import InputError

_aten = torch.ops.aten
_WHOLE = (
    _aten.silu.default,
    _aten.hardswish.default,
    _aten.hardsigmoid.default,
    _aten.gelu.default,
    _aten.leaky_relu.default,
    _aten.softplus.default,
    _aten.adaptive_avg_pool2d.default,
    _aten._safe_softmax.default,
    _aten.logsumexp.default,
)
_SHUT = (
    Tensor.numpy,
    Tensor.__array__,
    Tensor.__dlpack__,
    Tensor.data_ptr,
    Tensor.untyped_storage,
)
_DATA = Tensor.data.__get__  # type: ignore[attr-defined]
_VIEWS = ("_unsafe_view", "_reshape_alias")  # they do not say so themselves
FLOATS = (torch.float32, torch.float64)


@dataclass(frozen=True, slots=True)
class Ref:
    """A value of the trace, by name."""

    name: str


@dataclass(frozen=True, slots=True)
class Op:
    """One operation: `result = target(*args, **kwargs)`, with a `Ref` wherever a value of the trace goes in.

    `kind` is the operator's name without its overload ("convolution"); `module` the path of the layer it came from.
    `counts` marks an operation that depends on how many images there are and not on them: the count itself, or a class
    token repeated for every image. `masked` marks a sum that nothing but a softmax reads: it may add a mask of -inf.
    """

    result: str
    kind: str
    target: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    module: str
    counts: bool = False
    masked: bool = False
    _reads: list[tuple[str, ...]] = field(default_factory=list, init=False, repr=False, compare=False)

    def reads(self) -> tuple[str, ...]:
        """The names of the values that go in."""
        if not self._reads:  # asked for in every pass
            found: list[str] = []
            substitute((self.args, dict(self.kwargs)), lambda ref: found.append(ref.name))
            self._reads.append(tuple(found))
        return self._reads[0]


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
    kind = type(tree)
    if kind is Ref:
        return values[tree.name]
    if kind is tuple or kind is list:  # asked for all the time: leaves take no call of their own
        return kind([fill(branch, values) if type(branch) in _BRANCHES else branch for branch in tree])
    if kind is dict:
        return {key: fill(branch, values) for key, branch in tree.items()}
    return tree


_BRANCHES = {Ref, tuple, list, dict}


class Recording(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The operations of one forward pass, with a `Ref` for every tensor."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.ops: list[Op] = []
        self.moving: set[str] = set()
        self.literals: dict[str, Tensor] = {}
        self.shapes: dict[str, torch.Size] = {}
        self.output = ""
        state = (*net.named_parameters(remove_duplicate=False), *net.named_buffers(remove_duplicate=False))
        self.stored = {f"net.{path}": path for path, _ in state}
        self.read: set[str] = set()  # paths of stored values whose numbers decide what is recorded
        self._viewed: set[str] = set()  # names of values that others may share their memory with
        self._roots = {name: {path} for name, path in self.stored.items()}
        self._names = {id(value): f"net.{path}" for path, value in state}
        self._parts: dict[int, tuple[str, int]] = {}
        self._alive: list[Any] = []  # a tensor that is gone may leave its id to another one
        self._paths = {id(module): path for path, module in net.named_modules()}
        self._inside: list[nn.Module] = []
        table: dict[Any, Any] = {**core_aten_decompositions(), **_decompose.RULES}
        self._table = {key: rule for key, rule in table.items() if key not in _WHOLE}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and loading the compiler takes seconds

    def record(self, net: nn.Module, image: Tensor) -> None:
        self._names[id(image)] = "image"
        self.moving.add("image")
        self.shapes["image"] = image.shape
        with (
            torch.no_grad(),
            self._hooked(),
            _unfused(),
            _Closed(self.look),
            _functional() as (wrapped, unwrapped),
            self,
        ):
            result = unwrapped(net(wrapped(image)))
        if not isinstance(result, Tensor):
            raise InputError(f"expected one output, the logits, got a {type(result).__name__}")
        self.output = self._name(result)

    @contextmanager
    def _hooked(self) -> Iterator[None]:
        def enter(module: nn.Module, _: Any) -> None:
            self._inside.append(module)

        def leave(*_: Any) -> None:
            self._inside.pop()

        modules = torch.nn.modules.module
        hooks = modules.register_module_forward_pre_hook(enter), modules.register_module_forward_hook(leave)
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        func, args, kwargs = *_plainer(func, args), kwargs or {}
        if func._schema.is_mutable and (plain := self._anew(func, args)) is not None:
            with self:
                found = plain(*args, **kwargs)
            self._alive.append(found)
            self._names[id(args[0])] = self._name(found)
            return args[0].copy_(found)
        rule = self._table.get(func)
        with self:
            found = NotImplemented if rule is None else rule(*args, **kwargs)
            if found is NotImplemented and func not in _WHOLE:
                found = func.decompose(*args, **kwargs)
        if found is not NotImplemented:
            return found
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise InputError("it draws random numbers")
        if func._schema.is_mutable:
            raise InputError(f"{func} writes into a value")
        result = func(*args, **kwargs)
        self._note(func, args, kwargs, result)
        return result

    def _anew(self, func: Any, args: Any) -> Any:
        """What makes a new value where `func` writes into a constant that was made on the way and has no views."""
        made = self._names.get(id(args[0])) if args else None
        if made not in self._roots or made in {*self.stored, *self.moving, *self._viewed}:
            return None
        packet = getattr(_aten, str(func.overloadpacket.__name__).removesuffix("_"), None)
        plain = getattr(packet, func._overloadname, None)
        return None if plain is func else plain

    def _note(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        if any(result is arg for arg in args):
            return
        self._alive.append((args, kwargs, result))
        self.look(*_looked_at(func, args))
        if torch.Tag.data_dependent_output in func.tags:
            return
        args, kwargs = self._refs(args), self._refs(dict(kwargs))
        kind = str(func.overloadpacket.__name__)
        op = Op(f"{kind}_{len(self.ops)}", kind, _callable(func), args, kwargs, self._place())
        moves = not self.moving.isdisjoint(op.reads())
        if op.reads() and self.literals.keys() >= set(op.reads()):
            return  # known; what is read of it is a literal, so sizes may go through sums of sizes
        if moves and kind == "_to_copy" and kwargs.get("dtype") in FLOATS:
            # Bounds have a precision of their own.
            self._names[id(result)] = op.reads()[0]
            return
        if kind in _VIEWS or any(given.alias_info is not None for given in func._schema.returns):
            self._viewed |= {op.result, *op.reads()}
        parts = result if isinstance(result, list | tuple) else (result,)
        self.shapes[op.result] = parts[0].shape
        if parts is result:
            self._parts.update({id(part): (op.result, i) for i, part in enumerate(parts)})
        else:
            self._names[id(result)] = op.result
        self._add(op, moves)

    def look(self, *values: Tensor) -> None:
        """The numbers in a value decide how the network goes on. Raises `InputError` where they are an image's."""
        for name in map(self._name, values):
            if name in self.moving:
                raise InputError("it reads the value of a pixel")
            self.read |= self._roots.get(name, set())

    def _place(self) -> str:
        """The path of the innermost module and, where it says so itself, the part of it that is at work."""
        if not self._inside:
            return ""
        path, told = self._paths.get(id(self._inside[-1]), ""), getattr(self._inside[-1], "at_work", str)()
        return ", ".join(part for part in (path, told) if part)

    def _add(self, op: Op, moves: bool) -> None:
        self.ops.append(op)
        self._roots[op.result] = set().union(*(self._roots.get(name, set()) for name in op.reads()))
        if moves:
            self.moving.add(op.result)

    def _refs(self, tree: Any) -> Any:
        if isinstance(tree, Tensor):
            return Ref(self._name(tree))
        if isinstance(tree, list | tuple):
            return type(tree)(self._refs(branch) for branch in tree)
        if isinstance(tree, dict):
            return {key: self._refs(branch) for key, branch in tree.items()}
        return tree

    def _name(self, value: Tensor) -> str:
        name = self._names.get(id(value))
        if name is None and id(value) in self._parts:
            base, place = self._parts[id(value)]
            name = f"{base}_{place}"
            self.shapes[name] = value.shape
            self._add(Op(name, "getitem", operator.getitem, (Ref(base), place), {}, ""), base in self.moving)
        elif name is None:
            name = f"literal_{len(self.literals)}"
            self.literals[name] = value
        self._names[id(value)] = name
        return name


class _Closed(TorchFunctionMode):
    """Ways out of torch that the dispatcher does not see are shut: what comes back would be taken for a constant."""

    def __init__(self, look: Callable[[Tensor], None]) -> None:
        super().__init__()
        self.look = look

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        if func in _SHUT:
            raise InputError(f"it reads the value of a pixel by {func.__name__}")
        if func is Tensor.tolist and type(args[0]) in (Tensor, nn.Parameter):  # nothing else lets it through
            self.look(args[0])
        if func is _DATA:
            func = Tensor.detach  # the same, seen by the dispatcher
        return func(*args, **kwargs or {})


@contextmanager
def _unfused() -> Iterator[None]:
    """Attention in its parts."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


@contextmanager
def _functional() -> Iterator[tuple[Callable[[Tensor], Tensor], Callable[[Any], Any]]]:
    """Operations that write into a tensor reach the dispatcher as ones that make a new one, for a wrapped image."""

    def unwrapped(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        torch._sync(value)  # type: ignore[attr-defined, no-untyped-call]
        return torch._from_functional_tensor(value) if torch._is_functional_tensor(value) else value

    torch._enable_functionalization(reapply_views=True)
    try:
        yield torch._to_functional_tensor, unwrapped
    finally:
        torch._disable_functionalization()  # type: ignore[no-untyped-call]


def _plainer(func: Any, args: Any) -> tuple[Any, Any]:
    """What stands for an operation that does more than is asked for here."""
    if func is _aten.empty.memory_format:  # written over before it is read, in circular padding
        return _aten.zeros.default, args
    if func is _aten.native_batch_norm.default and not args[5]:
        return _aten._native_batch_norm_legit_no_training.default, (*args[:5], *args[6:8])
    if func is _aten.as_strided.default and _lies_so(*args):  # how pooling to one pixel stays channels-last
        return _aten.alias.default, args[:1]
    return func, args


def _lies_so(value: Tensor, size: Sequence[int], stride: Sequence[int], offset: int | None = None) -> bool:
    """Whether `as_strided` changes nothing but strides over dimensions of one entry."""
    laid = zip(value.shape, value.stride(), stride, strict=True)
    return list(value.shape) == list(size) and not offset and all(n == 1 or a == b for n, a, b in laid)


def _looked_at(func: Any, args: Any) -> list[Tensor]:
    """The tensors whose numbers decide what else is recorded: read out, or the size of a result depends on them."""
    if torch.Tag.data_dependent_output in func.tags:
        return [arg for arg in args if isinstance(arg, Tensor)]
    if torch.Tag.dynamic_output_shape not in func.tags:
        return []
    masks = (
        [i for i in args[1] if isinstance(i, Tensor) and i.dtype == torch.bool] if func is _aten.index.Tensor else args
    )
    return [arg for arg in masks if isinstance(arg, Tensor)]


def _callable(func: Any) -> Callable[..., Any]:
    # The ends of an interval may lie otherwise in memory than the value did.
    return _aten.reshape.default if func in (_aten.view.default, _aten._unsafe_view.default) else func
