"""`list`: methods, data sets, targets and presets on offer. Files are parsed, none is imported, so it is instant."""

from __future__ import annotations

import argparse
import ast
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path

from pipeline.core.errors import BadInput, nearest

_ROOT = Path(__file__).resolve().parent.parent
_METHODS = {
    "searchers": "stages/searchers",
    "recipes": "stages/recipes",
    "compressors": "stages/compressors",
    "attacks": "stages/attacks",
    "bounds": "stages/bounds",
    "detectors": "stages/detectors",
    "builders": "stages/nn/builders",
    "layers": "stages/nn/layers",
    "data": "stages/data",
    "targets": "targets",
}
KINDS = (*_METHODS, "presets")
_WIDTH = 110


def run(args: argparse.Namespace) -> int:
    """Print one line for each; raises `BadInput` for an unknown kind."""
    if args.kind is not None and args.kind not in KINDS:
        raise BadInput(f'list: unknown kind "{args.kind}"{nearest(args.kind, KINDS)}')
    for kind in KINDS if args.kind is None else (args.kind,):
        rows = sorted(entries(kind))
        width = max((len(name) for name, _ in rows), default=0)
        print(f"{kind}:")
        for name, line in rows:
            print(f"  {name:<{width}}  {line}".rstrip())
    return 0


def entries(kind: str) -> Iterator[tuple[str, str]]:
    """Name and first sentence of every method of a kind, in no order."""
    if kind == "presets":
        for path in (_ROOT / "pipeline/presets").glob("*.toml"):
            first = path.read_text(encoding="utf-8").partition("\n")[0]
            yield path.stem, _short(first.removeprefix("#")) if first.startswith("#") else ""
        return
    for path in (_ROOT / _METHODS[kind]).glob("*.py"):
        if path.stem != "base" and path.stem[0] != "_":
            yield path.stem, _summary(path)
    for point in entry_points(group=_METHODS[kind].replace("/", ".")):
        yield point.name, f"({point.dist.name if point.dist else point.value})"


def _summary(path: Path) -> str:
    source = path.read_text(encoding="utf-8")
    # A docstring at the very top is parsed alone: parsing whole files would take most of the command's time.
    quoted = source.split('"""', 2)
    head = f'"""{quoted[1]}"""' if len(quoted) == 3 and not quoted[0] else source
    try:
        return _short(ast.get_docstring(ast.parse(head)) or "")
    except SyntaxError as error:
        raise BadInput(f"{path}: line {error.lineno}: not valid Python: {error.msg}") from None


def _short(text: str) -> str:
    """The first sentence on one line, cut where it would not fit."""
    paragraph = " ".join(text.strip().partition("\n\n")[0].split())
    end = next((i for i in range(len(paragraph)) if paragraph[i : i + 2] == ". "), len(paragraph))
    sentence = paragraph[:end].rstrip(".")
    return sentence if len(sentence) <= _WIDTH else f"{sentence[: _WIDTH - 1].rsplit(' ', 1)[0]} …"
