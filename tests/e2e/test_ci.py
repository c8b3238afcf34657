"""`ci` on the real line: green against itself, 4 where the baseline was better, 2 where it cannot be compared."""

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from tests.real_line import pipeline

Edit = Callable[[dict[str, Any]], None]


def ci(spec: Path, runs: Path, baseline: Path, *more: str | Path) -> tuple[int, str, str]:
    done = pipeline("ci", spec, "--target", "x86_cpu", "--runs", runs, "--quiet", "--baseline", baseline, *more)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def baseline(runs: Path, tmp_path: Path) -> Path:
    path = tmp_path / "baseline.json"
    path.write_bytes((runs / "small-x86_cpu" / "record.json").read_bytes())
    return path


def edited(path: Path, edit: Edit) -> Path:
    data = json.loads(path.read_bytes())
    edit(data)
    path.write_text(json.dumps(data))
    return path


def better(data: dict[str, Any]) -> None:
    """A past that was perfect on the test split and made a smaller file."""
    for stage in data["stages"]:
        for m in stage["measurements"]:
            if m["name"] in ("accuracy.clean.test", "accuracy.robust.pgd.test"):
                m["value"] = m["high"] = 1.0
                bits = stage["outcomes"][m["name"]]
                bits["bits"] = base64.b64encode(bytes([255]) * ((bits["count"] + 7) // 8)).decode()
            if m["name"] == "size.model":
                m["value"] = m["low"] = m["high"] = m["value"] - 1000


def failures(path: Path) -> list[str]:
    return [failure.get("message", "") for failure in ET.parse(path).iter("failure")]


def test_a_build_is_green_against_its_own_record(runs: Path, spec: Path, baseline: Path, tmp_path: Path) -> None:
    junit, text = tmp_path / "junit.xml", tmp_path / "report.md"
    status, out, err = ci(spec, runs, baseline, "--junit", junit, "--markdown", text)
    assert status == 0, err
    assert "REGRESSED" not in out
    assert failures(junit) == []
    assert len(list(ET.parse(junit).iter("testcase"))) > 5
    assert "Nothing regressed." in text.read_text()


def test_a_baseline_that_was_better_exits_4_and_names_every_metric(
    runs: Path, spec: Path, baseline: Path, tmp_path: Path
) -> None:
    junit = tmp_path / "junit.xml"
    status, out, err = ci(spec, runs, edited(baseline, better), "--junit", junit)
    assert status == 4, err
    named = ("accuracy.clean.test", "size.model", "accuracy.robust.pgd.test")
    told = err.strip().rpartition(": ")[2].split(", ")
    assert set(named) == set(told)
    assert {message.partition(":")[0] for message in failures(junit)} == {f"regression of {name}" for name in named}
    assert "a loss of 1,000 bytes must be <= 100 bytes" in " ".join(failures(junit))
    assert "examples lost, 0 won" in out  # the paired test, for the metric that no limit names


def foreign(data: dict[str, Any]) -> None:
    data["spec"]["task"]["threat"]["eps"] = 0.2


def other_data(data: dict[str, Any]) -> None:
    data["data_digest"] = "0" * 64


def newer(data: dict[str, Any]) -> None:
    data["schema_version"] = 99


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (None, "expected a baseline here, there is none"),
        (foreign, "task.threat.eps: the baseline has 0.2, this build 0.1"),
        (other_data, "the baseline was measured on data 000000000000"),
        (newer, "has schema version 99"),
    ],
)
def test_a_missing_or_foreign_baseline_exits_2_before_anything_is_built(
    edit: Edit | None, message: str, runs: Path, spec: Path, baseline: Path, tmp_path: Path
) -> None:
    junit = tmp_path / "junit.xml"
    path = tmp_path / "none.json" if edit is None else edited(baseline, edit)
    status, out, err = ci(spec, runs, path, "--junit", junit)
    assert status == 2
    assert message in err
    assert out == ""  # no summary: no line was run
    assert not junit.exists()
