"""Closed, full and abandoned streams around the real command line: no fault of ours, and no refusal that gets lost."""

import os
import subprocess
import sys
from pathlib import Path

from tests.real_line import ROOT


def shell(line: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    ready = line.replace("temper", f"'{sys.executable}' -m pipeline")
    return subprocess.run(
        ["sh", "-c", ready], cwd=ROOT, env={**os.environ, **(env or {})}, capture_output=True, text=True, check=False
    )


def test_poor_streams_are_no_fault_of_ours(runs: Path) -> None:
    ascii_only = {"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    listed = shell("temper list builders", ascii_only)
    assert (listed.returncode, listed.stderr) == (0, "")
    assert listed.stdout.isascii()
    full = shell("temper list > /dev/full")
    assert full.returncode == 2
    assert full.stderr == (
        "temper: cannot write the output: No space left on device; make room, then run the same command again\n"
    )
    left = shell(f"temper report '{runs / 'small-x86_cpu'}' | head -c 9")
    assert (left.stdout, left.stderr) == ("<!doctype", "")
    for closed in (">&-", "2>&-"):
        done = shell(f"temper verify '{runs / 'small-x86_cpu'}' {closed}")
        assert (done.returncode, done.stderr) == (0, "")


def test_a_reader_that_leaves_does_not_turn_a_refusal_into_success(runs: Path, spec: Path) -> None:
    refused = "--set 'budget.search=[{ metric = \"cost.params\", at_most = 1 }]'"
    line = f"temper build '{spec}' --target x86_cpu --name impossible --quiet --runs '{runs}' {refused}"
    done = shell(f"{{ {line}; echo $? >&2; }} | true")
    assert done.stderr.splitlines()[-1] == "1"
    assert "Traceback" not in done.stderr
