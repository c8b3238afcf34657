import hashlib
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.errors import BadInput, StageFailed
from pipeline.core.record import RunRecord
from pipeline.core.stage import ORDER
from pipeline.engine.build import Built, build
from pipeline.engine.journal import read
from pipeline.engine.step import Plan
from tests.fake_line.plans import at_least, at_most, plan, slow, step
from tests.fake_line.processes import ROOT, digests, disk, finish, record, start, written_plan


def page(record_: RunRecord, files: Mapping[str, Path]) -> str:
    return f"<p>{record_.name} {record_.refused} {sorted(files)}"


def built(plan_: Plan, runs: Path) -> Built:
    return build(plan_, runs, runs, {"report.html": page, "report.md": page})


def snapshot(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def leavings(runs: Path) -> list[Path]:
    """Half-written or forgotten things, anywhere."""
    hidden = [path for path in runs.rglob("*") if path.name.startswith(".")]
    return [*hidden, *runs.glob("store/tmp/*"), *runs.glob("store/scratch/*")]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.chmod(0o644)
    path.write_bytes(data)


def test_a_build_leaves_run_folder_bundle_and_pointer_and_nothing_else(tmp_path: Path) -> None:
    done = built(plan(), tmp_path)
    assert done.bundle == tmp_path / "toy-reference" / "bundle"
    assert {path.name for path in done.folder.iterdir()} == {
        "bundle",
        "journal.jsonl",
        "plan.json",
        "record.json",
        "report.html",
        "report.md",
    }
    assert (tmp_path / "toy").readlink() == Path("toy-reference")
    assert RunRecord.load(json.loads((tmp_path / "toy" / "record.json").read_bytes())) == done.record
    assert leavings(tmp_path) == []


def test_the_manifest_names_every_file_by_digest_and_says_where_it_came_from(tmp_path: Path) -> None:
    owed = at_most("latency.p95", 5.0, on_device=True)
    done = built(plan(step("export", budget=(owed,))), tmp_path)
    assert done.bundle is not None
    files = snapshot(done.bundle)
    seal = f"{hashlib.sha256(files['manifest.json']).hexdigest()}  manifest.json\n"
    assert files.pop("manifest.sha256").decode() == seal
    manifest = json.loads(files.pop("manifest.json"))
    assert set(files) == {"model.onnx", "extra/probe.npz", "report.html", "record.json"}
    assert manifest["files"] == {
        name: {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)} for name, data in files.items()
    }
    assert (manifest["schema_version"], manifest["name"], manifest["target"]) == (1, "toy", "reference")
    assert (manifest["precision"], manifest["model"]) == ("fp32", "model.onnx")  # from the contract
    assert manifest["owed"] == [owed.dump()]
    assert {m["name"]: m["value"] for m in manifest["measurements"]}["accuracy.robust.test"] == 0.8
    assert [s["stage"] for s in manifest["lineage"]["stages"]] == [s.name for s in done.record.chosen()]
    assert manifest["lineage"]["stages"][1]["files"] == done.record.stages[1].artifact.files


def test_a_rebuild_with_nothing_changed_leaves_every_byte_of_the_bundle_and_what_finish_added(tmp_path: Path) -> None:
    first = built(plan(), tmp_path)
    assert first.bundle is not None
    (first.bundle / "device.json").write_text("{}")
    before = snapshot(first.bundle)
    second = built(plan(), tmp_path)
    assert all(stage.reused for stage in second.record.stages)
    assert snapshot(first.bundle) == before


@pytest.mark.parametrize("name", ["model.onnx", "manifest.json", "manifest.sha256", "record.json", "extra/probe.npz"])
def test_a_rebuild_mends_a_bundle_in_which_a_byte_was_flipped(tmp_path: Path, name: str) -> None:
    bundle = built(plan(), tmp_path).bundle
    assert bundle is not None
    before = snapshot(bundle)
    flip(bundle / name)
    built(plan(), tmp_path)
    assert snapshot(bundle) == before
    assert leavings(tmp_path) == []


