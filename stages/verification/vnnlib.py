"""VNN-LIB, the format of the verification competition: boxes of inputs, linear constraints that mark unsafe outputs.

A file says when a network is unsafe: for some input X in a box the output Y meets the constraints. Boxes and
constraints may be joined by `and` and `or`, nested at will; what is read is brought into disjunctive normal form,

    unsafe  <=>  exists a region r and one of its conjunctions (A, b):  X in [low_r, high_r]  and  A Y <= b.

Numbers stay decimals or fractions, so that nothing is rounded here; of a formula that nothing can satisfy no region is
left. Version 1 (`declare-const X_0 Real`), and of version 2 what has
one network with one input and one output (`X[0,3]`, counted in row-major order).
Source: Demarchi, Guidotti, Pulina, Tacchella, "Supporting standardization of neural networks verification with VNN-LIB
and CoCoNet" (2023); the competition's files, which leave out most of SMT-LIB.
"""

import gc
import math
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from decimal import Decimal
from fractions import Fraction
from functools import lru_cache
from itertools import product
from typing import Any

from stages.method import InputError, unknown
from stages.verification._forms import NUMBER, Bound, Tree, forms, short

_MOST = 200_000  # regions times conjunctions
_VARIABLE = re.compile(r"([XY])_(\d+)")
_ELEMENT = re.compile(r"(\w+)\[([\d,]+)\]")
_IGNORED = {"set-logic", "set-info", "set-option", "check-sat", "get-model", "get-info", "exit", "vnnlib-version"}
_COMPARE = {"<=": (1, False), "<": (1, True), ">=": (-1, False), ">": (-1, True)}

Variable = tuple[str, int]
Number = Decimal | Fraction
End = tuple[Number, bool]  # a value, and whether it is left out
Linear = dict[Variable, Fraction]
_ONE: Variable = ("", 0)


@dataclass(frozen=True, slots=True)
class Row:
    """The constraint sum_k weights[k] Y_k <= bound, or < where strict."""

    weights: tuple[tuple[int, Fraction], ...]
    bound: Fraction
    strict: bool = False

    def holds(self, outputs: Sequence[Fraction]) -> bool:
        value = sum((weight * outputs[k] for k, weight in self.weights), Fraction(0))
        return value < self.bound if self.strict else value <= self.bound


@dataclass(frozen=True, slots=True)
class Region:
    """A box of inputs, and the conjunctions of which none may hold inside; `open_sides` are (input, is high) without
    their end point."""

    low: tuple[Number, ...]
    high: tuple[Number, ...]
    unsafe: tuple[tuple[Row, ...], ...]
    open_sides: frozenset[tuple[int, bool]] = frozenset()


@dataclass(frozen=True, slots=True)
class Spec:
    """The network has `inputs` numbers in and `outputs` numbers out, and is unsafe in any of the regions.

    Without a region it is safe whatever it computes: the constraints contradict each other.
    """

    inputs: int
    outputs: int
    regions: tuple[Region, ...]


def parse(text: str, where: str = "the specification") -> Spec:
    """Raises `InputError` (with the line) for what is no VNN-LIB, unknown variables, non-linear constraints,
    constraints between inputs, unbounded inputs, and bounds outside of all disjunctions that are inverted."""
    collects = gc.isenabled()
    gc.disable()  # a large file is millions of objects, none of which goes before the end
    try:
        return _parse(text, where)
    finally:
        if collects:
            gc.enable()


def _parse(text: str, where: str) -> Spec:
    names, asserted = _Names(), list[tuple[int, Tree]]()
    for line, form in forms(text, where):
        try:
            if names.declares(form):
                continue
            if form[0] == "assert" and len(form) == 2:
                asserted.append((line, form[1]))
            elif form[0] == "assert":
                raise InputError(f"assert takes one formula, got {len(form) - 1}; join several by (and ...)")
            elif form[0] not in _IGNORED:
                raise _no("form", form[0], ("declare-const", "assert"))
        except InputError as error:
            raise InputError(f"{where}, line {line}: {error}") from None
    if not names.sizes.get("X") or not names.sizes.get("Y"):
        raise InputError(f"{where}: expected inputs X_0, X_1, ... and outputs Y_0, ... to be declared")
    always, choices = _Cube(), list[list[_Cube]]()
    for line, tree in asserted:
        try:
            _gather(tree, names, always, choices)
        except InputError as error:
            raise InputError(f"{where}, line {line}: {error}") from None
    try:
        return Spec(names.sizes["X"], names.sizes["Y"], _regions(names.sizes["X"], always, choices))
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


