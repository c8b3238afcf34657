"""VNN-LIB, the format of the verification competition: boxes of inputs, linear constraints that mark unsafe outputs.

A file says when a network is unsafe: for some input X in a box the output Y meets the constraints. Boxes and
constraints may be joined by `and` and `or`, nested at will; what is read is brought into disjunctive normal form,

    unsafe  <=>  exists a region r and one of its conjunctions (A, b):  X in [low_r, high_r]  and  A Y <= b.

Numbers stay fractions, so that nothing is rounded here. Version 1 (`declare-const X_0 Real`), and of version 2 what has
one network with one input and one output (`X[0,3]`, counted in row-major order).
Source: Demarchi, Guidotti, Pulina, Tacchella, "Supporting standardization of neural networks verification with VNN-LIB
and CoCoNet" (2023); the competition's files, which leave out most of SMT-LIB.
"""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from fractions import Fraction
from functools import lru_cache
from itertools import product
from typing import Any

from stages.method import InputError, unknown

_MOST = 100_000  # regions times conjunctions
_DEEPEST = 200
_TOKEN = re.compile(r"[()]|[^\s()]+")
_VARIABLE = re.compile(r"([XY])_(\d+)")
_ELEMENT = re.compile(r"(\w+)\[([\d,]+)\]")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,4})?")
_IGNORED = {"set-logic", "set-info", "set-option", "check-sat", "get-model", "get-info", "exit", "vnnlib-version"}
_COMPARE = {"<=": (1, False), "<": (1, True), ">=": (-1, False), ">": (-1, True)}

Tree = Any  # a token, or a list of trees
Variable = tuple[str, int]
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

    low: tuple[Fraction, ...]
    high: tuple[Fraction, ...]
    unsafe: tuple[tuple[Row, ...], ...]
    open_sides: frozenset[tuple[int, bool]] = frozenset()


@dataclass(frozen=True, slots=True)
class Spec:
    """The network has `inputs` numbers in and `outputs` numbers out, and is unsafe in any of the regions."""

    inputs: int
    outputs: int
    regions: tuple[Region, ...]


def parse(text: str, where: str = "the specification") -> Spec:
    """Raises `InputError` (with the line) for what is no VNN-LIB, unknown variables, non-linear constraints,
    constraints between inputs, unbounded inputs and boxes without a point."""
    names, asserted = _Names(), list[tuple[int, Tree]]()
    for line, form in _forms(text, where):
        try:
            if names.declares(form):
                continue
            if form[0] == "assert" and len(form) == 2:
                asserted.append((line, form[1]))
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


def _forms(text: str, where: str) -> Iterator[tuple[int, list[Tree]]]:
    """Top-level parentheses with the line they open on."""
    text = re.sub(r";[^\n]*", "", text)
    text = re.sub(r"\[[^\]\n]*\]", lambda found: found[0].replace(" ", ""), text)
    stack: list[list[Tree]] = []
    start, line, at = 0, 1, 0
    for found in _TOKEN.finditer(text):
        token = found[0]
        if token == "(":
            if not stack:
                line, at = line + text.count("\n", at, found.start()), found.start()
                start = line
            if len(stack) == _DEEPEST:
                raise InputError(f"{where}, line {start}: more than {_DEEPEST} parentheses inside each other")
            stack.append([])
        elif not stack:
            line += text.count("\n", at, found.start())
            raise InputError(f'{where}, line {line}: expected "(", got "{token[:40]}"; is this a VNN-LIB file?')
        elif token == ")":
            done = stack.pop()
            if stack:
                stack[-1].append(done or "()")  # as in (declare-fun X_0 () Real)
            elif not done:
                raise InputError(f"{where}, line {start}: nothing between two parentheses")
            elif isinstance(done[0], str):
                yield start, done
            else:
                raise InputError(f"{where}, line {start}: expected a word after the first parenthesis")
        else:
            stack[-1].append(token)
    if stack:
        raise InputError(f"{where}, line {start}: a parenthesis is never closed")


