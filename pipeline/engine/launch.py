"""Run a step here (`procs = 1`) or under torchrun; turn time-outs and whatever a stage raises into errors."""

import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from pipeline.core.canonical import canonical
from pipeline.core.errors import BadInput
from pipeline.core.stage import Emit, Files, Result
from pipeline.engine.disk import remove, write_atomic, writing
from pipeline.engine.failure import Failure, failure_of
from pipeline.engine.step import Attempt, Step
from pipeline.engine.worker import LAUNCHER, Returned, Task

_POLL_SECONDS = 0.1
_GRACE_SECONDS = 10.0


class _OutOfTime(BaseException):
    """Not an `Exception`, so that no stage swallows it."""


@dataclass(frozen=True, slots=True)
class Launch:
    """`folder` is the run's: a failure's traceback goes there as failed-<stage>.txt. `spare` is for passing files."""

    task: Mapping[str, Any]
    data_root: Path
    folder: Path
    spare: Path
    emit: Emit
    device: str = "cpu"

    def __call__(self, step: Step, attempt: Attempt, files: Files, scratch: Path) -> Result:
        """Raises `BadInput` for what the user gave and for the disk, `StageFailed` for everything else."""
        task = Task(
            stage=step.name,
            module=step.module,
            config=attempt.config,
            task=dict(self.task),
            data_root=str(self.data_root),
            seed=step.seed,
            scratch=str(scratch),
            device=self.device,
            files={name: str(path) for name, path in files.items()},
        )

        def emit(kind: str, fields: Mapping[str, object]) -> None:
            self.emit(kind, {**fields, "stage": step.name})

        try:
            # A time limit interrupts the main thread by a signal; elsewhere the stage gets a process of its own.
            if step.procs == 1 and (step.timeout_seconds is None or _in_main_thread()):
                with _deadline(step.timeout_seconds):
                    return task.run(emit)
            return self._apart(task, step, emit)
        except _OutOfTime:
            late = f"no result within {step.timeout_seconds:g} s (timeout_seconds); finished work in scratch is kept"
            self._fail(step, Failure(blame="stage", text=late, details=late))
        except _Died as death:
            self._fail(step, death.failure)
        except (Exception, SystemExit) as error:
            self._fail(step, failure_of(error))
        finally:
            gc.collect()  # networks hold cycles; the next stage wants the memory

    def _fail(self, step: Step, failure: Failure) -> NoReturn:
        path = self.folder / f"failed-{step.name}.txt"
        # The disk may be what failed; the first message is the one that counts.
        with suppress(BadInput):
            self.emit("failed", {"stage": step.name, "text": failure.text})
            write_atomic(path, failure.details.encode(errors="replace"))
        raise failure.error(step.name, str(_short(path))) from None

    def _apart(self, task: Task, step: Step, emit: Emit) -> Result:
        with writing(self.spare):
            self.spare.mkdir(parents=True, exist_ok=True)
            folder = Path(tempfile.mkdtemp(prefix=f"{step.name}-", dir=self.spare))
        try:
            write_atomic(folder / "task.json", canonical(task.dump()))
            with (folder / "log.txt").open("wb") as log:
                status = _supervise(_command(step.procs, folder), log.fileno(), folder, step.timeout_seconds, emit)
            if status == 0 and (folder / "result.json").exists():
                return Returned.load(json.loads((folder / "result.json").read_bytes())).result()
            raise _Died(_first_failure(folder, status))
        finally:
            remove(folder)


class _Died(Exception):
    def __init__(self, failure: Failure) -> None:
        self.failure = failure
        super().__init__(failure.text)


def _command(procs: int, folder: Path) -> list[str]:
    return [sys.executable, "-m", "pipeline.engine.worker", str(folder), *([str(procs)] if procs > 1 else [])]


def _supervise(command: list[str], log: int, folder: Path, limit: float | None, emit: Emit) -> int:
    """Wait for the ranks, pass their events on, and leave none behind, however this ends."""
    end = None if limit is None else time.monotonic() + limit
    heard = 0
    # A session of its own: Ctrl-C reaches us alone, and we stop the ranks in order.
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, env=_importable()
    )
    try:
        while process.poll() is None:
            heard = _forward(folder / "events.jsonl", heard, emit)
            if end is not None and time.monotonic() > end:
                raise _OutOfTime
            time.sleep(_POLL_SECONDS)
        _forward(folder / "events.jsonl", heard, emit)
        return process.returncode
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(_GRACE_SECONDS)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _forward(path: Path, position: int, emit: Emit) -> int:
    """Emit whole lines written since `position`; the new position."""
    if not path.exists():
        return position
    with path.open("rb") as file:
        file.seek(position)
        whole = file.read().rpartition(b"\n")[0]
    for line in whole.splitlines():
        kind, fields = json.loads(line)
        emit(kind, fields)
    return position + len(whole) + 1 if whole else position


def _first_failure(folder: Path, status: int) -> Failure:
    """The failure written first: the others are ranks that lost their peer."""
    log = (folder / "log.txt").read_text(errors="replace")
    reports = sorted(folder.glob("failure-*.json"), key=lambda path: path.stat().st_mtime_ns)
    if reports:
        first = Failure.load(json.loads(reports[0].read_bytes()))
        return first.model_copy(update={"details": f"{first.details}\n{log}"})
    name = f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
    hint = " (out of memory?)" if status == -signal.SIGKILL else ""
    return Failure(blame="stage", text=f"its process ended with {name}{hint} and no result", details=log)


def _importable() -> dict[str, str]:
    """Our environment, with what we can import importable there too, and who started it."""
    path = os.pathsep.join(path or str(Path.cwd()) for path in sys.path)
    return {**os.environ, "PYTHONPATH": path, LAUNCHER: str(os.getpid())}


@contextmanager
def _deadline(seconds: float | None) -> Iterator[None]:
    if seconds is None:
        yield
        return

    def ring(*_: object) -> None:
        raise _OutOfTime

    before = signal.signal(signal.SIGALRM, ring)
    # Again every few seconds: an exception that surfaces inside a finaliser or a C callback is lost.
    signal.setitimer(signal.ITIMER_REAL, seconds, _GRACE_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _short(path: Path) -> Path:
    """Relative to where the user stands, if it lies below."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
