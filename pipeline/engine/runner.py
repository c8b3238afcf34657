"""The line: each step is found or run, judged and recorded, and its artifact feeds the next."""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from pipeline.core.errors import GateRefused
from pipeline.core.gate import Verdict, judge
from pipeline.core.record import RunRecord, StageRecord
from pipeline.core.stage import Emit, Files, Result
from pipeline.engine.attempts import acceptable, choice, following
from pipeline.engine.step import Attempt, Plan, Step
from pipeline.engine.store import Outcome, Store

Run = Callable[[Step, Attempt, Files, Path], Result]
Save = Callable[[RunRecord], None]


def line(
    plan: Plan, store: Store, launch: Run, save: Save, emit: Emit, environment: Mapping[str, str], fresh: set[str]
) -> RunRecord:
    """Run the plan from search to export; the record is saved after every attempt.

    `fresh` collects the keys that ran in this process, so that a restart does not call them reused. Raises
    `GateRefused` at the first step that no attempt brings through its gate, `Damaged` where a stored file is not what
    it was, and whatever `launch` raises.
    """
    record, files = _begun(plan, environment), dict[str, str]()
    for step in plan.steps:
        before, tried = record, list[StageRecord]()
        while (attempt := following(step, [entry.verdict for entry in tried])) is not None:
            emit("stage", {"stage": step.name, "attempt": len(tried), "overrides": attempt.overrides})
            key = step.key(attempt, plan.spec.task, plan.data_digest, files)
            with store.lock(key, f"stage {step.name}"):
                outcome = store.find(key)
                if outcome is None:
                    outcome = _run(step, attempt, key, files, store, launch)
                    fresh.add(key)
            verdict = judge(outcome.measurements, step.budget, before.latest(), outcome.findings)
            tried.append(_entry(step, attempt, len(tried), outcome, key not in fresh, verdict))
            chosen = choice([entry.verdict for entry in tried], step.budget)
            record = _with(before, tried, chosen)
            save(record)
            _tell(emit, tried[-1])
        if not tried[chosen].verdict.passed:
            save(record.model_copy(update={"refused": step.name}))
            raise GateRefused(refusal(step, tried, chosen))
        files = tried[chosen].artifact.files
    record = record.model_copy(update={"complete": True})
    save(record)
    return record


def refusal(step: Step, tried: Sequence[StageRecord], chosen: int) -> str:
    """Which gate, which attempt was the closest, and every number that was not met."""
    verdict = tried[chosen].verdict
    why = "; ".join(reason.text for reason in verdict.refusals)
    if len(tried) == 1:
        return f"{step.name} was refused by its gate: {why}"
    overrides = ", ".join(f"{key} = {value}" for key, value in tried[chosen].overrides.items())
    which = f"attempt {chosen + 1} of {len(tried)} ({overrides})"
    if acceptable(verdict):
        return f"{step.name} was refused by its gate at {which}, and test results never ask for another attempt: {why}"
    return f"{step.name}: none of {len(tried)} attempts passed its gate; the closest was {which}: {why}"


def _run(step: Step, attempt: Attempt, key: str, files: Mapping[str, str], store: Store, launch: Run) -> Outcome:
    start = time.monotonic()
    result = launch(step, attempt, store.open(files), store.scratch(key))
    return store.keep(key, step.name, result, round(time.monotonic() - start, 3))


def _begun(plan: Plan, environment: Mapping[str, str]) -> RunRecord:
    return RunRecord(
        name=plan.spec.name,
        spec=plan.spec,
        spec_digest=plan.spec_digest,
        data_digest=plan.data_digest,
        environment=dict(environment),
    )


def _entry(step: Step, attempt: Attempt, number: int, outcome: Outcome, reused: bool, verdict: Verdict) -> StageRecord:
    return StageRecord(
        name=step.name,
        attempt=number,
        overrides=attempt.overrides,
        key=outcome.key,
        reused=reused,
        seconds=outcome.seconds,
        config=attempt.config,
        artifact=outcome.artifact,
        measurements=outcome.measurements,
        outcomes=outcome.outcomes,
        verdict=verdict,
    )


def _with(before: RunRecord, tried: Sequence[StageRecord], chosen: int) -> RunRecord:
    entries = [entry.model_copy(update={"chosen": i == chosen}) for i, entry in enumerate(tried)]
    return before.model_copy(update={"stages": (*before.stages, *entries)})


def _tell(emit: Emit, entry: StageRecord) -> None:
    about = {"stage": entry.name, "attempt": entry.attempt}
    emit("outcome", {**about, "reused": entry.reused, "seconds": entry.seconds})
    emit("gate", {**about, "ok": entry.verdict.passed, "reasons": [r.text for r in entry.verdict.refusals]})