@dataclass(slots=True)
class _Names:
    """The variables declared so far: `sizes` counts X and Y; `shapes` has those of version 2 by their own names."""

    sizes: dict[str, int] = field(default_factory=dict)
    seen: set[Variable] = field(default_factory=set)
    shapes: dict[str, tuple[str, tuple[int, ...]]] = field(default_factory=dict)

    def declares(self, form: list[Tree]) -> bool:
        """Whether the form is a declaration; if so it is taken in."""
        if form[0] in ("declare-const", "declare-fun"):
            found = _VARIABLE.fullmatch(form[1]) if len(form) >= 3 and isinstance(form[1], str) else None
            if found is None or form[-1] != "Real":
                raise InputError(f"expected (declare-const X_0 Real) or Y_0, got {_short(form)}")
            self.seen.add((found[1], int(found[2])))
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
                raise InputError(f"expected (declare-input X real [1,5]) or declare-output, got {_short(part)}")
            if kind in self.sizes:
                raise InputError("expected one input and one output; networks with more are not checked here")
            shape = tuple(int(size) for size in part[3].strip("[]").split(",") if size)
            self.shapes[part[1]] = kind, shape
            self.sizes[kind] = math.prod(shape)

    def find(self, token: str) -> Variable:
        """Raises `InputError` for a variable that was not declared."""
        found = _VARIABLE.fullmatch(token)
        if found is not None and (found[1], int(found[2])) in self.seen:
            return found[1], int(found[2])
        element = _ELEMENT.fullmatch(token)
        if element is not None and element[1] in self.shapes:
            kind, shape = self.shapes[element[1]]
            places = [int(place) for place in element[2].split(",") if place]
            if len(places) == len(shape) and all(place < size for place, size in zip(places, shape, strict=True)):
                flat = 0
                for place, size in zip(places, shape, strict=True):
                    flat = flat * size + place
                return kind, flat
        known = [f"{kind}_0 to {kind}_{size - 1}" for kind, size in sorted(self.sizes.items())]
        raise InputError(f'unknown variable "{token[:40]}"; declared are {" and ".join(known)}')


@dataclass(slots=True)
class _Cube:
    """A conjunction: rows over outputs, and ends of the box, (i, sign) -> (value, strict) for sign X_i >= value, or >
    where strict; the larger pair is the tighter end. `never` where the conjunction is plainly false."""

    ends: dict[tuple[int, int], tuple[Fraction, bool]] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    never: bool = False

    def meet(self, other: "_Cube") -> None:
        for side, end in other.ends.items():
            self.ends[side] = max(self.ends.get(side, end), end)
        self.rows += other.rows
        self.never |= other.never


def _gather(tree: Tree, names: _Names, cube: _Cube, choices: list[list[_Cube]]) -> None:
    """A formula's plain part joins `cube`; every `or` in it becomes one entry of `choices`."""
    if isinstance(tree, str) or not isinstance(tree[0], str):
        raise InputError(f"expected a constraint such as (<= Y_0 1.5), got {_short(tree)}")
    if tree[0] == "and":
        for part in tree[1:]:
            _gather(part, names, cube, choices)
    elif tree[0] == "or":
        cubes = [cube for part in tree[1:] for cube in _disjuncts(part, names)]
        if len(cubes) == 1:
            cube.meet(cubes[0])
        else:
            choices.append(cubes)
    elif (end := _end(tree, names)) is not None:
        cube.meet(end)
    else:
        _compare(tree, names, cube)


def _disjuncts(tree: Tree, names: _Names) -> list[_Cube]:
    plain, choices = _Cube(), list[list[_Cube]]()
    _gather(tree, names, plain, choices)
    return _products(plain, choices)


def _products(plain: _Cube, choices: list[list[_Cube]]) -> list[_Cube]:
    """The plain part with one entry of each choice, in every combination."""
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


