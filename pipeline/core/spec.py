"""The spec: one file says everything. Sections stay opaque here; `plan` has their owners parse them.

Three layers, the later one wins key by key: a preset, the user's TOML file, `--set a.b=c`. Every value remembers where
it was written, so that a finding can name file and line.
"""

import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from pipeline.core.errors import BadInput, SpecError, nearest
from pipeline.core.gate import Budget
from pipeline.core.value import Value

PRESETS = Path(__file__).resolve().parent.parent / "presets"
SECTIONS = ("name", "preset", "seed", "target", "task", "stages", "budget", "regression")
_STAGES = ("search", "train", "compress", "validate", "export")

At = tuple[str, ...]

# A folder's name, short enough for a target behind it.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


class Spec(Value):
    """`stages` holds one section per stage, `budget` and `regression` limits per stage.

    Budgets are in no cache key: a tighter one judges the stored measurements again and reruns nothing.
    """

    name: str
    seed: int = Field(default=0, ge=0, strict=True)
    target: str = "reference"
    task: dict[str, Any]
    stages: dict[str, dict[str, Any]] = {}
    budget: dict[str, Budget] = {}
    regression: dict[str, Budget] = {}

    @field_validator("name")
    @classmethod
    def _is_a_folder_name(cls, name: str) -> str:
        if not _NAME.fullmatch(name):
            raise ValueError(
                'expected up to 100 letters, digits, ".", "_" and "-", a letter or digit first, '
                f'since the run\'s folder is named so; got "{name:.60}"'
            )
        return name


@dataclass(frozen=True, slots=True)
class Draft:
    """The merged tables of a spec before anybody parsed them, and where each key was written."""

    data: dict[str, Any]
    places: dict[At, str] = field(default_factory=dict)

    def where(self, at: At) -> str:
        """`spec.toml:14: stages.train.epochs`: the place of the key, or of the nearest table around it.

        The number of a `[[table]]` is left out, since its line tells which one is meant.
        """
        named = [part for end, part in enumerate(at, 1) if not (part.isdigit() and at[:end] in self.places)]
        for end in range(len(at), 0, -1):
            place = self.places.get(at[:end])
            if place:
                return f"{place}: {'.'.join(named)}"
        return ".".join(named)

    def written_together(self, one: At, other: At) -> bool:
        """Whether both keys were written, in the same file."""
        first, second = (self.places.get(at, "").rpartition(":")[0] for at in (one, other))
        return bool(first) and first == second and not first.startswith("--set")


def presets() -> tuple[str, ...]:
    return tuple(sorted(path.stem for path in PRESETS.glob("*.toml")))


def read(path: Path | None = None, preset: str | None = None, settings: Sequence[str] = ()) -> Draft:
    """The merged draft of a preset, a file and `--set` settings; neither file nor preset means the `digits` preset.

    Raises `BadInput` where a file cannot be read or is no TOML, `SpecError` for an unknown preset or setting.
    """
    layers: list[tuple[dict[str, Any], dict[At, str]]] = []
    written = ""
    if path is not None:
        layers.append(_file(path, str(path)))
        named = layers[0][0].pop("preset", None)
        if named is not None and not isinstance(named, str):
            raise SpecError([f"{layers[0][1][('preset',)]}: preset: expected a name, got {named!r}"])
        if named is not None:
            preset, written = named, f"{layers[0][1][('preset',)]}: "
        layers[0][0].setdefault("name", _name_of(path))
    elif preset is None:
        preset = "digits"
    if preset is not None:
        if preset not in presets():
            raise SpecError([f'{written}no preset "{preset}"{nearest(preset, presets())}'])
        base, places = _file(PRESETS / f"{preset}.toml", f"preset {preset}")
        base.setdefault("name", preset)
        layers.insert(0, (base, places))
    layers.extend(_setting(text) for text in settings)
    data: dict[str, Any] = {}
    places = {}
    for table, table_places in layers:
        _drop_overruled(data, table)
        merge_into(data, table)
        places = {at: place for at, place in places.items() if _stands(at, table)} | table_places
    return Draft(data, places)


def _drop_overruled(base: dict[str, Any], over: Mapping[str, Any]) -> None:
    """A layer that sets a knob which the attempts of a lower one turn, and names none itself, takes them away.

    What was said last is not overruled by what it was said over: `--set compress.ratio=0.3` means one attempt, at 0.3.
    """
    below, above = base.get("stages"), over.get("stages")
    if not isinstance(below, dict) or not isinstance(above, Mapping):
        return
    for name, own in above.items():
        lower = below.get(name)
        if not isinstance(own, Mapping) or not isinstance(lower, dict) or "attempts" in own:
            continue
        if not turned(lower.get("attempts")).isdisjoint(own):
            del lower["attempts"]


