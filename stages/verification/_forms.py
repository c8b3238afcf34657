"""The text of a specification as trees of tokens."""

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from stages.method import InputError

_DEEPEST = 200
_DIGITS = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d{1,4})?"
NUMBER = re.compile(_DIGITS)
# Large files are made of (<= X_0 0.5) and the like, so those are tokens too.
_TOKEN = re.compile(rf"\(\s*([<>]=?)\s+([XY]_\d+|\w+\[[\d,]+\])\s+({_DIGITS})\s*\)|[()]|[^\s()]+")

Tree = Any  # a token, a list of trees, or a `Bound`


class Bound(NamedTuple):
    """(<= X_0 0.5), as it was written."""

    operator: str
    variable: str
    number: str


def forms(text: str, where: str) -> Iterator[tuple[int, list[Tree]]]:
    """Top-level parentheses with the line they open on."""
    text = re.sub(r";[^\n]*", "", text)
    text = re.sub(r"\[[^\]\n]*\]", lambda found: found[0].replace(" ", ""), text)
    stack: list[list[Tree]] = []
    start, line, at = 0, 1, 0
    for found in _TOKEN.finditer(text):
        token = found[0]
        if stack and found[3] is not None:
            stack[-1].append(Bound(*found.groups()))
        elif token == "(":
            if not stack:
                line, at = line + text.count("\n", at, found.start()), found.start()
                start = line
            if len(stack) == _DEEPEST:
                raise InputError(f"{where}, line {start}: more than {_DEEPEST} parentheses inside each other")
            stack.append([])
        elif not stack:
            line += text.count("\n", at, found.start())
            raise InputError(f'{where}, line {line}: expected "(assert ...", got "{token[:40]}"; is this VNN-LIB?')
        elif token == ")":
            done = stack.pop()
            if stack:
                stack[-1].append(done or "()")  # as in (declare-fun X_0 () Real)
                continue
            if not done or not isinstance(done[0], str):
                raise InputError(f"{where}, line {start}: expected a word after the first parenthesis")
            yield start, done
        else:
            stack[-1].append(token)
    if stack:
        raise InputError(f"{where}, line {start}: a parenthesis is never closed")


def short(tree: Tree) -> str:
    """A form as it was written, cut where it is long."""
    text = tree if isinstance(tree, str) else _written(tree)
    return text if len(text) <= 80 else f"{text[:79]}…"


def _written(tree: Tree) -> str:
    return tree if isinstance(tree, str) else f"({' '.join(_written(part) for part in tree)})"
