"""The shape of a spec, before and after its owners read it: tables where tables belong, and no value bent to fit."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel, BeforeValidator

from pipeline.core.errors import nearest
from pipeline.core.spec import SECTIONS, At, Draft
from pipeline.core.stage import ORDER

_TABLES = ("task", "stages", "budget", "regression")


def top_level(draft: Draft, data: Mapping[str, Any]) -> list[str]:
    """Findings about the top level: unknown sections and stages, and tables where tables belong."""
    findings = [f"{draft.where((k,))}: unknown key{nearest(k, SECTIONS)}" for k in data if k not in SECTIONS]
    if "task" not in data:
        findings.append('task: missing; expected a section such as [task] with data = "mnist" and a threat')
    for section in _TABLES:
        if not isinstance(data.get(section, {}), Mapping):
            findings.append(f"{draft.where((section,))}: expected a table, got {data[section]!r:.80}")
        elif section != "task":
            for name, value in data.get(section, {}).items():
                if name not in ORDER:
                    findings.append(f"{draft.where((section, name))}: unknown stage{nearest(name, ORDER)}")
                elif not isinstance(value, _wanted(section)):
                    kind = "a table" if section == "stages" else f"tables, [[{section}.{name}]]"
                    findings.append(f"{draft.where((section, name))}: expected {kind}, got {value!r:.80}")
    return findings


def sound(data: Mapping[str, Any]) -> dict[str, Any]:
    """What is left without the parts that `top_level` finds fault with."""
    kept = {k: v for k, v in data.items() if k in SECTIONS and (k not in _TABLES or isinstance(v, Mapping))}
    for section in (k for k in kept if k in _TABLES and k != "task"):
        kept[section] = {k: v for k, v in kept[section].items() if k in ORDER and isinstance(v, _wanted(section))}
    return kept


def _wanted(section: str) -> type:
    return Mapping if section == "stages" else list


def unusable(draft: Draft, value: object, at: At = ()) -> Iterator[str]:
    """Findings about values that TOML has and a spec does not: dates, NaN, infinity, broken text."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from unusable(draft, item, (*at, key))
    elif isinstance(value, list):
        for item in value:
            yield from unusable(draft, item, at)
    elif isinstance(value, float) and not math.isfinite(value):
        yield f"{draft.where(at)}: expected a finite number, got {value}"
    elif isinstance(value, str) and not value.isprintable() and any("\ud800" <= c <= "\udfff" for c in value):
        yield f"{draft.where(at)}: expected UTF-8 text, got {value!r:.80}"
    elif not isinstance(value, bool | int | float | str):
        yield f"{draft.where(at)}: expected a number, a text, a list or a table, got the {type(value).__name__} {value}"


def bent(given: object, made: object, at: At = (), text: bool = False) -> Iterator[tuple[At, str, object]]:
    """Where pydantic took `true` or `"3"` for a number, or `1` for `true`: the place, what was expected, what came.

    `text` says that the field reads texts itself, as eps does with fractions. A flat section's keys are looked for in
    the values that it is made of.
    """
    if isinstance(given, Mapping) and isinstance(made, BaseModel):
        for key, value in given.items():
            owner = _owner(made, key)
            if owner is not None:
                reads = any(isinstance(x, BeforeValidator) for x in type(owner).model_fields[key].metadata)
                yield from bent(value, getattr(owner, key), (*at, str(key)), reads)
    elif isinstance(given, list | tuple) and isinstance(made, list | tuple) and len(given) == len(made):
        for number, (value, item) in enumerate(zip(given, made, strict=True)):
            yield from bent(value, item, (*at, str(number)), text)
    elif isinstance(made, bool):
        if not isinstance(given, bool):
            yield at, "true or false", given
    elif isinstance(made, int | float) and (isinstance(given, bool) or (isinstance(given, str) and not text)):
        yield at, "a whole number" if isinstance(made, int) else "a number", given


def _owner(made: BaseModel, key: str) -> BaseModel | None:
    if key in type(made).model_fields:
        return made
    inner = (getattr(made, name) for name in type(made).model_fields)
    return next((value for value in inner if isinstance(value, BaseModel) and key in type(value).model_fields), None)
