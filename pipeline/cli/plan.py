"""`plan`: what would run, what is reused and why not, what is missing. Unchanged, it imports no torch."""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.cli.options import draft_of, line_options, roots
from pipeline.engine.plan import plan
from pipeline.engine.step import Plan, Step
from pipeline.engine.store import Store


def arguments(parser: argparse.ArgumentParser) -> None:
    line_options(parser)


def run(args: argparse.Namespace) -> int:
    runs, data_root = roots(args)
    made = plan(draft_of(args), args.target, runs, data_root)
    before = _last(runs / f"{made.spec.name}-{made.spec.target}" / "plan.json")
    print(f"{made.spec.name} for {made.spec.target}: {len(made.steps)} stages, data {made.data_digest[:12]}")
    for line in _lines(made, Store(runs / "store"), before):
        print(line)
    return 0


def _lines(made: Plan, store: Store, before: Plan | None) -> list[str]:
    """One line a stage. Past the first stage that would run, the inputs are unknown and nothing more can be said."""
    lines = []
    inputs: dict[str, str] | None = {}
    for step in made.steps:
        limits = f"{len(step.budget)} limit{'s' if len(step.budget) != 1 else ''}"
        outcome = None
        if inputs is not None and step.bisect is None:
            keys = [step.key(a, made.spec.task, made.data_digest, inputs) for a in step.attempts]
            found = [store.find(key) for key in keys]
            outcome = next((o for o in found if o is not None), None)
        if outcome is not None:
            known = sum(o is not None for o in found)
            tried = "" if len(found) == 1 else f" ({known} of {len(found)} attempts known)"
            lines.append(f"  {step.name:<9} reused{tried}, {limits}")
            inputs = dict(outcome.artifact.files) if len(found) == 1 else None
            continue
        why = "an earlier stage runs" if inputs is None else _why(step, made, before)
        lines.append(f"  {step.name:<9} runs: {why}; {_shape(step)}, {limits}")
        inputs = None
    return lines


def _shape(step: Step) -> str:
    if step.bisect is not None:
        return f"up to {step.bisect.probes} probes of {step.bisect.knob}"
    return "1 attempt" if len(step.attempts) == 1 else f"up to {len(step.attempts)} attempts"


def _why(step: Step, made: Plan, before: Plan | None) -> str:
    """What differs from the last plan of this run."""
    old = next((s for s in before.steps if s.name == step.name), None) if before else None
    if before is None or old is None:
        return "never run here"
    if before.data_digest != made.data_digest or before.spec.task != made.spec.task:
        return "the task or its data changed"
    new_config, old_config = (_flat(s.attempts[0].config if s.attempts else {}) for s in (step, old))
    changed = sorted(k for k in {*new_config, *old_config} if new_config.get(k) != old_config.get(k))
    if changed:
        key = changed[0]
        more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
        return f"{key} changed from {old_config.get(key)!r} to {new_config.get(key)!r}{more}"
    if old.libraries != step.libraries:
        return "the libraries' versions changed"
    if old.seed != step.seed:
        return "the seed changed"
    if [a.code for a in old.attempts] != [a.code for a in step.attempts]:
        return "its code changed"
    return "its outcome is not in the store"


def _flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    rows: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, Mapping):
            rows.update(_flat(value, f"{prefix}{key}."))
        else:
            rows[f"{prefix}{key}"] = value
    return rows


def _last(path: Path) -> Plan | None:
    try:
        return Plan.load(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return None