@dataclass(slots=True)
class _Names:
    """The variables declared so far: `sizes` counts X and Y; `shapes` has those of version 2 by their own names."""

    sizes: dict[str, int] = field(default_factory=dict)
    seen: dict[str, Variable] = field(default_factory=dict)
    shapes: dict[str, tuple[str, tuple[int, ...]]] = field(default_factory=dict)

    def declares(self, form: list[Tree]) -> bool:
        """Whether the form is a declaration; if so it is taken in."""
        if form[0] in ("declare-const", "declare-fun"):
            found = _VARIABLE.fullmatch(form[1]) if len(form) >= 3 and isinstance(form[1], str) else None
            if found is None or form[-1] != "Real":
                raise InputError(f"expected (declare-const X_0 Real) or Y_0, got {short(form)}")
            self.seen[form[1]] = found[1], int(found[2])
            self.sizes[found[1]] = max(self.sizes.get(found[1], 0), int(found[2]) + 1)
            return True
        if form[0] == "declare-network":
            self._network(form)
            return True
        return False

    def _network(self, form: list[Tree]) -> None:
        if self.sizes:
            raise InputError("expected one network; properties of several networks are not checked here")
        for part in form[2:]:
            kind = {"declare-input": "X", "declare-output": "Y"}.get(part[0]) if isinstance(part, list) else None
            if kind is None or len(part) != 4 or not re.fullmatch(r"\[[\d,]*\]", str(part[3])):
                raise InputError(f"expected (declare-input X real [1,5]) or declare-output, got {short(part)}")
            if kind in self.sizes:
                raise InputError("expected one input and one output; networks with more are not checked here")
            shape = tuple(int(size) for size in part[3].strip("[]").split(",") if size) or (1,)
            self.shapes[part[1]] = kind, shape
            self.sizes[kind] = math.prod(shape)

    def find(self, token: str) -> Variable:
        """Raises `InputError` for a variable that was not declared."""
        if token in self.seen:
            return self.seen[token]
        element = _ELEMENT.fullmatch(token)
        if element is not None and element[1] in self.shapes:
            kind, shape = self.shapes[element[1]]
            places = [int(place) for place in element[2].split(",") if place]
            if len(places) == len(shape) and all(place < size for place, size in zip(places, shape, strict=True)):
                flat = 0
                for place, size in zip(places, shape, strict=True):
                    flat = flat * size + place
                return kind, flat
        if token.lstrip("+-.")[:1].isdigit():
            raise InputError(f'cannot read the number "{token[:40]}"; expected 0.5, -2 or 1e-3, at most 1e9999')
        known = [f"{kind}_0 to {kind}_{size - 1}" for kind, size in sorted(self.sizes.items())]
        raise InputError(f'unknown variable "{token[:40]}"; declared are {" and ".join(known)}')


@dataclass(slots=True)
class _Cube:
    """A conjunction: rows over outputs; ends of the box, (i, 1) for the low one of X_i and (i, -1) for the high one.
    `never` where it is plainly false."""

    ends: dict[tuple[int, int], End] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    never: bool = False

    def meet(self, other: "_Cube") -> None:
        for side, end in other.ends.items():
            self.tighten(side, end)
        self.rows += other.rows
        self.never |= other.never

    def tighten(self, side: tuple[int, int], end: End) -> None:
        """One end more; the tighter one stays."""
        known = self.ends.get(side)
        if known is None or _above(end[0], known[0], side[1]) or (end[1] and not _above(known[0], end[0], side[1])):
            self.ends[side] = end


def _above(value: Number, other: Number, sign: int = 1) -> bool:
    """value > other for sign 1, value < other for sign -1."""
    if type(value) is not type(other):
        value, other = Fraction(value), Fraction(other)
    return value > other if sign > 0 else value < other


