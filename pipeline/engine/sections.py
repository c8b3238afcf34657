"""One section of a spec, parsed by its owner, into the attempts a step will run."""

import importlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from pipeline.core.errors import BadInput, nearest
from pipeline.core.gate import Budget
from pipeline.core.spec import At, Draft
from pipeline.engine import fingerprint, pages
from pipeline.engine.shape import bent
from pipeline.engine.step import Attempt, Bisect

M = TypeVar("M", bound=BaseModel)
_ENGINE_KEYS = ("attempts", "timeout_seconds", "procs")
_BISECT_KEYS = ("bisect", "from", "to", "probes")


@dataclass(frozen=True, slots=True)
class Section:
    """What the planner knows of one stage once its section parsed."""

    name: str
    attempts: tuple[Attempt, ...]
    bisect: Bisect | None
    measures: frozenset[str]
    libraries: dict[str, str]
    timeout_seconds: float | None
    procs: int


def task_type() -> type[BaseModel]:
    found: type[BaseModel] = importlib.import_module("stages.task").Task
    return found


def data_files(task: Any, root: Path) -> tuple[Path, ...]:
    """Raises `BadInput` naming the first data file that is missing."""
    try:
        files: tuple[Path, ...] = task.files(root)
    except (ValueError, OSError) as error:
        raise BadInput(f"task.data: {error}") from None
    return files


def plan_section(
    name: str,
    table: Mapping[str, Any],
    limits: Budget,
    task: Any,
    draft: Draft,
    findings: list[str],
) -> Section | None:
    """Parse a stage's section and every attempt in it; findings are appended, None means there were some.

    A stage module with `obeying(table, limits)` gets the limits that it must keep while it works (a searcher's cap on
    cost), and returns its section with them filled in, so that they are part of the cache key.
    """
    module = pages.stage(name)
    task_dump = {} if task is None else task.model_dump(mode="json")
    if hasattr(module, "obeying"):
        table = module.obeying(table, limits)
    at = ("stages", name)
    before = len(findings)
    base = {key: value for key, value in table.items() if key not in _ENGINE_KEYS}
    engine = _engine_keys(table, at, draft, findings)
    overrides, knob = _attempts(table.get("attempts"), at, draft, findings)
    modules = [
        f"stages.{name}",
        "stages.task",
        *(m for f in getattr(module, "READS", ()) for m in fingerprint.folder_modules(f)),
    ]
    findings += [
        f"{draft.where((*at, key))}: every attempt sets it too, so this is never used; drop one"
        for key in _unused(base, overrides)
        if draft.written_together((*at, key), (*at, "attempts"))
    ]
    attempts, measures = [], frozenset[str]()
    for number, over in enumerate(overrides):
        where = (*at, "attempts") if over else at
        config = parsed(module.Config, {**base, **over}, where, draft, findings)
        if config is None:
            if number == 0 and not over:
                break
            continue
        code = fingerprint.code_digest([*modules, *method_modules(config), *method_modules(task)])
        attempts.append(Attempt(overrides=over, config=config.model_dump(mode="json"), code=code))
        try:
            measures |= module.measures(config, task_dump) if task is not None else frozenset()
        except (ValueError, BadInput) as error:
            findings.append(f"{draft.where(where)}: {error}")
    if len(findings) > before:
        return None
    bisect = None
    if knob is not None:
        path = _turned(attempts[0].config, attempts[1].config)
        integer = all(isinstance(_leaf(attempt.config, path), int) for attempt in attempts)
        bisect = Bisect(**knob, path=path, base=attempts[0], integer=integer)
        attempts = []
    return Section(
        name=name,
        attempts=tuple(attempts),
        bisect=bisect,
        measures=measures,
        libraries=fingerprint.versions((*module.LIBRARIES, *_readers(task))),
        **engine,
    )


def parsed(owner: type[M], table: object, at: At, draft: Draft, findings: list[str]) -> M | None:
    """The table as a value of its owner; sentences about everything that does not fit are appended."""
    try:
        made = owner.model_validate(table)
    except ValidationError as error:
        findings += sentences(error, owner, at, draft)
    except (ValueError, BadInput) as error:
        findings.append(f"{draft.where(at)}: {error}")
    else:
        rows = [(draft.where((*at, *loc)), wanted, got) for loc, wanted, got in bent(table, made)]
        findings += [f"{place}: expected {wanted}, got {_shown(got)}" for place, wanted, got in rows]
        return made
    return None


def sentences(error: ValidationError, owner: type[BaseModel], at: At, draft: Draft) -> list[str]:
    """One sentence per finding: place, what was expected, what came, and the nearest name for an unknown key."""
    found = []
    details = error.errors(include_url=False, include_context=False)
    for detail in details:
        loc = tuple(str(part) for part in detail["loc"])
        if detail["type"] == "too_short" and any(_within(other["loc"], detail["loc"]) for other in details):
            continue  # pydantic counts only the items that fit
        place = draft.where((*at, *loc))
        if detail["type"] == "extra_forbidden":
            valid = _fields_at(owner, loc[:-1])
            found.append(f"{place}: unknown key{nearest(loc[-1], valid) if valid else ''}")
        elif detail["type"] == "missing":
            found.append(f"{place}: missing")
        else:
            message = _plain(detail["msg"])
            got = detail["input"]
            known = isinstance(got, Mapping) or ", got " in message or repr(got) in message or f'"{got}"' in message
            found.append(f"{place}: {message}{'' if known else f', got {_shown(got)}'}")
    return list(dict.fromkeys(found))


