"""The closing summary of a build: one screen, from the record alone."""

import os
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path

from pipeline.cli.ui import duration
from pipeline.core.gate import Limit, bounds, show
from pipeline.core.measurement import Measurement
from pipeline.core.record import RunRecord, StageRecord
from pipeline.engine.build import Built

_NUMBERS = 3
_STUCK = "\N{NO-BREAK SPACE}"
_SIZE_AND_SPEED = ("size.model", "size.bundle", "latency.p50", "latency.p95", "memory.peak")


def summary(built: Built, width: int = 100) -> str:
    """Per attempt: time or reused, the numbers that its gate read, the verdict; then what shipped and where it lies."""
    record = built.record
    verdict = f"refused at {record.refused}" if record.refused else "passed"
    lines = [f"{record.name} for {record.spec.target}: {verdict}"]
    for stage in record.stages:
        lines += _stage(stage, record.spec.budget.get(stage.name, ()), width)
    latest = record.latest()
    if shipped := [latest[name] for name in _SIZE_AND_SPEED if name in latest]:
        lines += _wrapped(f"  {'size, speed':<12}", _listed(shipped), width)
    if robust := latest.get("accuracy.robust.test"):
        kind = "the standard ensemble" if robust.under == "standard" else "quick ones"
        lines.append(f"  {'attacks':<12}{kind}; a stronger attack can only lower robust accuracy")
    lines += [f"  {'owed':<12}{text}" for text in owed(record)]
    if built.bundle is not None:
        lines.append(f"  {'bundle':<12}{short(built.bundle)}")
    lines.append(f"  {'report':<12}{short(built.folder / 'report.html')}")
    return "\n".join(lines)


def owed(record: RunRecord) -> list[str]:
    """Limits that only the device can settle."""
    return [
        f"{limit.metric} {bounds(limit)} (`finish` on the device)"
        for limits in record.spec.budget.values()
        for limit in limits
        if limit.on_device
    ]


def number(found: Measurement) -> str:
    """`robust.holdout 0.672 [0.61, 0.73]`: the interval where there is one."""
    name = found.name.removeprefix("accuracy.")
    if found.low == found.high:
        return f"{name} {show(found.value, found.unit)}"
    return f"{name} {show(found.value, found.unit)} [{found.low:.3g}, {found.high:.3g}]"


def short(path: Path) -> str:
    """As the user would type it: relative where the path lies below the current folder."""
    here = Path.cwd()
    return os.fspath(path.relative_to(here) if path.is_relative_to(here) else path)


def _wrapped(head: str, pieces: Sequence[str], width: int) -> list[str]:
    """The pieces behind `head`, broken between them and never within one."""
    text = " ".join(piece.replace(" ", _STUCK) for piece in pieces)
    lines = textwrap.wrap(
        text,
        width,
        initial_indent=head,
        subsequent_indent=" " * len(head),
        break_long_words=False,
        break_on_hyphens=False,
    )
    return [line.replace(_STUCK, " ") for line in lines or [head]]


def _listed(measured: Iterable[Measurement]) -> list[str]:
    *rest, last = [number(m) for m in measured] or [""]
    return [*(f"{text}," for text in rest), last]


def _stage(stage: StageRecord, budget: Iterable[Limit], width: int) -> list[str]:
    spent = "reused" if stage.reused else duration(stage.seconds)
    limited = {limit.metric for limit in budget}
    ranked = sorted(stage.measurements, key=lambda m: (m.name not in limited, m.name in _SIZE_AND_SPEED))
    tried = [f"{key} = {value}," for key, value in stage.overrides.items()]
    tried[-1:] = [text.removesuffix(",") + ":" for text in tried[-1:]]
    mark = "ok" if stage.verdict.passed else ("REFUSED" if stage.chosen else "refused")
    head = f"  {stage.name:<10}{spent:>12}  {mark:<8}"
    lines = _wrapped(head, [*tried, *_listed(ranked[:_NUMBERS])], width)
    for reason in stage.verdict.refusals:
        lines += textwrap.wrap(reason.text, width, initial_indent=" " * 14 + "- ", subsequent_indent=" " * 16)
    return lines