def _gather(tree: Tree, names: _Names, cube: _Cube, choices: list[list[_Cube]]) -> None:
    """A formula's plain part joins `cube`; every `or` in it becomes one entry of `choices`."""
    if isinstance(tree, Bound):
        _bound(tree, names, cube)
    elif isinstance(tree, str) or not isinstance(tree[0], str):
        raise InputError(f"expected a constraint such as (<= Y_0 1.5), got {short(tree)}")
    elif tree[0] == "and":
        for part in tree[1:]:
            _gather(part, names, cube, choices)
    elif tree[0] == "or":
        cubes = [cube for part in tree[1:] for cube in _disjuncts(part, names)]
        if len(cubes) == 1:
            cube.meet(cubes[0])
        else:
            choices.append(cubes)
    else:
        _compare(tree, names, cube)


def _disjuncts(tree: Tree, names: _Names) -> list[_Cube]:
    plain, choices = _Cube(), list[list[_Cube]]()
    _gather(tree, names, plain, choices)
    return _products(plain, choices)


def _products(plain: _Cube, choices: list[list[_Cube]]) -> list[_Cube]:
    """The plain part with one entry of each choice, in every combination."""
    if not choices:
        return [plain]
    count = math.prod(len(cubes) for cubes in choices)
    if count > _MOST:
        raise InputError(f"its disjunctions multiply to {count} cases; at most {_MOST} are checked, split the file")
    found = []
    for picked in product(*choices):
        cube = _Cube(dict(plain.ends), list(plain.rows), plain.never)
        for part in picked:
            cube.meet(part)
        found.append(cube)
    return found


def _bound(tree: Bound, names: _Names, cube: _Cube) -> None:
    """(<= X_0 0.5), (> Y_1 2) and the like."""
    sign, strict = _COMPARE[tree.operator]
    kind, i = names.find(tree.variable)
    if kind == "X":
        cube.tighten((i, -sign), (_decimal(tree.number), strict))
    else:
        cube.rows.append(Row(((i, Fraction(sign)),), sign * _number(tree.number), strict))


def _compare(tree: list[Tree], names: _Names, cube: _Cube) -> None:
    signs = (
        [_COMPARE["<="], _COMPARE[">="]]
        if tree[0] in ("=", "==")
        else [_COMPARE[tree[0]]]
        if tree[0] in _COMPARE
        else []
    )
    if not signs:
        raise _no("operator", tree[0], ("and", "or", "<=", ">=", "<", ">", "="))
    if len(tree) != 3:
        raise InputError(f"{tree[0]} compares two terms, got {short(tree)}")
    left, right = _linear(tree[1], names), _linear(tree[2], names)
    for sign, strict in signs:
        # The constraint as sign * (left - right) <= 0.
        weights = {name: sign * weight for name, weight in _plus(left, right, -1).items() if weight}
        _constrain(weights, strict, cube, tree)


def _constrain(weights: Linear, strict: bool, cube: _Cube, tree: list[Tree]) -> None:
    bound = -weights.pop(_ONE, Fraction(0))
    kinds = {kind for kind, _ in weights}
    if not kinds:
        cube.never |= not (bound > 0 or (bound == 0 and not strict))
    elif kinds == {"Y"}:
        cube.rows.append(Row(tuple(sorted((k, weight) for (_, k), weight in weights.items())), bound, strict))
    elif len(weights) > 1:
        raise InputError(f"{short(tree)}: expected a bound of one input, or a constraint of outputs alone")
    else:
        [((_, i), weight)] = weights.items()
        cube.tighten((i, -1 if weight > 0 else 1), (bound / weight, strict))


