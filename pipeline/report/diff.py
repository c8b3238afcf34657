"""Two records: what changed, and what regressed.

A regression limit of the spec rules where there is one. Where there is none, an accuracy measured on the same examples
in both records regresses when the exact paired test finds a loss at the 1 % level, corrected for the number of tests.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from pipeline.core.errors import BadInput
from pipeline.core.gate import Limit, Reason, Verdict, judge, show
from pipeline.core.measurement import Measurement
from pipeline.core.paired import mcnemar
from pipeline.core.record import Outcomes, RunRecord, StageRecord
from pipeline.core.spec import Spec
from pipeline.core.stage import MEASURING, ORDER
from pipeline.report.paired import holm

LEVEL = 0.01


@dataclass(frozen=True, slots=True)
class Paired:
    """`lost` were right before and are wrong now; `adjusted` is the p-value of a loss after Holm's correction."""

    lost: int
    won: int
    examples: int
    p: float
    adjusted: float

    def text(self) -> str:
        adjusted = "p < 1e-300" if self.adjusted == 0 else f"p = {self.adjusted:.2g}"
        return f"{self.lost} of {self.examples} examples lost, {self.won} won, {adjusted} (exact McNemar, Holm)"


@dataclass(frozen=True, slots=True)
class Change:
    """One metric of one stage in both records; `before` is missing for a new metric, `after` for a vanished one."""

    stage: str
    metric: str
    before: Measurement | None
    after: Measurement | None
    paired: Paired | None = None
    note: str = ""
    reasons: tuple[Reason, ...] = ()

    @property
    def regressed(self) -> bool:
        return any(not reason.ok for reason in self.reasons)

    @property
    def loss(self) -> float | None:
        """How much worse it became, in its own unit; negative is a gain."""
        if self.before is None or self.after is None:
            return None
        rise = self.after.value - self.before.value
        return -rise if self.after.better == "higher" else rise

    @property
    def word(self) -> str:
        if self.regressed:
            return "regressed"
        if self.before is None:
            return "new"
        loss = self.loss
        if loss is None:
            return "vanished"
        return "same" if loss == 0 else ("worse" if loss > 0 else "better")


@dataclass(frozen=True, slots=True)
class Comparison:
    changes: tuple[Change, ...]

    @property
    def verdict(self) -> Verdict:
        return Verdict(reasons=tuple(reason for change in self.changes for reason in change.reasons))

    @property
    def regressions(self) -> tuple[Change, ...]:
        return tuple(change for change in self.changes if change.regressed)


def compare(before: RunRecord, after: RunRecord) -> Comparison:
    """Hold `after` against `before` by the regression limits of `after`'s spec and by paired tests.

    A paired test is made for the newest measurement of a metric and wherever a limit stands; a metric of an earlier
    stage that a later one measured again is listed only, for it is the later one that ships.
    """
    old, new = _by_stage(before), _by_stage(after)
    changes = []
    for stage in ORDER:
        was, now = old.get(stage), new.get(stage)
        changes += _stage_changes(stage, was, now, after.spec.regression.get(stage, ()))
    return Comparison(_tested(changes, old, new))


def check_baseline(
    baseline: RunRecord,
    spec: Spec,
    data_digest: str,
    where: Path,
    configs: Mapping[str, Mapping[str, Any]] | None = None,
) -> None:
    """Raises `BadInput` where a comparison with `baseline` would mean nothing; made before anything is built.

    Task (data, threat, splits), target and the bytes of the data must be the same, every stage must measure as it did
    (the same attacks on as many images; `configs` are the planned ones by stage), and every `max_loss` limit of the
    spec must find its measurement.
    """
    findings = _differences("task", baseline.spec.task, spec.task)
    if baseline.spec.target != spec.target:
        findings.append(f'target: the baseline has "{baseline.spec.target}", this build "{spec.target}"')
    if not findings and baseline.data_digest != data_digest:
        findings.append(
            f"data files: the baseline was measured on data {baseline.data_digest[:12]}, here lies {data_digest[:12]}"
        )
    stages = _by_stage(baseline)
    for stage, config in (configs or {}).items():
        for key in MEASURING if stage in stages else ():
            findings += _differences(f"{stage}.{key}", stages[stage].config.get(key), config.get(key))
    if findings:
        raise BadInput(
            f"{where}: a foreign baseline; "
            + "; ".join(findings)
            + "; compare with a record of the same task, or make a new baseline with `build`"
        )
    for stage, budget in spec.regression.items():
        known = {m.name for m in stages[stage].measurements} if stage in stages else set()
        missing = [limit.metric for limit in budget if limit.max_loss is not None and limit.metric not in known]
        if missing:
            end = f" (its run was refused at {baseline.refused})" if baseline.refused else ""
            raise BadInput(
                f"{where}: the baseline has no {', '.join(missing)} of stage {stage}{end}, on which regression.{stage} "
                "sets max_loss; make a new baseline with `build`, or drop the limit"
            )


