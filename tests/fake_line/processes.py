"""Builds of fake plans in processes of their own, to be killed, raced or put on a poor disk."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from pipeline.core.record import RunRecord
from pipeline.engine.step import Plan

ROOT = Path(__file__).resolve().parent.parent.parent


def written_plan(plan: Plan, folder: Path) -> Path:
    path = folder / f"{plan.spec.name}.plan.json"
    path.write_text(json.dumps(plan.dump()))
    return path


def start(plan: Path, runs: Path, wrapper: Sequence[str] = ()) -> "subprocess.Popen[str]":
    """`python -m tests.fake_line`, not waited for."""
    command = [*wrapper, sys.executable, "-m", "tests.fake_line", str(plan), str(runs)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: "subprocess.Popen[str]") -> tuple[int, str]:
    """Exit status and what it said on stderr."""
    said = process.communicate(timeout=120)[1]
    return process.returncode, said


def record(runs: Path, name: str = "toy-reference") -> RunRecord:
    return RunRecord.load(json.loads((runs / name / "record.json").read_bytes()))


def digests(runs: Path, name: str = "toy-reference") -> dict[str, dict[str, str]]:
    """Every file of every stage that counts."""
    return {stage.name: stage.artifact.files for stage in record(runs, name).chosen()}


def disk(place: Path, kilobytes: int, read_only: bool = False) -> list[str]:
    """A command prefix that runs in a mount namespace where `place` is a small disk; skips where that is not allowed.

    What was in `place` is copied onto it first.
    """
    if shutil.which("unshare") is None or os.geteuid() != 0:
        pytest.skip("mounting a small disk needs unshare and root")
    script = (
        'cp -a "$1" "$1.was" && mount -t tmpfs -o size="$2"k tmpfs "$1" && cp -a "$1.was/." "$1/" || exit 77; '
        f'{"mount -o remount,ro $1 || exit 77;" if read_only else ""} place=$1; shift 2; "$@"; status=$?; '
        'mkdir -p "$place.after" && cp -a "$place/." "$place.after/"; exit $status'
    )
    prefix = ["unshare", "--mount", "sh", "-c", script, "sh", str(place), str(kilobytes)]
    if subprocess.run([*prefix, "true"], check=False, capture_output=True).returncode == 77:
        pytest.skip("mounting is not allowed here")
    for copy in (f"{place}.was", f"{place}.after"):
        shutil.rmtree(copy, ignore_errors=True)
    return prefix