_WORDS = (
    (r"Value error, ", ""),
    (r"Field required", "missing"),
    (r"Input should be a valid integer\b.*", "expected a whole number"),
    (r"Input should be a valid number\b.*", "expected a number"),
    (r"Input should be a valid string\b.*", "expected a text"),
    (r"Input should be a valid boolean\b.*", "expected true or false"),
    (r"Input should be a valid (tuple|list)\b.*", "expected a list"),
    (r"Input should be a valid dictionary\b.*", "expected a table"),
    (r"Input should be ", "expected "),
    (r"greater than or equal to ", "at least "),
    (r"less than or equal to ", "at most "),
)


def _plain(message: str) -> str:
    """pydantic's message in the words of a spec."""
    for pattern, words in _WORDS:
        message = re.sub(rf"^{pattern}" if pattern[0].isupper() else pattern, words, message)
    return message


def _shown(value: object) -> str:
    """A value as the spec writes it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f'"{value:.80}"'
    return f"{value!r:.80}"


def _within(inner: tuple[object, ...], outer: tuple[object, ...]) -> bool:
    return len(inner) > len(outer) and inner[: len(outer)] == outer


def _fields_at(owner: type[BaseModel], loc: Sequence[str]) -> tuple[str, ...]:
    """The keys that are valid at a place, as far as annotations tell."""
    model: Any = owner
    for part in loc:
        field = model.model_fields.get(part)
        model = None if field is None else field.annotation
        if not (isinstance(model, type) and issubclass(model, BaseModel)):
            return ()
    return tuple(model.model_fields)


def _readers(task: Any) -> tuple[str, ...]:
    """Distributions that turn the data's bytes into pixels."""
    found: tuple[str, ...] = () if task is None else task.data.LIBRARIES
    return found


def method_modules(value: object) -> list[str]:
    """Modules of every value inside a config that was written elsewhere (methods, and values they hold)."""
    if isinstance(value, BaseModel):
        inner = [m for name in type(value).model_fields for m in method_modules(getattr(value, name))]
        return [type(value).__module__, *inner]
    if isinstance(value, Mapping):
        return [m for item in value.values() for m in method_modules(item)]
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [m for item in value for m in method_modules(item)]
    return []


def _unused(base: Mapping[str, Any], overrides: Sequence[Mapping[str, Any]]) -> list[str]:
    """Keys of a section that each of its attempts replaces."""
    return [key for key in base if overrides and all(key in over for over in overrides)]


def _turned(boldest: Mapping[str, Any], gentlest: Mapping[str, Any]) -> tuple[str, ...]:
    """The path of the one leaf in which two full configs differ."""
    for key, value in boldest.items():
        if value != gentlest[key]:
            return (key, *_turned(value, gentlest[key])) if isinstance(value, Mapping) else (key,)
    return ()


def _leaf(config: Any, path: Sequence[str]) -> Any:
    """What a field holds once parsed: whole for a number of epochs, whatever way the spec wrote it."""
    return _leaf(config[path[0]], path[1:]) if path else config


def _engine_keys(table: Mapping[str, Any], at: At, draft: Draft, findings: list[str]) -> dict[str, Any]:
    timeout, procs = table.get("timeout_seconds"), table.get("procs", 1)
    if timeout is not None and (isinstance(timeout, bool) or not isinstance(timeout, int | float) or timeout <= 0):
        findings.append(f"{draft.where((*at, 'timeout_seconds'))}: expected a number above 0, got {timeout!r}")
        timeout = None
    if isinstance(procs, bool) or not isinstance(procs, int) or procs < 1:
        findings.append(f"{draft.where((*at, 'procs'))}: expected a whole number of at least 1, got {procs!r}")
        procs = 1
    return {"timeout_seconds": timeout, "procs": procs}


def _attempts(
    value: object, at: At, draft: Draft, findings: list[str]
) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """The overrides to try, and the knob to bisect if one is asked for (its first override is the boldest value)."""
    where = draft.where((*at, "attempts"))
    if value is None:
        return [{}], None
    if isinstance(value, list) and value and all(isinstance(item, Mapping) and item for item in value):
        return [dict(item) for item in value], None
    if isinstance(value, Mapping):
        unknown = [key for key in value if key not in _BISECT_KEYS]
        knob, ends = value.get("bisect"), [value.get("from"), value.get("to")]
        probes = value.get("probes", 5)
        numbers = all(isinstance(x, int | float) and not isinstance(x, bool) for x in [*ends, probes])
        sound = not unknown and numbers and ends[0] != ends[1]
        if sound and isinstance(knob, str) and isinstance(probes, int) and probes >= 2:
            bisect = {"knob": knob, "boldest": ends[0], "gentlest": ends[1], "probes": probes}
            return [{knob: ends[0]}, {knob: ends[1]}], bisect
    findings.append(
        f"{where}: expected a list of overrides such as [{{ ratio = 0.75 }}, {{ ratio = 0.5 }}], or "
        f'{{ bisect = "ratio", from = 0.9, to = 0.1, probes = 5 }} with at least 2 probes; got {value!r:.80}'
    )
    return [{}], None