def test_a_refusal_takes_the_older_bundle_away_and_still_writes_record_and_report(tmp_path: Path) -> None:
    built(plan(), tmp_path)
    strict = plan(step("validate", budget=(at_least("accuracy.robust.test", 0.99),)))
    done = built(strict, tmp_path)
    assert done.bundle is None
    assert done.refused is not None
    assert done.refused.status == 1
    assert not (done.folder / "bundle").exists()
    assert record(tmp_path).refused == "validate"
    assert "validate" in (done.folder / "report.html").read_text()
    assert leavings(tmp_path) == []


def test_a_failed_stage_keeps_the_older_bundle_and_leaves_details_that_the_next_run_removes(tmp_path: Path) -> None:
    bundle = built(plan(), tmp_path).bundle
    assert bundle is not None
    before = snapshot(bundle)
    with pytest.raises(
        StageFailed, match=r"compress failed: RuntimeError: the second digit; details in .*failed-compr"
    ):
        built(plan(step("compress", {"fault": "raise"})), tmp_path)
    assert snapshot(bundle) == before
    assert "RuntimeError" in (tmp_path / "toy-reference" / "failed-compress.txt").read_text()
    assert [stage.name for stage in record(tmp_path).stages] == ["search", "train"]
    built(plan(), tmp_path)
    assert not (tmp_path / "toy-reference" / "failed-compress.txt").exists()


@pytest.mark.parametrize(
    ("contract", "text"),
    [
        (None, "export gave no bundle/contract.json"),
        ({"files": []}, "contract.json names files, which the line itself fills in"),
    ],
)
def test_a_contract_that_is_missing_or_says_too_much_ships_nothing(
    tmp_path: Path, contract: dict[str, Any] | None, text: str
) -> None:
    with pytest.raises(StageFailed, match=text):
        built(plan(step("export", {"contract": contract})), tmp_path)
    assert not (tmp_path / "toy-reference" / "bundle").exists()
    assert leavings(tmp_path) == []


@pytest.mark.parametrize("stage", ORDER)
def test_a_flipped_byte_in_any_stored_blob_is_told_and_mended_wherever_it_is_read(tmp_path: Path, stage: str) -> None:
    first = built(plan(), tmp_path)
    assert first.bundle is not None
    before = snapshot(first.bundle)
    damaged = sorted(set(first.record.chosen()[ORDER.index(stage)].artifact.files.values()))
    for found in damaged:
        flip(tmp_path / "store" / "blobs" / found[:2] / found)
    # The stage behind runs anew, so that it reads what was damaged; behind export stands the bundle.
    behind = ORDER[ORDER.index(stage) + 1 :]
    again = built(plan(*(step(name, {"pause": 0.001}) for name in behind[:1])), tmp_path)
    warnings = [event["text"] for event in read(tmp_path / "toy" / "journal.jsonl") if event["kind"] == "warning"]
    assert sorted(found for found in damaged for text in warnings if found[:12] in text) == damaged
    assert [s.artifact.files for s in again.record.chosen()] == [s.artifact.files for s in first.record.chosen()]
    shipped = snapshot(first.bundle)
    assert shipped["model.onnx"] == before["model.onnx"]
    for found in damaged:
        data = (tmp_path / "store" / "blobs" / found[:2] / found).read_bytes()
        assert hashlib.sha256(data).hexdigest() == found


def test_a_missing_blob_or_outcome_is_made_again(tmp_path: Path) -> None:
    first = built(plan(), tmp_path)
    for path in (tmp_path / "store").glob("blobs/*/*"):
        path.unlink()
    assert digests(tmp_path) == {s.name: s.artifact.files for s in built(plan(), tmp_path).record.chosen()}
    for path in (tmp_path / "store").glob("outcomes/*"):
        path.write_bytes(path.read_bytes()[:50])
    again = built(plan(), tmp_path)
    assert [s.artifact for s in again.record.stages] == [s.artifact for s in first.record.stages]


