"""A record and its figures as rows, series and prose; renderers see only this.

Nothing is judged here: verdicts, margins and intervals are the recorded ones.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.core.gate import Reason
from pipeline.core.measurement import Measurement
from pipeline.core.record import RunRecord, StageRecord
from pipeline.core.stage import ORDER
from pipeline.report import prose, words
from pipeline.report.diff import Change, Comparison
from pipeline.report.figures import Confusion, Figures, read_figures
from pipeline.report.rows import (
    AttemptView,
    Bar,
    ChangeRow,
    Demand,
    Number,
    Point,
    Scatter,
    StageView,
    Status,
    Table,
    Tile,
    TwinView,
    View,
)

SERIES = ("clean", "robust", "certified")
_BESIDE = {"latency.p95": ("median", "latency.p50"), "size.model": ("whole bundle", "size.bundle")}
_SPLITS = (".shipped.test", ".test", ".shipped.holdout", ".holdout")


def view(
    record: RunRecord, figures: Mapping[str, Path] | Path | None = None, comparison: Comparison | None = None
) -> View:
    """`figures` maps names such as `figures.json` and `images/0.png` to files, or is a folder of them."""
    found = read_figures(figures)
    stages = tuple(_stage(name, record) for name in ORDER)
    counted = [record_of for name in ORDER if (record_of := _counted(name, record)) is not None]
    latest = {m.name: m for stage in counted for m in stage.measurements}
    owed = tuple(d.text for stage in stages if stage.counted for d in stage.counted.demands if d.owed)
    return View(
        name=record.name,
        target=record.spec.target,
        status="passed" if record.complete else ("refused" if record.refused else "unfinished"),
        headline=prose.headline(record, bool(owed)),
        sentences=prose.summary(record, latest),
        owed=owed,
        tiles=_tiles(latest),
        stages=stages,
        scatters=_scatters(record),
        curve=found.curve,
        eps=prose.radius(record.spec.task),
        confusion=found.confusion,
        confused=_confused(found.confusion),
        twins=_twins(found),
        validity=found.validity,
        verdicts=found.verdicts,
        attacks=_table("Attacks that were run", found.attacks, ("name", "label", "broken")),
        training=found.training,
        tables=tuple(t for t in (_table("Compression", found.compression), _table("Training", found.training)) if t),
        meaning=prose.meaning(record, latest, found.attacks),
        environment=tuple(sorted(record.environment.items())),
        digests=(("spec", record.spec_digest), ("data", record.data_digest)),
        artifacts=tuple((s.name, name, sha) for s in counted for name, sha in sorted(s.artifact.files.items())),
        problems=found.problems,
        changes=None if comparison is None else tuple(_change(change) for change in comparison.changes),
    )


def _counted(name: str, record: RunRecord) -> StageRecord | None:
    """The chosen attempt; where none was, the last one is the evidence."""
    attempts = [stage for stage in record.stages if stage.name == name]
    chosen = [stage for stage in attempts if stage.chosen]
    return (chosen or attempts)[-1] if attempts else None


def _stage(name: str, record: RunRecord) -> StageView:
    counted = _counted(name, record)
    attempts = tuple(_attempt(stage, stage is counted) for stage in record.stages if stage.name == name)
    config = counted.config if counted else record.spec.stages.get(name, {})
    return StageView(
        name=name,
        purpose=prose.PURPOSE[name],
        method=prose.method(config),
        status=next((a.status for a in attempts if a.status != "set aside"), "not reached")
        if counted
        else "not reached",
        attempts=attempts,
        counted=next((a for a in attempts if a.status != "set aside"), None),
    )


def _attempt(stage: StageRecord, counted: bool) -> AttemptView:
    measured = {m.name: m for m in stage.measurements}
    status: Status = "set aside"
    if counted:
        status = "passed" if stage.verdict.passed else "refused"
    return AttemptView(
        number=stage.attempt,
        status=status,
        overrides=words.settings(stage.overrides),
        reused=stage.reused,
        seconds=words.duration(stage.seconds),
        key=stage.key,
        demands=tuple(_demand(r, measured.get(r.metric)) for r in stage.verdict.reasons),
        numbers=tuple(_number(m) for m in stage.measurements),
    )


def _demand(reason: Reason, measured: Measurement | None) -> Demand:
    unit = measured.unit if measured else "fraction"
    margin = "" if reason.margin is None else words.margin(reason.margin, unit)
    bar = None if measured is None else _bar(reason, measured)
    return Demand(reason.metric, reason.ok, reason.demand == "owed", reason.text, margin, bar)


def _bar(reason: Reason, m: Measurement) -> Bar | None:
    """What was held against what, as the gate recorded it; None where nothing was."""
    if reason.bound is None:
        return None
    loss = reason.demand == "max_loss"  # judged between values, so the interval has no say
    low, high = (m.value, m.value) if loss else (m.low, m.high)
    above = reason.demand == "at_least" or (loss and m.better == "higher")
    return Bar(low, m.value, high, reason.bound, m.unit, "above" if above else "below", reason.ok)


def _number(m: Measurement) -> Number:
    samples = "" if m.samples == 1 else f"{m.samples:,}"
    return Number(m.name, words.metric_title(m.name), words.quantity(m.value, m.unit), words.interval(m), samples)


def _tiles(latest: Mapping[str, Measurement]) -> tuple[Tile, ...]:
    tiles = []
    for series in SERIES:
        m = accuracy(series, latest)
        if m is not None:
            split = "hold-out" if m.name.endswith(".holdout") else "test"
            subject = "the shipped file, " if ".shipped." in m.name else ""
            note = f"{words.interval(m)}; {subject}{m.samples:,} {split} images"
            tiles.append(Tile(f"{series.capitalize()} accuracy", words.quantity(m.value, m.unit), note, series))
    for name, title in (("latency.p95", "Latency p95"), ("size.model", "Model file"), ("memory.peak", "Peak memory")):
        if name in latest:
            m = latest[name]
            word, other = _BESIDE.get(name, ("", ""))
            beside = latest.get(other)
            note = f"{word} {words.quantity(beside.value, beside.unit)}" if beside else words.interval(m)
            tiles.append(Tile(title, words.quantity(m.value, m.unit), note, "cost"))
    return tuple(tiles)


def accuracy(series: str, measured: Mapping[str, Measurement]) -> Measurement | None:
    """The strongest statement there is: the shipped file before the network, the test split before the hold-out."""
    names = [f"accuracy.{series}{split}" for split in _SPLITS]
    return next((measured[name] for name in names if name in measured), None)


def _scatters(record: RunRecord) -> tuple[Scatter, ...]:
    """Each attempt that measured an accuracy, against the size it had and the latency it was measured with."""
    by_size: list[Point] = []
    by_latency: list[Point] = []
    size: Measurement | None = None
    for stage in record.stages:
        measured = {m.name: m for m in stage.measurements}
        own = measured.get("size.model") or measured.get("size.weights") or size
        size = own if stage.chosen else size
        latency = measured.get("latency.p95")
        many = sum(other.name == stage.name for other in record.stages) > 1
        label = f"{stage.name} {words.settings(stage.overrides)}".strip() if many else stage.name
        for series in SERIES:
            m = accuracy(series, measured)
            for x, points in ((own, by_size), (latency, by_latency)):
                if m is not None and x is not None:
                    points.append(Point(label, series, x.value, m.value, m.low, m.high, stage.chosen))
    found = (Scatter("size of the model", "bytes", tuple(by_size)), Scatter("latency p95", "ms", tuple(by_latency)))
    return tuple(scatter for scatter in found if scatter.points)


def _confused(confusion: Confusion | None, most: int = 5) -> tuple[str, ...]:
    """The commonest confusions under attack, in words."""
    if confusion is None:
        return ()
    names, n = confusion.classes, len(confusion.classes)
    pairs = [
        (confusion.attacked[i][j], i, j) for i in range(n) for j in range(n) if i != j and confusion.attacked[i][j]
    ]
    pairs.sort(key=lambda pair: (-pair[0], pair[1], pair[2]))
    return tuple(
        f"{names[i]} taken for {names[j]}: {count} under attack, {confusion.clean[i][j]} before"
        for count, i, j in pairs[:most]
    )


def _twins(figures: Figures) -> tuple[TwinView, ...]:
    classes = figures.confusion.classes if figures.confusion else ()

    def named(label: int | str) -> str:
        return classes[label] if isinstance(label, int) and 0 <= label < len(classes) else str(label)

    views = []
    for twins in figures.twins:
        uris = [figures.pictures.get(name) for name in (twins.clean, twins.adversarial, twins.difference)]
        if uris[0] and uris[1] and uris[2]:
            labels = [named(x) for x in (twins.label, twins.clean_prediction, twins.adversarial_prediction)]
            views.append(TwinView(uris[0], uris[1], uris[2], *labels))
    return tuple(views)


def _table(title: str, rows: tuple[dict[str, Any], ...], first: Sequence[str] = ()) -> Table | None:
    """Columns in the order in which they first appear; those named in `first` lead."""
    there = list(dict.fromkeys(key for row in rows for key in row))
    head = (*(key for key in first if key in there), *(key for key in there if key not in first))
    body = tuple(tuple(words.cell(row.get(key)) for key in head) for row in rows)
    return Table(title, tuple(key.replace("_", " ") for key in head), body) if rows else None


def _change(change: Change) -> ChangeRow:
    details = [reason.text for reason in change.reasons if not reason.ok]
    details += [reason.text for reason in change.reasons if reason.ok]
    if change.paired is not None and not any(change.paired.text() in text for text in details):
        details.append(change.paired.text())
    details += [change.note] if change.note else []
    return ChangeRow(
        metric=change.metric,
        stage=change.stage,
        before=words.brief(change.before),
        after=words.brief(change.after),
        word=change.word,
        regressed=change.regressed,
        detail="; ".join(details),
    )
