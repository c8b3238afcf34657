import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.canonical import file_digest
from pipeline.core.errors import BadInput, StageFailed
from pipeline.core.stage import Result
from pipeline.engine.failure import failure_of
from pipeline.engine.launch import Launch
from tests.fake_line.plans import step
from tests.fake_line.processes import ROOT


class Rig:
    def __init__(self, root: Path) -> None:
        self.root = root
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.launch = Launch({"data": "none"}, root, root / "run", root / "spare", self.emit)
        (root / "scratch").mkdir()

    def emit(self, kind: str, fields: Mapping[str, object]) -> None:
        self.events.append((kind, dict(fields)))

    def __call__(self, overrides: Mapping[str, Any], **more: Any) -> Result:
        made = step("search", overrides, **more)
        return self.launch(made, made.attempts[0], {}, self.root / "scratch")


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    return Rig(tmp_path)


def contents(result: Result) -> dict[str, str]:
    return {name: file_digest(path) for name, path in result.files.items()}


def test_a_step_runs_here_and_its_events_carry_its_name(rig: Rig) -> None:
    result = rig({"width": 4})
    assert [m.value for m in result.measurements] == [400.0]
    assert {fields["stage"] for _, fields in rig.events} == {"search"}
    assert [fields["done"] for kind, fields in rig.events if kind == "progress"] == [1, 2, 3]


@pytest.mark.parametrize(
    ("fault", "error", "text"),
    [
        ("raise", StageFailed, "search failed: RuntimeError: the second digit; details in "),
        ("exit", StageFailed, "search failed: SystemExit: 7; details in "),
        ("input", BadInput, "search: expected 10 classes, got 3; count them"),
        ("disk", BadInput, "search: cannot write somewhere: No space left on device; free some space"),
        ("missing", BadInput, 'search: needs "flux", which is not installed; `pip install'),
    ],
)
@pytest.mark.parametrize("apart", [False, True])
def test_faults_become_errors_with_one_line(
    rig: Rig, fault: str, error: type[Exception], text: str, apart: bool
) -> None:
    with pytest.raises(error) as caught:
        in_a_thread(rig, {"fault": fault}) if apart else rig({"fault": fault})
    assert str(caught.value).startswith(text)
    assert "\n" not in str(caught.value)
    details = (rig.root / "run" / "failed-search.txt").read_text()
    assert "break_down" in details
    assert rig.events[-1][0] == "failed"
    assert not list((rig.root).glob("spare/*"))


def in_a_thread(rig: Rig, overrides: Mapping[str, Any], limit: float = 60.0) -> Result:
    """With a time limit and off the main thread, where a stage gets a process of its own."""
    found: list[Any] = []

    def go() -> None:
        try:
            found.append(rig(overrides, timeout_seconds=limit))
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=go)
    thread.start()
    thread.join()
    if isinstance(found[0], Exception):
        raise found[0]
    assert isinstance(found[0], Result)
    return found[0]


def test_a_process_of_its_own_gives_the_same_files_numbers_and_events(tmp_path: Path) -> None:
    rigs = []
    for name in ("here", "apart"):
        (tmp_path / name).mkdir()
        rigs.append(Rig(tmp_path / name))
    here, apart = rigs[0]({"pause": 0.05}), in_a_thread(rigs[1], {"pause": 0.05})
    assert contents(here) == contents(apart)
    assert here.measurements == apart.measurements
    assert rigs[0].events == rigs[1].events


def test_a_process_that_is_killed_is_a_failed_stage_and_not_a_dead_engine(rig: Rig) -> None:
    with pytest.raises(StageFailed, match=r"search failed: its process ended with signal SIGKILL \(out of memory\?\)"):
        in_a_thread(rig, {"fault": "kill"})


@pytest.mark.parametrize("apart", [False, True])
def test_a_time_limit_ends_a_step_and_the_next_run_goes_on_from_its_scratch(rig: Rig, apart: bool) -> None:
    endless = {"pause": 0.1, "steps": 1000}
    with pytest.raises(StageFailed, match=r"search failed: no result within . s \(timeout_seconds\)"):
        in_a_thread(rig, endless, 3.0) if apart else rig(endless, timeout_seconds=1.0)
    done = json.loads((rig.root / "scratch" / "chain.json").read_text())[0]
    assert 0 < done < 1000
    rig({"steps": done + 1})
    assert ("note", {"text": f"resumed at {done}", "stage": "search"}) in rig.events


def test_a_stage_that_gives_no_result_is_told_so(rig: Rig) -> None:
    made = step("train", {"fault": "no result"})
    (rig.root / "arch.json").write_text('{"name": "x"}')
    with pytest.raises(StageFailed, match="train failed: expected a Result from run, got NoneType"):
        rig.launch(made, made.attempts[0], {"arch.json": rig.root / "arch.json"}, rig.root / "scratch")


def test_an_error_that_wraps_a_full_disk_is_the_users_to_mend() -> None:
    class LibraryError(Exception):
        pass

    wrapped = LibraryError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert failure_of(wrapped).blame == "input"
    outer = RuntimeError("could not save")
    outer.__cause__ = OSError(30, os.strerror(30), "/x")
    assert failure_of(outer).blame == "input"
    assert failure_of(RuntimeError("space")).blame == "stage"


def test_two_ranks_under_torchrun_give_what_one_gives(tmp_path: Path) -> None:
    rigs = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        rigs.append(Rig(tmp_path / name))
    one, two = rigs[0]({"width": 3}), rigs[1]({"width": 3}, procs=2)
    assert contents(one) == contents(two)
    assert one.measurements == two.measurements


def test_a_fault_in_a_rank_under_torchrun_names_the_fault(rig: Rig) -> None:
    with pytest.raises(StageFailed, match="search failed: RuntimeError: the second digit"):
        rig({"fault": "raise"}, procs=2)


ORPHAN = """
import sys
from pathlib import Path
from tests.fake_line.plans import step
from pipeline.engine.launch import Launch
root = Path(sys.argv[1])
made = step("search", {"pause": 0.05, "steps": 10_000}, procs=2)
def emit(kind, fields):
    print(kind, flush=True)
Launch({}, root, root, root / "spare", emit)(made, made.attempts[0], {}, root)
"""


def test_no_rank_outlives_a_launcher_that_was_killed(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", ORPHAN, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as launcher:
        assert launcher.stdout is not None
        assert launcher.stdout.readline() == b"progress\n"
        launcher.kill()
    deadline = 1200
    while ranks(tmp_path) and deadline:
        deadline -= 1
        threading.Event().wait(0.05)
    assert ranks(tmp_path) == []


def ranks(root: Path) -> list[str]:
    """Processes whose command line names the task's folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        if any(word.startswith(str(root / "spare")) for word in words):
            found.append(path.parent.name)
    return found


def test_a_worker_whose_launcher_is_gone_already_does_nothing(tmp_path: Path) -> None:
    environ = {**os.environ, "TEMPER_LAUNCHER": str(os.getpid() + 1)}
    command = [sys.executable, "-m", "pipeline.engine.worker", str(tmp_path)]
    done = subprocess.run(command, check=False, cwd=ROOT, env=environ, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "")
    assert list(tmp_path.iterdir()) == []
