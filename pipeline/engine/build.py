"""A whole build: lock the store, run the line, write record, reports and bundle."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pipeline.core.canonical import canonical
from pipeline.core.errors import BadInput, GateRefused
from pipeline.core.record import RunRecord
from pipeline.engine.assemble import Render, as_made, assemble, point, readable, withdraw
from pipeline.engine.disk import remove, write_atomic, writing
from pipeline.engine.environment import environment
from pipeline.engine.journal import Journal, Listener
from pipeline.engine.launch import Launch
from pipeline.engine.runner import line
from pipeline.engine.step import Plan
from pipeline.engine.store import Damaged, Store

_REPAIRS = 5


@dataclass(frozen=True, slots=True)
class Built:
    """`bundle` is None where a gate refused, and `refused` then says why."""

    record: RunRecord
    folder: Path
    bundle: Path | None
    refused: GateRefused | None


def build(
    plan: Plan,
    runs: Path,
    data_root: Path,
    reports: Mapping[str, Render],
    device: str = "cpu",
    listeners: tuple[Listener, ...] = (),
) -> Built:
    """Run a plan to its end in `runs/<name>-<target>`; a refusal is an answer, everything else is raised.

    `reports` renders files by name; `report.html` goes into the bundle too.
    """
    folder = runs / f"{plan.spec.name}-{plan.spec.target}"
    _prepare(folder)
    journal = Journal(folder / "journal.jsonl", listeners)
    try:
        store = Store(runs / "store", lambda text: journal.emit("warning", {"text": text}))
        names = [step.name for step in plan.steps]
        journal.emit("build", {"name": plan.spec.name, "target": plan.spec.target, "steps": names})
        with store.shared() as alone:
            if alone:
                _sweep(folder)
            write_atomic(folder / "plan.json", canonical(plan.dump()))
            launch = Launch(plan.spec.task, data_root, folder, runs / "store" / "tmp", journal.emit, device)
            built = _repairing(_Build(plan, folder, store, launch, reports, journal))
        if not point(runs / plan.spec.name, folder.name):
            text = f"{runs / plan.spec.name} is taken, so it does not point to this run; rename the run with --name"
            journal.emit("warning", {"text": text})
        journal.emit("done", {"complete": built.record.complete, "refused": built.record.refused})
        return built
    finally:
        journal.close()


@dataclass(frozen=True, slots=True)
class _Build:
    plan: Plan
    folder: Path
    store: Store
    launch: Launch
    reports: Mapping[str, Render]
    journal: Journal

    def once(self, fresh: set[str]) -> Built:
        libraries = {name for step in self.plan.steps for name in step.libraries}
        facts = environment(libraries, self.launch.device)
        saved: list[RunRecord] = []

        def save(record: RunRecord) -> None:
            write_atomic(self.folder / "record.json", readable(record.dump()))
            saved.append(record)

        refused = None
        try:
            record = line(self.plan, self.store, self.launch, save, self.journal.emit, facts, fresh)
        except GateRefused as error:
            refused, record = error, saved[-1]
        return self._finish(record, refused)

    def _finish(self, record: RunRecord, refused: GateRefused | None) -> Built:
        # Of all stages, so that a report made now shows what one made later from the record would; the latest wins.
        files = self.store.open({n: found for stage in record.chosen() for n, found in stage.artifact.files.items()})
        texts = {name: render(record, files) for name, render in self.reports.items()}
        with self.store.lock(f"run-{self.folder.name}", f"run {self.folder.name}"):
            for name, text in texts.items():
                write_atomic(self.folder / name, text.encode())
            if refused is not None:
                withdraw(self.folder)
                return Built(record, self.folder, None, refused)
            made = as_made(record)
            report = self.reports["report.html"](made, files)
            bundle = assemble(self.folder, made, self.plan, self.store, report)
        return Built(record, self.folder, bundle, None)


def _repairing(build_: _Build) -> Built:
    """Start the line again where a stored file turned out damaged; what is sound is found, the rest is made again."""
    fresh: set[str] = set()
    for _ in range(_REPAIRS):
        try:
            return build_.once(fresh)
        except Damaged:
            continue  # the store has said which
    raise BadInput(
        f"{build_.store.root}: stored files keep changing on disk; check the disk, or use another with --runs"
    )


def _prepare(folder: Path) -> None:
    with writing(folder):
        if folder.is_symlink():
            folder.unlink()  # the pointer of a run whose name is ours with our target
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob("failed-*.txt"):
            old.unlink(missing_ok=True)


def _sweep(folder: Path) -> None:
    """Remove what a killed build left; only while no other build is at work."""
    for spare in folder.glob(".tmp-*"):
        remove(spare)
