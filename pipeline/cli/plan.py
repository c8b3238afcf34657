"""`plan`: what would run, what is reused and why not, what is missing. Unchanged, it imports no torch."""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.cli.options import draft_of, roots
from pipeline.core.gate import Verdict, judge
from pipeline.core.measurement import Measurement
from pipeline.engine.attempts import choice, following
from pipeline.engine.plan import plan
from pipeline.engine.step import Plan, Step
from pipeline.engine.store import Outcome, Store


def run(args: argparse.Namespace) -> int:
    runs, data_root = roots(args)
    store = Store(runs / "store")  # one that we cannot use is refused before planning writes into it
    made = plan(draft_of(args), args.target, runs, data_root)
    before = _last(runs / f"{made.spec.name}-{made.spec.target}" / "plan.json")
    print(f"{made.spec.name} for {made.spec.target}: {len(made.steps)} stages, data {made.data_digest[:12]}")
    for line in _lines(made, store, before):
        print(line)
    return 0


def _lines(made: Plan, store: Store, before: Plan | None) -> list[str]:
    """One line a stage. Past the first stage that would run, the inputs are unknown and nothing more can be said."""
    lines = []
    inputs: dict[str, str] | None = {}
    baseline: dict[str, Measurement] = {}
    for step in made.steps:
        limits = f"{len(step.budget)} limit{'s' if len(step.budget) != 1 else ''}"
        if inputs is None:
            lines.append(f"  {step.name:<9} runs: an earlier stage runs; {_shape(step)}, {limits}")
            continue
        tried, known = _follow(step, made, store, inputs, baseline)
        if not known:
            begun = f" after {len(tried)} known attempts" if tried else ""
            lines.append(f"  {step.name:<9} runs{begun}: {_why(step, made, before)}; {_shape(step)}, {limits}")
            inputs = None
            continue
        verdicts = [verdict for _, verdict in tried]
        chosen = choice(verdicts, step.budget)
        refused = "" if verdicts[chosen].passed else "; its gate refuses: " + verdicts[chosen].refusals[0].text
        lines.append(f"  {step.name:<9} reused, {limits}{refused}")
        if refused:
            return lines
        baseline |= {m.name: m for m in tried[chosen][0].measurements}
        inputs = dict(tried[chosen][0].artifact.files)
    return lines


def _follow(
    step: Step, made: Plan, store: Store, inputs: dict[str, str], baseline: dict[str, Measurement]
) -> tuple[list[tuple[Outcome, Verdict]], bool]:
    """The attempts whose outcomes are stored, judged as the line would; False where the next one is not."""
    tried: list[tuple[Outcome, Verdict]] = []
    while (attempt := following(step, [verdict for _, verdict in tried])) is not None:
        outcome = store.find(step.key(attempt, made.spec.task, made.data_digest, inputs))
        if outcome is None:
            return tried, False
        tried.append((outcome, judge(outcome.measurements, step.budget, baseline, outcome.findings)))
    return tried, True


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
