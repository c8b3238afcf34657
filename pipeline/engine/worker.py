"""One rank of one step: read task.json, run the stage, rank 0 writes result.json. Started by `launch`, never by hand.

    python -m pipeline.engine.worker FOLDER          alone, or as a rank that torchrun started
    python -m pipeline.engine.worker FOLDER PROCS    torchrun with so many ranks on this machine

Every rank runs the same `run` on the same inputs; stages sum their counts among themselves. What a rank raises it
leaves as failure-<rank>.json. The results cross as JSON, so nothing is pickled.
"""

import ctypes
import importlib
import json
import os
import runpy
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from pipeline.core.canonical import canonical
from pipeline.core.errors import StageFailed
from pipeline.core.measurement import Measurement
from pipeline.core.record import Outcomes
from pipeline.core.stage import Context, Emit, Files, Result
from pipeline.core.value import Value
from pipeline.engine.disk import write_atomic
from pipeline.engine.failure import failure_of

LAUNCHER = "TEMPER_LAUNCHER"  # in the environment of a worker: the process that started it
_PARENT_DEATH = 1  # prctl(PR_SET_PDEATHSIG), from linux/prctl.h


class Task(Value):
    """All that a run of a stage depends on."""

    stage: str
    module: str
    config: dict[str, Any]
    task: dict[str, Any]
    data_root: str
    seed: int
    scratch: str
    device: str
    files: dict[str, str]

    def run(self, emit: Emit, rank: int = 0, world: int = 1) -> Result:
        """Import the stage, have it parse its config, run it, and check that it gave what a stage must give."""
        module = importlib.import_module(self.module)
        context = Context(
            task=self.task,
            data_root=Path(self.data_root),
            seed=self.seed,
            scratch=Path(self.scratch),
            emit=emit,
            device=self.device,
            rank=rank,
            world=world,
        )
        files: Files = {name: Path(path) for name, path in self.files.items()}
        return _checked(module.run(files, module.Config.model_validate(self.config), context), rank)


class Returned(Value):
    """A `Result`, as JSON."""

    files: dict[str, str]
    measurements: tuple[Measurement, ...]
    outcomes: dict[str, Outcomes]
    findings: tuple[str, ...]

    @staticmethod
    def of(result: Result) -> "Returned":
        return Returned(
            files={name: str(path) for name, path in result.files.items()},
            measurements=result.measurements,
            outcomes=dict(result.outcomes),
            findings=result.findings,
        )

    def result(self) -> Result:
        files = {name: Path(path) for name, path in self.files.items()}
        return Result(files, self.measurements, self.outcomes, self.findings)


def _checked(result: object, rank: int) -> Result:
    if not isinstance(result, Result):
        raise StageFailed(f"expected a Result from run, got {type(result).__name__}")
    names = [m.name for m in result.measurements]
    if len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise StageFailed(f"expected each metric once, got twice: {', '.join(twice)}")
    for name, path in result.files.items():
        if Path(name).is_absolute() or ".." in Path(name).parts or not Path(name).parts:
            raise StageFailed(f'expected relative file names, got "{name}"')
        if rank == 0 and not path.is_file():
            raise StageFailed(f'returned "{name}", but there is no such file')
    return result


def main(folder: Path, environ: Mapping[str, str]) -> int:
    """Exit status 0 with result.json written by rank 0, or 1 with a failure file."""
    rank, world = int(environ.get("RANK", "0")), int(environ.get("WORLD_SIZE", "1"))
    try:
        task = Task.load(json.loads((folder / "task.json").read_bytes()))
        result = task.run(_emitter(folder) if rank == 0 else _silent, rank, world)
        if rank == 0:
            write_atomic(folder / "result.json", canonical(Returned.of(result).dump()))
    except (Exception, SystemExit) as error:
        write_atomic(folder / f"failure-{rank}.json", canonical(failure_of(error).dump()))
        return 1
    return 0


def torchrun(folder: str, procs: str) -> NoReturn:
    """Become torchrun; it exits with 1 where a rank failed."""
    os.environ[LAUNCHER] = str(os.getpid())
    sys.argv = ["torchrun", "--standalone", f"--nproc-per-node={procs}", "-m", "pipeline.engine.worker", folder]
    runpy.run_module("torch.distributed.run", run_name="__main__")
    sys.exit(0)


def _emitter(folder: Path) -> Emit:
    file = (folder / "events.jsonl").open("ab", buffering=0)

    def emit(kind: str, fields: Mapping[str, object]) -> None:
        file.write(json.dumps([kind, dict(fields)], default=str, skipkeys=True).encode() + b"\n")

    return emit


def _silent(kind: str, fields: Mapping[str, object]) -> None:
    del kind, fields


def _die_with_parent() -> None:
    """Linux: be killed when the launcher is, so that an orphan never writes into a scratch that another run owns."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PARENT_DEATH, signal.SIGKILL)
        # A launcher that died before this line sends no signal any more.
        if os.environ.get(LAUNCHER, str(os.getppid())) != str(os.getppid()):
            sys.exit(1)


if __name__ == "__main__":
    _die_with_parent()
    if len(sys.argv) > 2:
        torchrun(*sys.argv[1:])
    sys.exit(main(Path(sys.argv[1]), os.environ))
