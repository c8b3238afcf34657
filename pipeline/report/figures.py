"""The small files that stages leave for reports: curves, confusions, pictures and the logs of training and compression.

Every part may be missing (a run that was refused early has none), and what does not fit is named, never fatal: a
report can still be made of a record whose figures an older or newer version wrote.
"""

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pipeline.core.record import RunRecord

FIGURES, TRAINING, COMPRESSION, IMAGES = "figures.json", "training.json", "compression.json", "images/"
_PNG = b"\x89PNG\r\n\x1a\n"
_LARGEST = 2 << 20
_OPEN = {"uncovered": "without a rule", "loose": "bounds too loose", "memory": "out of memory", "time": "out of time"}
M = TypeVar("M", bound=BaseModel)


class _Lenient(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)


class CurvePoint(_Lenient):
    """Accuracy under one attack at one radius, with its 95 % interval; eps in pixel units."""

    eps: float
    value: float
    low: float
    high: float
    attack: str


class Confusion(_Lenient):
    """Counts [true class][predicted class], on clean images and on the attacked ones."""

    classes: tuple[str, ...]
    clean: tuple[tuple[int, ...], ...]
    attacked: tuple[tuple[int, ...], ...]


class Twins(_Lenient):
    """Names of three PNG files, and the classes (names or numbers) that go with them."""

    clean: str
    adversarial: str
    difference: str
    label: int | str
    clean_prediction: int | str
    adversarial_prediction: int | str


class Shares(_Lenient):
    """How the images fared of which file; proved, open and broken add up. `wrong` of the broken needed no attack."""

    of: str
    images: int = Field(ge=1)
    proved: int = Field(ge=0)
    open: int = Field(ge=0)
    broken: int = Field(ge=0)
    wrong: int = Field(ge=0)
    why: dict[str, int] = {}

    @property
    def reasons(self) -> str:
        """What keeps images open, in brackets; nothing where it is not known or none is."""
        said = (f"{count} {_OPEN.get(word, word)}" for word, count in self.why.items())
        return f" ({', '.join(said)})" if self.why else ""

    @model_validator(mode="after")
    def _whole(self) -> "Shares":
        if self.proved + self.open + self.broken != self.images or self.wrong > self.broken:
            raise ValueError(f"{self.proved} + {self.open} + {self.broken} images are not {self.images}")
        return self


class Finding(_Lenient):
    """One validity check of an attack result."""

    name: str
    ok: bool
    text: str


@dataclass(frozen=True, slots=True)
class Figures:
    """What was found; `pictures` maps a PNG's name to a data URI, `problems` says what could not be used."""

    curve: tuple[CurvePoint, ...] = ()
    confusion: Confusion | None = None
    twins: tuple[Twins, ...] = ()
    validity: tuple[Finding, ...] = ()
    verdicts: tuple[Shares, ...] = ()
    attacks: tuple[dict[str, Any], ...] = ()
    training: tuple[dict[str, Any], ...] = ()
    compression: tuple[dict[str, Any], ...] = ()
    pictures: Mapping[str, str] = field(default_factory=dict)
    problems: tuple[str, ...] = ()


def figure_names(record: RunRecord) -> dict[str, str]:
    """Name -> SHA-256 of every file of the record that `read_figures` wants; later stages win.

    Where no attempt of a stage was chosen (its gate refused them all), its last one is the evidence.
    """
    newest = {stage.name: stage for stage in record.stages}
    newest.update({stage.name: stage for stage in record.chosen()})
    return {name: digest for stage in newest.values() for name, digest in stage.artifact.files.items() if _wanted(name)}


def read_figures(files: Mapping[str, Path] | Path | None) -> Figures:
    """From a mapping name -> path (a blob without suffix will do), or from a folder that holds such names."""
    if files is None:
        return Figures()
    if isinstance(files, Path):
        found = (path for path in sorted(files.rglob("*")) if path.is_file())
        files = {path.relative_to(files).as_posix(): path for path in found}
    problems: list[str] = []
    data = _json(files, FIGURES, problems)
    if data is not None and not isinstance(data, dict):
        problems.append(f"{FIGURES}: expected a table, got {type(data).__name__}")
    table: dict[str, Any] = data if isinstance(data, dict) else {}
    return Figures(
        curve=tuple(_items(CurvePoint, table, "curve", problems)),
        confusion=_confusion(table, problems),
        twins=tuple(_items(Twins, table, "images", problems)),
        validity=tuple(_items(Finding, table, "validity", problems)),
        verdicts=tuple(_items(Shares, table, "verdicts", problems)),
        attacks=_rows(table.get("attacks")),
        training=_rows(_json(files, TRAINING, problems)),
        compression=_rows(_json(files, COMPRESSION, problems)),
        pictures={name: uri for name, path in files.items() if _is_picture(name) and (uri := _picture(path))},
        problems=tuple(problems),
    )


def _wanted(name: str) -> bool:
    return name in (FIGURES, TRAINING, COMPRESSION) or _is_picture(name)


def _is_picture(name: str) -> bool:
    return name.startswith(IMAGES) and name.endswith(".png")


def _json(files: Mapping[str, Path], name: str, problems: list[str]) -> Any:
    if name not in files:
        return None
    try:
        return json.loads(files[name].read_text("utf-8"))
    except (OSError, ValueError) as error:
        problems.append(f"{name} could not be read: {error}")
        return None


def _items(kind: type[M], table: Mapping[str, Any], key: str, problems: list[str]) -> list[M]:
    rows = table.get(key, [])
    try:
        return [kind.model_validate(row) for row in rows]
    except (ValidationError, TypeError) as error:
        problems.append(f"{FIGURES}: {key} does not fit ({str(error).splitlines()[0]})")
        return []


def _confusion(table: Mapping[str, Any], problems: list[str]) -> Confusion | None:
    if not table.get("confusion"):
        return None
    try:
        found = Confusion.model_validate(table["confusion"])
    except ValidationError as error:
        problems.append(f"{FIGURES}: confusion does not fit ({str(error).splitlines()[0]})")
        return None
    n = len(found.classes)
    if any(len(matrix) != n or any(len(row) != n for row in matrix) for matrix in (found.clean, found.attacked)):
        problems.append(f"{FIGURES}: confusion does not fit (expected two tables of {n} rows and columns)")
        return None
    return found


def _rows(data: Any) -> tuple[dict[str, Any], ...]:
    """Flat rows: a list of tables as it is, one table as one row per entry, a name alone as a row of one."""
    if isinstance(data, dict):
        lists = [value for value in data.values() if isinstance(value, list) and value]
        if len(lists) == 1 and isinstance(lists[0][0], dict):
            return _rows(lists[0])
        return tuple({"name": key, "value": value} for key, value in data.items())
    if isinstance(data, list):
        return tuple(row if isinstance(row, dict) else {"name": row} for row in data)
    return ()


def _picture(path: Path) -> str | None:
    """A PNG as a data URI; None for anything that is no PNG or too large to put into a page."""
    try:
        if path.stat().st_size > _LARGEST:
            return None
        content = path.read_bytes()
    except OSError:
        return None
    return f"data:image/png;base64,{base64.b64encode(content).decode()}" if content.startswith(_PNG) else None