def _linear(tree: Tree, names: _Names) -> Linear:
    if isinstance(tree, str):
        return {_ONE: _number(tree)} if NUMBER.fullmatch(tree) else {names.find(tree): Fraction(1)}
    head, parts = tree[0], [_linear(part, names) for part in tree[1:]]
    if not isinstance(head, str) or not parts:
        raise InputError(f"expected a sum or a product, got {short(tree)}")
    if head == "+":
        return _sum(parts, 1)
    if head == "-":
        return _plus({}, parts[0], -1) if len(parts) == 1 else _sum(parts, -1)
    if head == "*":
        factor, rest = Fraction(1), list[Linear]()
        for part in parts:
            if set(part) <= {_ONE}:
                factor *= part.get(_ONE, Fraction(0))
            else:
                rest.append(part)
        if len(rest) > 1:
            raise InputError(f"{short(tree)}: a product of variables; only linear constraints are checked")
        return _plus({}, rest[0] if rest else {_ONE: Fraction(1)}, factor)
    if head == "/" and len(parts) == 2:
        if not set(parts[1]) <= {_ONE} or not parts[1].get(_ONE):
            raise InputError(f"{short(tree)}: division by a variable or by zero; only linear constraints are checked")
        return _plus({}, parts[0], 1 / parts[1][_ONE])
    raise _no("function", head, ("+", "-", "*", "/"))


def _sum(parts: list[Linear], sign: int) -> Linear:
    total = parts[0]
    for part in parts[1:]:
        total = _plus(total, part, sign)
    return total


def _plus(left: Linear, right: Linear, factor: Fraction | int) -> Linear:
    """left + factor right."""
    total = dict(left)
    for name, weight in right.items():
        total[name] = total.get(name, Fraction(0)) + factor * weight
    return total


@lru_cache(maxsize=1 << 16)
def _number(token: str) -> Fraction:
    return Fraction(token)


@lru_cache(maxsize=1 << 16)
def _decimal(token: str) -> Decimal:
    """Exact, as a fraction is, and ten times as fast."""
    return Decimal(token)


def _regions(inputs: int, always: _Cube, choices: list[list[_Cube]]) -> tuple[Region, ...]:
    """One region for every box that some case names and that holds a point, with the conjunctions of all its cases."""
    _upright(always)
    unsafe: dict[Any, list[tuple[Row, ...]]] = {}
    for cube in _products(_Cube(rows=list(always.rows), never=always.never), choices):
        if not cube.never:
            unsafe.setdefault(tuple(cube.ends.items()), []).append(tuple(cube.rows))
    found = []
    for ends, conjunctions in unsafe.items():
        box = _Cube(dict(always.ends))
        box.meet(_Cube(dict(ends)))
        low, high = _sides(inputs, box, 1), _sides(inputs, box, -1)
        if not any(_holds_nothing(*pair) for pair in zip(low, high, strict=True)):
            sides = frozenset((i, sign < 0) for (i, sign), (_, strict) in box.ends.items() if strict)
            first, last = tuple(value for value, _ in low), tuple(value for value, _ in high)
            found.append(Region(first, last, tuple(dict.fromkeys(conjunctions)), sides))
    return tuple(found)


def _upright(always: _Cube) -> None:
    """Raises `InputError` for bounds outside of all disjunctions that are inverted: a slip, hardly what was meant."""
    for i in sorted({i for i, _ in always.ends}):  # the file's own: it may declare far more inputs than it bounds
        low, high = always.ends.get((i, 1)), always.ends.get((i, -1))
        if low is not None and high is not None and _above(low[0], high[0]):
            ends = f"lower bound {shown(low[0])} and upper bound {shown(high[0])}"
            raise InputError(f"the box is inverted: input X_{i} has {ends}")


def _holds_nothing(low: End, high: End) -> bool:
    return not _above(high[0], low[0]) and (_above(low[0], high[0]) or low[1] or high[1])


def _sides(inputs: int, box: _Cube, sign: int) -> list[End]:
    for i in range(inputs):
        if (i, sign) not in box.ends:
            side = "lower" if sign > 0 else "upper"
            raise InputError(f"input X_{i} has no {side} bound, so the box is infinite; expected both bounds for each")
    return [box.ends[i, sign] for i in range(inputs)]


def _no(kind: str, name: object, valid: Sequence[str]) -> InputError:
    return InputError(f'{kind} "{short(name)}": {unknown(short(name), valid).replace("key", kind)}')


def shown(value: Number) -> str:
    """A number for a message, as a float64 where it is not too large for one."""
    with suppress(OverflowError):
        if math.isfinite(float(value)):
            return repr(float(value))
    exact = Fraction(value)
    return f"{Decimal(exact.numerator) / exact.denominator:.6g}"
