import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from pipeline.cli.build import _interruptible
from pipeline.cli.summary import summary
from pipeline.core.measurement import fraction
from pipeline.core.stage import ORDER
from pipeline.engine.build import Built, build
from pipeline.engine.step import Plan
from tests.fake_line.plans import at_least, at_most, plan, step
from tests.fake_line.processes import ROOT, written_plan


def command(plan_: Plan, folder: Path, *more: str) -> list[str]:
    line = ["build", "--runs", str(folder / "runs"), *more]
    return [sys.executable, "-m", "tests.fake_line.cli", str(written_plan(plan_, folder)), *line]


def temper(plan_: Plan, folder: Path, *more: str) -> "subprocess.CompletedProcess[str]":
    done = command(plan_, folder, *more)
    return subprocess.run(done, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


def test_a_build_that_passes_is_exit_0_with_progress_on_stderr_and_the_summary_on_stdout(tmp_path: Path) -> None:
    done = temper(plan(), tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("toy for reference: passed\n")
    assert [line for line in done.stderr.splitlines() if " done in " in line]
    assert "toy-reference/bundle" in done.stdout
    report = tmp_path / "runs" / "toy" / "report.html"
    assert "<html" in report.read_text()
    assert (report.parent / "report.md").read_text()


def test_a_rebuild_says_reused_and_is_quiet_when_asked(tmp_path: Path) -> None:
    temper(plan(), tmp_path)
    done = temper(plan(), tmp_path, "--quiet")
    assert done.returncode == 0
    assert len(re.findall(r"^  \w+ +reused  ok ", done.stdout, re.MULTILINE)) == len(ORDER)
    assert done.stderr == ""


def test_a_refusal_is_exit_1_and_says_why(tmp_path: Path) -> None:
    done = temper(plan(step("train", budget=(at_least("accuracy.robust.holdout", 0.99),))), tmp_path, "--quiet")
    assert done.returncode == 1
    assert "toy for reference: refused at train" in done.stdout
    assert done.stderr.startswith("temper: train was refused by its gate: accuracy.robust.holdout")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("fault", "status", "text"),
    [
        ("input", 2, "temper: train: expected 10 classes, got 3; count them"),
        ("disk", 2, "temper: train: cannot write somewhere: No space left on device"),
        ("raise", 3, "temper: train failed: RuntimeError: the second digit; details in "),
    ],
)
def test_faults_are_one_line_and_never_a_traceback(tmp_path: Path, fault: str, status: int, text: str) -> None:
    done = temper(plan(step("train", {"fault": fault})), tmp_path, "--quiet")
    assert done.returncode == status
    assert done.stderr.startswith(text)
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_being_told_to_stop_is_one_line_and_the_next_run_carries_on(tmp_path: Path, number: int) -> None:
    slow = plan(step("compress", {"pause": 0.1, "steps": 40}))
    process = subprocess.Popen(
        command(slow, tmp_path, "--quiet"), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while (
        not list(tmp_path.glob("runs/store/scratch/*/chain.json"))
        or len(list(tmp_path.glob("runs/store/outcomes/*"))) < 2
    ):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(number)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert said.startswith("temper: interrupted; the same command carries on")
    assert said.count("\n") == 1
    again = temper(slow, tmp_path)
    assert again.returncode == 0
    assert "compress: resumed at" in again.stderr or "compress: done" in again.stderr


def swallowed(number: int, fault: Exception | None) -> None:
    with _interruptible() as heed:
        heed({"kind": "stage"})  # nothing was said yet
        with suppress(BaseException):
            signal.raise_signal(number)
        if fault is not None:
            raise fault
        heed({"kind": "stage"})


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("fault", [None, RecursionError("in what was half imported")])
def test_being_told_to_stop_is_heeded_also_where_a_library_swallowed_it(number: int, fault: Exception | None) -> None:
    with pytest.raises(KeyboardInterrupt):
        swallowed(number, fault)


@pytest.mark.parametrize("words", [("--threads", "0"), ("--threads", "x"), ("--device", "tpu"), ("--unknown",)])
def test_a_wrong_option_is_exit_2(tmp_path: Path, words: tuple[str, ...]) -> None:
    done = temper(plan(), tmp_path, *words)
    assert done.returncode == 2
    assert words[0] in done.stderr
    assert not (tmp_path / "runs").exists()


def test_runs_in_a_file_is_exit_2(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("")
    done = temper(plan(), tmp_path)
    assert done.returncode == 2
    assert "cannot write" in done.stderr


def test_a_newer_store_is_exit_2_and_untouched(tmp_path: Path) -> None:
    marker = tmp_path / "runs" / "store" / "store.json"
    marker.parent.mkdir(parents=True)
    marker.write_text('{"schema_version": 2}')
    done = temper(plan(), tmp_path)
    assert done.returncode == 2
    assert "a newer Temper wrote this store" in done.stderr
    assert [path.name for path in (tmp_path / "runs").rglob("*") if path.is_file()] == ["store.json"]


def test_threads_are_set_before_anything_reads_them_and_recorded(tmp_path: Path) -> None:
    done = subprocess.run(
        command(plan(), tmp_path, "--threads", "3"),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0
    assert '"threads": "3"' in (tmp_path / "runs" / "toy" / "record.json").read_text()


def shown(plan_: Plan, runs: Path, width: int = 100) -> tuple[Built, str]:
    done = build(plan_, runs, runs, {"report.html": lambda record, _: record.name})
    return done, summary(done, width)


def test_the_summary_fits_a_screen_and_shows_limited_numbers_with_their_intervals(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    repair = step(
        "compress",
        attempts=[{"ratio": 0.75}, {"ratio": 0.25}],
        budget=(at_least("accuracy.robust.holdout", 0.65),),
    )
    owed = step("export", budget=(at_most("latency.p95", 3.0), at_most("memory.peak", 9e6, on_device=True)))
    _, text = shown(plan(repair, owed), tmp_path)
    lines = text.splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 100
    wanted = fraction("accuracy.robust.holdout", 80, 100)
    assert f"robust.holdout 0.8 [{wanted.low:.3g}, {wanted.high:.3g}]" in text
    assert "ratio = 0.75" in text
    assert re.search(r"compress .* refused +ratio = 0.75", text)
    assert re.search(r"compress .* ok +ratio = 0.25", text)
    assert "must be >= 0.65" in text
    assert re.search(r"size, speed +size.model .* bytes, latency.p95 2 ms \[1.5, 2.5\]", text)
    assert re.search(r"owed +memory.peak <= 9,000,000 bytes \(`finish` on the device\)", text)
    assert re.search(r"bundle +.*toy-reference/bundle", text)
    assert re.search(r"report +.*toy-reference/report.html", text)


def test_the_summary_of_a_refusal_names_no_bundle(tmp_path: Path) -> None:
    done, text = shown(plan(step("search", budget=(at_most("cost.params", 10),))), tmp_path)
    assert done.bundle is None
    assert "bundle" not in text
    assert "refused at search" in text
    assert "cost.params 800 must be <= 10" in text


def test_paths_below_the_current_folder_are_relative(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "  runs/toy-reference/bundle" in shown(plan(), tmp_path / "runs")[1]


def test_an_interrupt_that_a_library_turned_into_its_own_error_is_still_one(tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.mkdir()
    (own / "swallows.py").write_text(
        "import os, signal\n"
        "def run(args):\n"
        "    try:\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "    except KeyboardInterrupt:\n"
        "        raise RuntimeError('half imported') from None\n"
    )
    (own / "options.py").write_text("def swallows_options(parser): pass\n")
    code = (
        "import sys, pipeline.cli as c; c.COMMANDS['swallows'] = ('own.swallows', ''); sys.exit(c.main(['swallows']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (130, ""), done.stderr
    assert done.stderr == "temper: interrupted; the same command carries on where this one stopped\n"
