"""`ci` on a line of fake stages with the real engine: every exit status, and what is written on the way."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from pipeline.cli import main
from pipeline.core.gate import Budget, Limit
from pipeline.engine.step import Plan
from tests.fake_line.plans import at_least, plan, step

ROBUST = "accuracy.robust.test"
LIMIT: dict[str, Budget] = {"validate": (Limit(metric=ROBUST, max_loss=0.02),)}
Line = Callable[..., None]


def made(regression: Mapping[str, Budget], hits: int = 80, **more: Any) -> Plan:
    line = plan(step("validate", {"hits": hits}, **more))
    return line.model_copy(update={"spec": line.spec.model_copy(update={"regression": dict(regression)})})


@pytest.fixture
def line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Line:
    """Sets what the planner will answer; the rest of the command and of the engine is real."""
    monkeypatch.chdir(tmp_path)

    def planned(regression: Mapping[str, Budget] = LIMIT, hits: int = 80, **more: Any) -> None:
        answer = made(regression, hits, **more)
        monkeypatch.setattr("pipeline.cli.build.plan", lambda *_: answer)

    return planned


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One finished build, made once; every test works on a copy."""
    folder = tmp_path_factory.mktemp("built")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("pipeline.cli.build.plan", lambda *_: made(LIMIT))
        assert main(["build", "--quiet"]) == 0
    return folder / "runs"


@pytest.fixture
def baseline(line: Line, built: Path, tmp_path: Path) -> Path:
    shutil.copytree(built, tmp_path / "runs", symlinks=True)
    line()
    path = tmp_path / "baseline.json"
    path.write_bytes((tmp_path / "runs" / "toy-reference" / "record.json").read_bytes())
    return path


def ci(baseline: Path, *more: str) -> int:
    return main(["ci", "--quiet", "--baseline", str(baseline), *more])


def failures(path: Path) -> list[str]:
    return [failure.get("message", "") for failure in ET.parse(path).iter("failure")]


def test_its_own_record_is_green(line: Line, baseline: Path, tmp_path: Path) -> None:
    assert ci(baseline, "--junit", "j.xml", "--markdown", "r.md") == 0
    assert failures(tmp_path / "j.xml") == []
    assert "Nothing regressed." in (tmp_path / "r.md").read_text()


def test_the_record_in_the_run_itself_will_do(line: Line, baseline: Path, tmp_path: Path) -> None:
    assert ci(tmp_path / "runs" / "toy" / "record.json") == 0


def test_a_planted_regression_exits_4_and_is_named(
    line: Line, baseline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line(hits=60)
    assert ci(baseline, "--junit", "j.xml", "--markdown", "r.md") == 4
    said = capsys.readouterr()
    assert f"regression against {baseline}: {ROBUST}" in said.err
    assert "20 of 100 examples lost, 0 won" in said.out
    assert failures(tmp_path / "j.xml") == [
        f"regression of {ROBUST}: {ROBUST} 0.6 was 0.8: a loss of 0.2 must be <= 0.02"
    ]
    markdown = (tmp_path / "r.md").read_text()
    assert f"| `{ROBUST}` | validate | 80.0 % (" in markdown
    assert "✗ regressed" in markdown


def test_a_significant_loss_exits_4_without_any_limit(line: Line, baseline: Path) -> None:
    line({}, hits=60)
    assert ci(baseline) == 4


def test_a_loss_within_the_limit_is_kept(line: Line, baseline: Path) -> None:
    line(hits=79)
    assert ci(baseline) == 0


def test_a_refused_gate_exits_1_and_writes_junit_all_the_same(line: Line, baseline: Path, tmp_path: Path) -> None:
    line(budget=(at_least(ROBUST, 0.99),))
    assert ci(baseline, "--junit", "j.xml", "--markdown", "r.md") == 1
    assert len(failures(tmp_path / "j.xml")) == 2
    assert ET.parse(tmp_path / "j.xml").find("testsuite[@name='baseline']") is None
    assert "Refused: the gate after validate" in (tmp_path / "r.md").read_text()


def test_a_failed_stage_exits_3(line: Line, baseline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = plan(step("validate", {"fault": "raise"}))
    monkeypatch.setattr("pipeline.cli.build.plan", lambda *_: answer)
    assert ci(baseline) == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "expected a baseline here, there is none"),
        ("{", "the baseline is not JSON"),
        ('{"schema_version": 7}', "has schema version 7"),
        ("{}", "not a baseline of a run"),
    ],
)
def test_a_bad_baseline_exits_2_before_anything_is_planned(
    text: str | None, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("pipeline.cli.build.plan", lambda *_: pytest.fail("planned"))
    path = tmp_path / "baseline.json"
    if text is not None:
        path.write_text(text)
    assert ci(path) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_foreign_baseline_exits_2_before_anything_is_built(
    line: Line, baseline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = json.loads(baseline.read_text())
    data["spec"]["task"]["data"] = "mnist"
    baseline.write_text(json.dumps(data))
    before = (tmp_path / "runs" / "toy-reference" / "journal.jsonl").read_bytes()
    assert ci(baseline) == 2
    assert 'a foreign baseline; task.data: the baseline has "mnist", this build "none"' in capsys.readouterr().err
    assert (tmp_path / "runs" / "toy-reference" / "journal.jsonl").read_bytes() == before


def test_places_that_cannot_be_written_are_found_before_anything_is_built(
    line: Line, baseline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ci(baseline, "--junit", "nowhere/j.xml") == 2
    assert ci(baseline, "--markdown", str(tmp_path)) == 2
    assert ci(baseline, "--junit", str(baseline)) == 2
    assert "this is the baseline; writing there would destroy it" in capsys.readouterr().err
    json.loads(baseline.read_text())


def test_a_baseline_has_to_be_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["ci"])
    assert "--baseline" in capsys.readouterr().err
