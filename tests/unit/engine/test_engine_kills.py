"""Real processes: killed at seeded random moments, interrupted, raced."""

import hashlib
import json
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest

from pipeline.engine.build import build
from pipeline.engine.journal import read
from tests.fake_line.plans import plan, slow, step
from tests.fake_line.processes import digests, finish, record, start, written_plan

KILLS = 20


def undisturbed(tmp_path: Path) -> dict[str, dict[str, str]]:
    """Digests of the same plan, its pauses left in, in a folder of its own."""
    runs = tmp_path / "undisturbed"
    build(slow(), runs, runs, {"report.html": lambda made, _: f"<p>{made.name}"})
    return digests(runs)


def wait_for(path: Path, text: bytes, process: "subprocess.Popen[str]") -> None:
    while not (path.exists() and text in path.read_bytes()):
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)


def assert_whole(runs: Path) -> None:
    """What every reader may count on at any time, whoever was killed when."""
    store = runs / "store"
    for path in store.glob("blobs/*/*"):
        assert hashlib.sha256(path.read_bytes()).hexdigest() == path.name
    for path in store.glob("outcomes/*.json"):
        found = json.loads(path.read_bytes())["outcome"]["artifact"]["files"].values()
        assert all((store / "blobs" / blob[:2] / blob).exists() for blob in found)
    for name in ("record.json", "bundle/manifest.json"):
        path = runs / "toy-reference" / name
        if path.exists():
            json.loads(path.read_bytes())
    manifest = runs / "toy-reference" / "bundle" / "manifest.json"
    if manifest.exists():
        for name, entry in json.loads(manifest.read_bytes())["files"].items():
            assert hashlib.sha256((manifest.parent / name).read_bytes()).hexdigest() == entry["sha256"]


def assert_clean(runs: Path) -> None:
    assert not list(runs.glob("store/tmp/*"))
    assert not list(runs.glob("store/scratch/*"))
    assert not [path for path in runs.rglob("*") if path.name.startswith(".")]


def test_killed_at_twenty_random_moments_it_ends_with_the_same_digests(tmp_path: Path) -> None:
    expected = undisturbed(tmp_path)
    rng = random.Random(7)
    runs, path = tmp_path / "runs", written_plan(slow(), tmp_path)
    journal = runs / "toy-reference" / "journal.jsonl"
    kills = 0
    for _ in range(KILLS):
        process = start(path, runs)
        while not journal.exists() and process.poll() is None:
            time.sleep(0.005)
        # The interpreter's own start is not what we test: wait until this build has begun, then some more.
        mark = str(process.pid).encode()
        while process.poll() is None and mark not in journal.read_bytes():
            time.sleep(0.005)
        time.sleep(rng.uniform(0.0, 0.15))
        process.kill()
        kills += finish(process)[0] == -signal.SIGKILL
        assert_whole(runs)
        if rng.random() < 0.2:  # as if the cut came late: the line starts from nothing but its scratch
            for outcome in runs.glob("store/outcomes/*"):
                outcome.unlink()
    assert kills >= KILLS // 4
    assert finish(start(path, runs)) == (0, "")
    assert digests(runs) == expected
    assert_whole(runs)
    assert_clean(runs)


def test_a_stage_killed_half_way_goes_on_from_its_scratch(tmp_path: Path) -> None:
    path = written_plan(plan(step("train", {"pause": 0.1, "steps": 30})), tmp_path)
    process = start(path, tmp_path)
    wait_for(tmp_path / "toy-reference" / "journal.jsonl", b'"stage": "train", "attempt"', process)
    while not list(tmp_path.glob("store/scratch/*/chain.json")):
        time.sleep(0.01)
    process.kill()
    finish(process)
    assert finish(start(path, tmp_path))[0] == 0
    notes = [event["text"] for event in read(tmp_path / "toy-reference" / "journal.jsonl") if event["kind"] == "note"]
    assert len(notes) == 1
    assert notes[0].startswith("resumed at ")


def test_two_builds_in_one_store_at_once_run_no_stage_twice_and_agree(tmp_path: Path) -> None:
    expected = undisturbed(tmp_path)
    runs, path = tmp_path / "runs", written_plan(slow(), tmp_path)
    first, second = start(path, runs), start(path, runs)
    assert finish(first) == (0, "")
    assert finish(second) == (0, "")
    events = read(runs / "toy-reference" / "journal.jsonl")
    ran = sorted(event["stage"] for event in events if event["kind"] == "outcome" and not event["reused"])
    assert ran == ["compress", "export", "search", "train", "validate"]
    assert any("in the hands of process" in event["text"] for event in events if event["kind"] == "warning")
    assert digests(runs) == expected
    assert_whole(runs)
    assert_clean(runs)


def test_two_racing_builds_killed_at_random_end_with_the_same_digests(tmp_path: Path) -> None:
    expected = undisturbed(tmp_path)
    rng = random.Random(11)
    runs, path = tmp_path / "runs", written_plan(slow(), tmp_path)
    racers = [start(path, runs) for _ in range(2)]
    for _ in range(8):
        time.sleep(rng.uniform(0.3, 0.8))
        victim = rng.randrange(2)
        racers[victim].kill()
        finish(racers[victim])
        racers[victim] = start(path, runs)
    assert [finish(racer)[0] for racer in racers] == [0, 0]
    assert digests(runs) == expected
    assert_whole(runs)
    finish(start(path, runs))  # whoever is alone sweeps
    assert_clean(runs)


def test_runs_of_two_specs_share_a_store_without_harm(tmp_path: Path) -> None:
    plans = [slow(name="one"), slow(name="two", seed=1)]
    processes = [start(written_plan(made, tmp_path), tmp_path / "runs") for made in plans]
    assert [finish(process) for process in processes] == [(0, ""), (0, "")]
    one, two = (digests(tmp_path / "runs", f"{name}-reference") for name in ("one", "two"))
    assert one["train"]["weights.safetensors"] != two["train"]["weights.safetensors"]


@pytest.mark.parametrize("number", [signal.SIGINT])
def test_ctrl_c_leaves_everything_readable_and_the_next_run_carries_on(tmp_path: Path, number: int) -> None:
    path = written_plan(slow(pause=0.1), tmp_path)
    process = start(path, tmp_path)
    wait_for(tmp_path / "toy-reference" / "journal.jsonl", b'"stage": "compress", "attempt"', process)
    process.send_signal(number)
    assert finish(process)[0] != 0
    assert_whole(tmp_path)
    assert [stage.name for stage in record(tmp_path).stages] == ["search", "train"]
    assert finish(start(path, tmp_path))[0] == 0
    assert [stage.reused for stage in record(tmp_path).stages] == [True, True, False, False, False]
    assert_clean(tmp_path)