def test_a_run_whose_name_is_taken_gets_no_pointer_but_is_built(tmp_path: Path) -> None:
    done = built(plan(name="store"), tmp_path)
    assert done.bundle == tmp_path / "store-reference" / "bundle"
    assert (tmp_path / "store").is_dir()
    assert not (tmp_path / "store").is_symlink()
    warnings = [event["text"] for event in read(done.folder / "journal.jsonl") if event["kind"] == "warning"]
    assert "is taken" in warnings[0]


def test_a_run_folder_that_was_another_runs_pointer_becomes_a_folder(tmp_path: Path) -> None:
    built(plan(name="a-b"), tmp_path)  # leaves a pointer a-b -> a-b-reference
    done = built(plan(name="a", target="b"), tmp_path)
    assert not done.folder.is_symlink()
    assert record(tmp_path, "a-b-reference").name == "a-b"
    assert record(tmp_path, "a-b").name == "a"


def test_the_pointer_follows_the_latest_target(tmp_path: Path) -> None:
    for target in ("x86_cpu", "jetson"):
        built(plan(target=target), tmp_path)
        assert (tmp_path / "toy").readlink() == Path(f"toy-{target}")


def test_a_full_disk_is_exit_2_one_line_and_the_next_run_carries_on(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    runs.mkdir()
    big = plan(step("export", {"padding": 2_000_000}))
    status, said = finish(start(written_plan(big, tmp_path), runs, disk(runs, 1500)))
    assert status == 2, said
    assert "No space left on device; free some space" in said
    assert said.count("\n") == 1
    after = Path(f"{runs}.after")
    assert not list(after.glob("store/tmp/*"))
    for path in after.glob("store/blobs/*/*"):
        assert hashlib.sha256(path.read_bytes()).hexdigest() == path.name
    assert [s.name for s in record(after).stages] == ["search", "train", "compress", "validate"]
    assert [s.reused for s in built(big, after).record.stages] == [True, True, True, True, False]


def test_a_read_only_disk_is_exit_2_and_one_line(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    built(plan(), runs)
    changed = written_plan(plan(step("train", {"hits": 95})), tmp_path)
    status, said = finish(start(changed, runs, disk(runs, 4000, read_only=True)))
    assert status == 2, said
    assert "Read-only file system; make it writable or give another folder with --runs" in said
    assert said.count("\n") == 1


def test_an_unchanged_build_imports_no_torch_and_runs_nothing(tmp_path: Path) -> None:
    path = written_plan(plan(), tmp_path)
    assert finish(start(path, tmp_path))[0] == 0
    code = (
        "import sys; from pathlib import Path; from tests.fake_line.__main__ import main;"
        "status = main(Path(sys.argv[1]), Path(sys.argv[2]));"
        "print(status, [m for m in ('torch', 'numpy', 'rich', 'tests.fake_line.train') if m in sys.modules])"
    )
    command = [sys.executable, "-c", code, str(path), str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "0 []\n"


SPOILING = """
import os, sys
from pathlib import Path
from tests.fake_line.__main__ import main

def spoil(args):
    # Whoever opens a blob finds that the disk has changed it meanwhile.
    name = os.fsdecode(args[0])
    if "/blobs/" in name and len(os.path.basename(name)) == 64 and args[2] & os.O_ACCMODE == os.O_RDONLY:
        os.chmod(args[0], 0o644)
        handle = os.open(args[0], os.O_WRONLY)
        os.write(handle, os.urandom(8))
        os.close(handle)

plan, runs = map(Path, sys.argv[1:])
sys.addaudithook(lambda event, args: spoil(args) if event == "open" and isinstance(args[0], (str, bytes)) else None)
sys.exit(main(plan, runs))
"""


def test_a_store_that_keeps_changing_is_bad_input_in_the_end(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SPOILING, str(written_plan(plan(), tmp_path)), str(tmp_path / "runs")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2, done.stderr
    assert "stored files keep changing on disk" in done.stderr
    assert not (tmp_path / "runs" / "toy-reference" / "bundle").exists()


def test_a_newer_store_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "store.json").write_text('{"schema_version": 9}')
    with pytest.raises(BadInput, match="newer Temper"):
        built(slow(), tmp_path)
    assert not (tmp_path / "toy-reference" / "record.json").exists()