def _by_stage(record: RunRecord) -> dict[str, StageRecord]:
    return {stage.name: stage for stage in record.chosen()}


def _stage_changes(
    stage: str, was: StageRecord | None, now: StageRecord | None, budget: tuple[Limit, ...]
) -> list[Change]:
    old = {m.name: m for m in was.measurements} if was else {}
    new = {m.name: m for m in now.measurements} if now else {}
    verdict = judge(new.values(), budget, old)
    limited = {limit.metric for limit in budget}
    return [
        Change(stage, name, old.get(name), new.get(name), reasons=tuple(r for r in verdict.reasons if r.metric == name))
        for name in sorted(old.keys() | new.keys() | limited)
    ]


def _tested(
    changes: list[Change], old: Mapping[str, StageRecord], new: Mapping[str, StageRecord]
) -> tuple[Change, ...]:
    newest = {change.metric: i for i, change in enumerate(changes) if change.after is not None}
    pairs: dict[int, tuple[Outcomes, Outcomes]] = {}
    for i, change in enumerate(changes):
        was = old[change.stage].outcomes.get(change.metric) if change.stage in old else None
        now = new[change.stage].outcomes.get(change.metric) if change.stage in new else None
        if was is None or now is None or not (newest.get(change.metric) == i or change.reasons):
            continue
        if (was.examples, was.count) != (now.examples, now.count):
            changes[i] = replace(change, note="unpaired: measured on different examples, so not tested")
        else:
            pairs[i] = (was, now)
    counts = {i: _counts(was, now) for i, (was, now) in pairs.items()}
    raw = {i: mcnemar(*count) for i, count in counts.items()}
    for i, adjusted in zip(raw, holm(list(raw.values())), strict=True):
        lost, won = counts[i]
        changes[i] = _judged(changes[i], Paired(lost, won, pairs[i][0].count, raw[i], adjusted), len(raw))
    return tuple(changes)


def _counts(was: Outcomes, now: Outcomes) -> tuple[int, int]:
    """(lost, won) over the pairs."""
    pairs = list(zip(was.hits(), now.hits(), strict=True))
    return sum(a and not b for a, b in pairs), sum(b and not a for a, b in pairs)


def _judged(change: Change, paired: Paired, tests: int) -> Change:
    """A limit rules where there is one; a significant loss is a regression where there is none."""
    if change.reasons or paired.adjusted >= LEVEL or change.before is None or change.after is None:
        return replace(change, paired=paired)
    text = (
        f"{change.metric} {show(change.after.value, change.after.unit)} was "
        f"{show(change.before.value, change.before.unit)}: {paired.text()} over {tests} metrics must be >= {LEVEL:g}"
    )
    return replace(change, paired=paired, reasons=(Reason(metric=change.metric, ok=False, text=text),))


def _differences(where: str, was: object, now: object) -> list[str]:
    if isinstance(was, Mapping) and isinstance(now, Mapping):
        keys = sorted(set(was) | set(now))
        return [line for key in keys for line in _differences(f"{where}.{key}", was.get(key), now.get(key))]
    if _plain(was) == _plain(now):
        return []
    return [f"{where}: the baseline has {_shown(was)}, this build {_shown(now)}"]


def _shown(value: object) -> str:
    return "none" if value is None else (f'"{value}"' if isinstance(value, str) else f"{value}")


def _plain(value: object) -> object:
    """`"8/255"` and 0.03137... are the same radius, written in two ways."""
    if isinstance(value, str):
        try:
            return float(Fraction(value))
        except (ValueError, ZeroDivisionError):
            return value
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
