import json
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.cli import main
from pipeline.core.stage import ORDER
from pipeline.engine.build import build
from pipeline.engine.step import Plan
from tests.fake_line.plans import plan, step
from tests.fake_line.processes import ROOT, digests, written_plan


def built(plan_: Plan, runs: Path) -> None:
    build(plan_, runs, runs, {"report.html": lambda record, _: record.name})


def clean(runs: Path, *more: str) -> int:
    return main(["clean", "--runs", str(runs), *more])


def contents(runs: Path) -> set[str]:
    return {
        path.relative_to(runs).as_posix() for path in runs.rglob("*") if path.is_file() and "locks" not in path.parts
    }


def test_what_a_record_reaches_stays_and_the_rest_goes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    built(plan(), tmp_path)
    kept = contents(tmp_path) - {"toy-reference/journal.jsonl"}
    built(plan(step("compress", {"ratio": 0.25})), tmp_path)
    built(plan(), tmp_path)  # the record is that of the first again
    (tmp_path / "store" / "scratch" / "half").mkdir()
    before = contents(tmp_path)
    assert clean(tmp_path, "--dry-run") == 0
    assert "would drop" in capsys.readouterr().out
    assert contents(tmp_path) == before
    assert clean(tmp_path) == 0
    assert "1 records kept, dropped" in capsys.readouterr().out
    assert contents(tmp_path) - {"toy-reference/journal.jsonl"} == kept
    assert not list(tmp_path.glob("store/scratch/*"))
    built(plan(), tmp_path)
    assert [stage["reused"] for stage in json.loads((tmp_path / "toy" / "record.json").read_text())["stages"]] == [
        True
    ] * 5


def test_every_run_of_a_shared_store_is_kept(tmp_path: Path) -> None:
    built(plan(name="one"), tmp_path)
    built(plan(step("export", {"precision": "int8"}), name="two"), tmp_path)
    before = contents(tmp_path)
    clean(tmp_path)
    assert contents(tmp_path) == before


def test_remembered_plans_go_with_their_records(tmp_path: Path) -> None:
    built(plan(), tmp_path)
    plans = tmp_path / "store" / "plans"
    plans.mkdir()
    (plans / "mine.json").write_text(json.dumps({"plan": plan().dump()}))
    (plans / "old.json").write_text(json.dumps({"plan": plan(name="old").dump()}))
    (plans / "torn.json").write_text("{")
    clean(tmp_path)
    assert [path.name for path in plans.iterdir()] == ["mine.json"]


def test_a_record_that_cannot_be_read_stops_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    built(plan(), tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "record.json").write_text("{")
    before = contents(tmp_path)
    assert clean(tmp_path) == 2
    assert "other/record.json" in capsys.readouterr().err
    assert contents(tmp_path) == before


def test_no_store_is_nothing_to_do_and_makes_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert clean(tmp_path / "none") == 0
    assert "no store here" in capsys.readouterr().out
    assert not (tmp_path / "none").exists()


def test_verify_of_a_sound_store_is_0_and_changes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    built(plan(), tmp_path)
    before = contents(tmp_path)
    assert clean(tmp_path, "--verify") == 0
    assert "every byte as recorded" in capsys.readouterr().out
    assert contents(tmp_path) == before


@pytest.mark.parametrize("stage", ORDER)
def test_verify_names_a_flipped_byte_in_any_blob_with_2_and_the_next_build_mends_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], stage: str
) -> None:
    built(plan(), tmp_path)
    expected = digests(tmp_path)
    found = sorted(expected[stage].values())[0]
    path = tmp_path / "store" / "blobs" / found[:2] / found
    data = bytearray(path.read_bytes())
    data[-1] ^= 128
    path.chmod(0o644)
    path.write_bytes(data)
    assert clean(tmp_path, "--verify", "--dry-run") == 2
    assert clean(tmp_path, "--verify") == 2
    said = capsys.readouterr().err
    assert found in said
    assert stage in said
    assert clean(tmp_path, "--verify") == 0
    built(plan(), tmp_path)
    assert digests(tmp_path) == expected
    assert clean(tmp_path, "--verify") == 0


def test_verify_names_the_users_of_blobs_of_one_outcome_alike(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    built(plan(), tmp_path)
    spoilt = 0
    for path in (tmp_path / "store" / "blobs").glob("*/*"):
        path.chmod(0o644)
        path.write_bytes(path.read_bytes() + b"x")
        spoilt += 1
    assert clean(tmp_path, "--verify", "--dry-run") == 2
    asked = capsys.readouterr().err
    assert "nothing was changed; without --dry-run they are set aside" in asked
    assert clean(tmp_path, "--verify") == 2
    said = capsys.readouterr().err
    assert said.splitlines()[:-1] == asked.splitlines()[:-1]
    assert "a damaged outcome" not in said
    assert said.count("(used by ") == spoilt > 1


def test_it_refuses_while_a_build_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written_plan(plan(step("train", {"pause": 0.2, "steps": 1000})), tmp_path)
    runs = tmp_path / "runs"
    with subprocess.Popen([sys.executable, "-m", "tests.fake_line", str(path), str(runs)], cwd=ROOT) as process:
        while not list(runs.glob("store/scratch/*/chain.json")):
            assert process.poll() is None
        assert clean(runs) == 2
        process.kill()
    assert "a build is using the store" in capsys.readouterr().err
    assert clean(runs) == 0