def turned(attempts: object) -> set[str]:
    """The keys that a list of attempts, or a bisection, sets; none where it is neither."""
    if isinstance(attempts, Mapping):
        return {str(attempts.get("bisect"))}
    rows = attempts if isinstance(attempts, list) else []
    return {key for row in rows if isinstance(row, Mapping) for key in row}


_NAMING = ("kind", "builder")


def merge_into(base: dict[str, Any], over: Mapping[str, Any]) -> None:
    """Lay `over` over `base`: tables key by key, anything else replaced.

    A table that names another kind or builder replaces: the options of the old one would not fit the new one.
    """
    for key, value in over.items():
        old = base.get(key)
        if (
            isinstance(old, dict)
            and isinstance(value, Mapping)
            and all(value.get(name, old.get(name)) == old.get(name) for name in _NAMING)
        ):
            merge_into(old, value)
        else:
            base[key] = _copy(value)


def _stands(at: At, over: Mapping[str, Any]) -> bool:
    """Whether what was written at `at` is not replaced, by a list or a number of a later layer, as a whole."""
    found: Any = over
    for part in at:
        if not isinstance(found, Mapping):
            return False
        if part not in found:
            return True
        found = found[part]
    return True


def _copy(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _copy(item) for key, item in value.items()}
    return [_copy(item) for item in value] if isinstance(value, list) else value


def _name_of(path: Path) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem).strip("-.") or "spec"


def _file(path: Path, label: str) -> tuple[dict[str, Any], dict[At, str]]:
    try:
        text = path.read_text(encoding="utf-8-sig")  # editors on Windows put a mark in front
    except FileNotFoundError:
        if str(path) in presets():
            raise BadInput(f"{label}: no such file; the preset of that name is `--preset {path}`") from None
        raise BadInput(f"{label}: no such file; `python -m pipeline init` writes a spec for your data") from None
    except UnicodeDecodeError as error:
        raise BadInput(f"{label}: expected UTF-8 text, got byte {error.object[error.start]:#04x}; save it so") from None
    except OSError as error:
        raise BadInput(f"{label}: cannot be read: {error.strerror or error}; expected a spec file (TOML)") from None
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise BadInput(f"{label}: not TOML: {error}") from None
    if not data:
        raise SpecError([f'{label}: the spec is empty; expected at least [task], or a line such as preset = "digits"'])
    return data, {at: f"{label}:{line}" for at, line in _lines(text).items()}


_HEADER = re.compile(r"^\s*\[\[?\s*([^\]]+?)\s*\]\]?\s*(?:#.*)?$")
_KEY = re.compile(r"""^\s*((?:[A-Za-z0-9_-]+|"[^"]*"|'[^']*')(?:\s*\.\s*(?:[A-Za-z0-9_-]+|"[^"]*"|'[^']*'))*)\s*=""")


def _lines(text: str) -> dict[At, int]:
    """The line of every table and key. Keys of inline tables share the line of the key they belong to."""
    found: dict[At, int] = {}
    table: At = ()
    rows: dict[At, int] = {}
    depth = 0
    for number, line in enumerate(text.splitlines(), 1):
        if depth == 0:
            if header := _HEADER.match(line):
                table = _parts(header[1])
                found.setdefault(table, number)
                if line.lstrip().startswith("[["):  # the tables of a list are told apart by their number
                    rows[table] = rows.get(table, -1) + 1
                    table = (*table, str(rows[table]))
                    found[table] = number
                continue
            if key := _KEY.match(line):
                found.setdefault((*table, *_parts(key[1])), number)
        bare = re.sub(r""""(?:\\.|[^"\\])*"|'[^']*'|#.*""", "", line)
        depth += sum(bare.count(c) for c in "[{") - sum(bare.count(c) for c in "]}")
    return found


def _parts(dotted: str) -> At:
    return tuple(part.strip().strip("\"'") for part in dotted.split("."))


def _setting(text: str) -> tuple[dict[str, Any], dict[At, str]]:
    """`train.epochs=3` or `stages.train.epochs=3`; the value is TOML where it parses, else a string."""
    key, equals, value = text.partition("=")
    at = _parts(key)
    if not equals or not all(at):
        raise SpecError([f'--set {text}: expected a.b=value, such as "train.epochs=3"'])
    if at[0] in _STAGES:
        at = ("stages", *at)
    if at == ("preset",):
        raise SpecError([f"--set {text}: a preset lies below everything else; give it with --preset"])
    if at[0] not in SECTIONS:
        raise SpecError([f'--set {text}: no section "{at[0]}"{nearest(at[0], (*SECTIONS, *_STAGES))}'])
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        parsed = value
    table: dict[str, Any] = {at[-1]: parsed}
    for part in reversed(at[:-1]):
        table = {part: table}
    return table, {at: f"--set {text}"}