def _end(tree: list[Tree], names: _Names) -> _Cube | None:
    """(<= X_0 0.5) and the like, of which large files are made; None for any other constraint."""
    if len(tree) != 3 or tree[0] not in _COMPARE or not isinstance(tree[1], str) or not isinstance(tree[2], str):
        return None
    if _NUMBER.fullmatch(tree[1]) or not _NUMBER.fullmatch(tree[2]):
        return None
    (kind, i), (sign, strict) = names.find(tree[1]), _COMPARE[tree[0]]
    return _Cube({(i, -sign): (-sign * _number(tree[2]), strict)}) if kind == "X" else None


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
        raise InputError(f"{tree[0]} compares two terms, got {_short(tree)}")
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
        raise InputError(f"{_short(tree)}: expected a bound of one input, or a constraint of outputs alone")
    else:
        [((_, i), weight)] = weights.items()
        cube.meet(_Cube({(i, -1 if weight > 0 else 1): (-bound / abs(weight), strict)}))


def _linear(tree: Tree, names: _Names) -> Linear:
    if isinstance(tree, str):
        return {_ONE: _number(tree)} if _NUMBER.fullmatch(tree) else {names.find(tree): Fraction(1)}
    head, parts = tree[0], [_linear(part, names) for part in tree[1:]]
    if not isinstance(head, str) or not parts:
        raise InputError(f"expected a sum or a product, got {_short(tree)}")
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
            raise InputError(f"{_short(tree)}: a product of variables; only linear constraints are checked")
        return _plus({}, rest[0] if rest else {_ONE: Fraction(1)}, factor)
    if head == "/" and len(parts) == 2:
        if not set(parts[1]) <= {_ONE} or not parts[1].get(_ONE):
            raise InputError(f"{_short(tree)}: division by a variable or by zero; only linear constraints are checked")
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


def _regions(inputs: int, always: _Cube, choices: list[list[_Cube]]) -> tuple[Region, ...]:
    """One region for every box that some case names, with the conjunctions of all its cases."""
    unsafe: dict[Any, list[tuple[Row, ...]]] = {}
    for cube in _products(_Cube(rows=always.rows, never=always.never), choices):
        if not cube.never:
            unsafe.setdefault(tuple(sorted(cube.ends.items())), []).append(tuple(cube.rows))
    if not unsafe:
        raise InputError("its constraints contradict each other whatever the network says; nothing is left to check")
    found = []
    for ends, conjunctions in unsafe.items():
        box = _Cube(dict(always.ends))
        box.meet(_Cube(dict(ends)))
        low, high = _sides(inputs, box, 1), _sides(inputs, box, -1)
        empty = [i for i in range(inputs) if low[i] > high[i] or (low[i] == high[i] and _is_open(box, i))]
        if not empty:
            sides = frozenset((i, sign < 0) for (i, sign), (_, strict) in box.ends.items() if strict)
            found.append(Region(low, high, tuple(dict.fromkeys(conjunctions)), sides))
        elif len(unsafe) == 1:
            ends_of = f"lower bound {shown(low[empty[0]])} and upper bound {shown(high[empty[0]])}"
            raise InputError(f"the box is inverted: input X_{empty[0]} has {ends_of}")
    if not found:
        raise InputError("every box in it is inverted: some lower bound lies above the upper bound")
    return tuple(found)


def _sides(inputs: int, box: _Cube, sign: int) -> tuple[Fraction, ...]:
    for i in range(inputs):
        if (i, sign) not in box.ends:
            side = "lower" if sign > 0 else "upper"
            raise InputError(f"input X_{i} has no {side} bound, so the box is infinite; expected both bounds for each")
    return tuple(sign * box.ends[i, sign][0] for i in range(inputs))


def _is_open(box: _Cube, i: int) -> bool:
    return box.ends[i, 1][1] or box.ends[i, -1][1]


def _no(kind: str, name: object, valid: Sequence[str]) -> InputError:
    return InputError(f'{kind} "{_short(name)}": {unknown(_short(name), valid).replace("key", kind)}')


def shown(value: Fraction) -> str:
    """A number for a message, as a float64 where it is not too large for one."""
    try:
        return repr(float(value))
    except OverflowError:
        return f"{Decimal(value.numerator) / value.denominator:.6g}"


def _short(tree: Tree) -> str:
    """A form as it was written, cut where it is long."""
    text = tree if isinstance(tree, str) else _written(tree)
    return text if len(text) <= 80 else f"{text[:79]}…"


def _written(tree: Tree) -> str:
    return tree if isinstance(tree, str) else f"({' '.join(_written(part) for part in tree)})"
