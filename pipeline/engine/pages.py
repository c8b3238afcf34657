"""Target pages and stage modules, found by name; the engine never imports either by statement."""

import importlib
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from pipeline.core.errors import BadInput, SpecError, nearest
from pipeline.core.spec import merge_into, turned
from pipeline.core.target import Target
from pipeline.engine.fingerprint import REPOSITORY


def target_names() -> tuple[str, ...]:
    """Every file of `targets/` is a page; packages and `_helpers` are not."""
    return tuple(sorted(path.stem for path in (REPOSITORY / "targets").glob("*.py") if path.stem[0] != "_"))


def target(name: str) -> Target:
    """Raises `SpecError` with the nearest name."""
    if name not in target_names():
        raise SpecError([f'target: no target "{name}"{nearest(name, target_names())}'])
    page: Target = importlib.import_module(f"targets.{name}").TARGET
    return page


def stage(name: str) -> ModuleType:
    """Raises `BadInput` where what stages are made of is not installed."""
    try:
        return importlib.import_module(f"stages.{name}")
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.partition(".")[0] in ("pipeline", "stages", "targets"):
            raise
        raise BadInput(
            f'stage {name} needs "{error.name}", which is not installed; `pip install "temper-edge[build,cpu]"`'
        ) from None


def under(sections: Mapping[str, Any], name: str, own: Mapping[str, Any]) -> dict[str, Any]:
    """A target's defaults for one stage with the spec's own section laid over them.

    Where the spec sets a knob that the target's attempts would turn, the target's attempts are dropped: what the user
    wrote is not overruled by a default.
    """
    merged: dict[str, Any] = {}
    merge_into(merged, sections.get(name, {}))
    if not turned(merged.get("attempts")).isdisjoint(own):
        del merged["attempts"]
    merge_into(merged, own)
    return merged
