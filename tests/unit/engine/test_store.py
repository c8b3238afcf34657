import hashlib
import json
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.core.errors import BadInput
from pipeline.core.measurement import exact
from pipeline.core.record import Outcomes
from pipeline.core.stage import Result
from pipeline.engine.store import Damaged, Outcome, Store
from tests.fake_line.processes import ROOT

KEY = "c0ffee"


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def keep(store: Store, key: str, contents: dict[str, bytes]) -> Outcome:
    scratch = store.scratch(key)
    files = {}
    for name, content in contents.items():
        files[name] = scratch / name
        files[name].write_bytes(content)
    bits = {"accuracy.clean.test": Outcomes.of([0, 1], [True, False])}
    return store.keep(key, "train", Result(files, (exact("size.model", 3, "bytes"),), bits, ("odd",)), 1.5)


def flip(path: Path, position: int = 0) -> None:
    """One bit, past the read-only mode."""
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)


def test_keep_then_find_gives_the_same_outcome_and_the_same_bytes(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with store.shared():
        kept = keep(store, KEY, {"a": b"alpha", "b": b""})
    again = Store(tmp_path)
    assert again.find(KEY) == kept
    assert kept.artifact.files == {"a": sha(b"alpha"), "b": sha(b"")}
    assert {n: p.read_bytes() for n, p in again.open(kept.artifact.files).items()} == {"a": b"alpha", "b": b""}
    assert (kept.findings, kept.seconds, kept.outcomes["accuracy.clean.test"].hits()) == (("odd",), 1.5, (True, False))


def test_nothing_is_found_where_nothing_was_kept_and_looking_writes_nothing(tmp_path: Path) -> None:
    assert Store(tmp_path / "store").find(KEY) is None
    assert not (tmp_path / "store").exists()


def test_blobs_are_read_only_sharded_and_scratch_is_gone_once_kept(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with store.shared():
        keep(store, KEY, {"a": b"alpha"})
    path = tmp_path / "blobs" / sha(b"alpha")[:2] / sha(b"alpha")
    assert stat.S_IMODE(path.stat().st_mode) == 0o444
    assert not list((tmp_path / "scratch").iterdir())
    assert not list((tmp_path / "tmp").iterdir())


def test_a_scratch_that_outlived_its_outcome_is_swept_and_half_done_work_is_not(tmp_path: Path) -> None:
    """Whoever kept the outcome was killed before the scratch was removed; somebody else was killed at work."""
    store = Store(tmp_path)
    with store.shared():
        keep(store, KEY, {"a": b"alpha"})
        (store.scratch(KEY) / "state").touch()
        (store.scratch("beef") / "state").touch()
    with store.shared() as nobody_else:
        assert nobody_else
    assert [path.name for path in (tmp_path / "scratch").iterdir()] == ["beef"]


def test_a_file_passed_through_is_the_same_blob(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with store.shared():
        first = keep(store, KEY, {"a": b"alpha"})
        inode = store.blob(sha(b"alpha")).stat().st_ino
        second = store.keep("beef", "compress", Result(store.open(first.artifact.files)), 0.0)
    assert second.artifact.files == first.artifact.files
    assert store.blob(sha(b"alpha")).stat().st_ino == inode


def test_a_flipped_byte_is_never_handed_out_is_told_once_and_healed_by_running_again(tmp_path: Path) -> None:
    said: list[str] = []
    store = Store(tmp_path, said.append)
    with store.shared():
        files = keep(store, KEY, {"a": b"alpha", "b": b"beta"}).artifact.files
        flip(store.blob(files["a"]))
        assert store.find(KEY) is not None  # the cheap check reads no bytes
        with pytest.raises(Damaged, match="a"):
            store.open(files)
        assert len(said) == 1
        assert files["a"][:12] in said[0]
        assert store.find(KEY) is None
        assert (tmp_path / "damaged" / files["a"]).exists()
        keep(store, KEY, {"a": b"alpha", "b": b"beta"})
        assert store.open(files)["a"].read_bytes() == b"alpha"


def test_a_byte_flipped_after_a_first_check_is_noticed(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with store.shared():
        files = keep(store, KEY, {"a": b"alpha"}).artifact.files
        store.open(files)
        flip(store.blob(files["a"]), 3)
        with pytest.raises(Damaged):
            store.open(files)


def test_keeping_the_same_bytes_heals_a_damaged_blob(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with store.shared():
        files = keep(store, KEY, {"a": b"alpha"}).artifact.files
        flip(store.blob(files["a"]))
        keep(store, "beef", {"a": b"alpha"})
        assert store.open(files)["a"].read_bytes() == b"alpha"


def test_a_blob_of_wrong_size_or_none_makes_the_outcome_absent(tmp_path: Path) -> None:
    said: list[str] = []
    store = Store(tmp_path, said.append)
    with store.shared():
        files = keep(store, KEY, {"a": b"alpha"}).artifact.files
        path = store.blob(files["a"])
        path.chmod(0o644)
        path.write_bytes(b"alp")
        assert store.find(KEY) is None
        assert "wrong size" in said[0]
        assert store.find(KEY) is None
        assert len(said) == 1


def test_any_flipped_bit_of_an_outcome_makes_it_absent(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with store.shared():
        keep(store, KEY, {"a": b"alpha"})
        path = tmp_path / "outcomes" / f"{KEY}.json"
        whole = path.read_bytes()
        for position in range(len(whole)):
            path.write_bytes(whole)
            flip(path, position)
            assert store.find(KEY) is None, f"byte {position}"
            assert not path.exists()


def test_a_store_of_a_newer_version_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "store.json").write_text('{"schema_version": 2}')
    with pytest.raises(BadInput, match=r"newer Temper.*version 2.*--runs"):
        Store(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema_version": "x"}', "\0"])
def test_an_unreadable_marker_says_what_to_do(tmp_path: Path, text: str) -> None:
    (tmp_path / "store.json").write_text(text)
    with pytest.raises(BadInput, match=r"store\.json: expected .*schema_version"):
        Store(tmp_path)


HOLD = """
import sys, time
from pathlib import Path
from pipeline.engine.store import Store
store = Store(Path(sys.argv[1]))
with store.shared(), store.lock("c0ffee"):
    print("held", flush=True)
    time.sleep(60)
"""


def holder(root: Path) -> "subprocess.Popen[str]":
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(root)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_waiting_process_says_who_holds_the_lock_and_gets_it_when_the_holder_is_killed(tmp_path: Path) -> None:
    said: list[str] = []
    with holder(tmp_path) as process:

        def tell(text: str) -> None:
            said.append(text)
            process.kill()

        with Store(tmp_path).shared():
            pass
        store = Store(tmp_path, tell)
        with store.lock(KEY, "stage train"):
            assert len(said) == 1
        assert f"stage train is in the hands of process {process.pid} since" in said[0]


def test_cleaning_waits_for_no_build_but_refuses_and_builds_share(tmp_path: Path) -> None:
    with holder(tmp_path) as process:
        store = Store(tmp_path)
        with store.shared() as alone:
            assert not alone
        with pytest.raises(BadInput, match="a build is using the store"), store.alone():
            pass
        process.kill()
    with store.shared() as alone:
        assert alone


def test_what_a_killed_process_left_in_tmp_is_swept_by_the_next_that_is_alone(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with store.shared():
        (tmp_path / "tmp" / ".tmp-old").write_bytes(b"half")
    with holder(tmp_path) as process:  # this one is alone, and sweeps
        (tmp_path / "tmp" / ".tmp-new").write_bytes(b"half")
        with store.shared():
            assert [path.name for path in (tmp_path / "tmp").iterdir()] == [".tmp-new"]
        process.kill()


def test_verify_names_every_damaged_entry_and_who_uses_it(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with store.shared():
        files = keep(store, KEY, {"a": b"alpha", "b": b"beta"}).artifact.files
        keep(store, "beef", {"c": b"gamma"})
    assert store.verify() == []
    flip(store.blob(files["a"]), 2)
    flip(tmp_path / "outcomes" / "beef.json", 40)
    bad = store.verify(repair=False)
    assert len(bad) == 2
    assert files["a"] in bad[0]
    assert "used by train" in bad[0]
    assert "outcome beef" in bad[1]
    assert store.verify() == bad
    assert store.verify() == []


def test_collect_drops_what_no_key_reaches_and_keeps_the_rest_whole(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with store.shared():
        kept = keep(store, KEY, {"a": b"alpha", "b": b"shared"})
        keep(store, "beef", {"b": b"shared", "c": b"gamma"})
        (store.scratch("half") / "work").write_bytes(b"x")
    with store.alone():
        wanted = store.collect([KEY, "unknown"], dry_run=True)
        assert store.find("beef") is not None
        assert store.collect([KEY, "unknown"]) == wanted
    assert {path.name for path in wanted} == {"beef.json", sha(b"gamma"), "half"}
    assert store.find("beef") is None
    assert store.find(KEY) == kept
    assert store.verify() == []
    assert store.open(kept.artifact.files)["b"].read_bytes() == b"shared"


def test_a_store_where_a_file_is_in_the_way_is_bad_input(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("not a folder")
    with pytest.raises(BadInput, match="cannot write"), Store(tmp_path / "runs" / "store").shared():
        pass


FILL = """
import resource, sys
from pathlib import Path
from pipeline.core.errors import BadInput
from pipeline.core.stage import Result
from pipeline.engine.store import Store
store = Store(Path(sys.argv[1]))
with store.shared():
    path = store.scratch("c0ffee") / "big"
    path.write_bytes(b"x" * 100_000)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
    try:
        store.keep("c0ffee", "train", Result({"small": path.with_name("big"), "big": path}), 0.0)
    except BadInput as error:
        print(error)
"""


def test_a_disk_that_takes_no_more_is_one_clear_message_and_nothing_half_written(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FILL, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    assert "cannot write" in done.stdout
    assert "free some space" in done.stdout
    assert done.stdout.count("\n") == 1
    assert not list(tmp_path.glob("blobs/*/*"))
    assert not list(tmp_path.glob("tmp/*"))
    assert not list(tmp_path.glob("outcomes/*"))
    assert (tmp_path / "scratch" / KEY / "big").exists()


LOOK = """
import os, sys
from pathlib import Path
from pipeline.core.errors import BadInput
from pipeline.engine.store import Store
os.chdir(sys.argv[1])
if os.geteuid() == 0:
    os.setuid(65534)  # root may write anywhere
try:
    with Store(Path("theirs/store")).shared():
        print("opened")
except BadInput as error:
    print(error)
"""


def test_a_folder_that_is_not_ours_to_write_is_bad_input(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    (tmp_path / "theirs").mkdir(mode=0o555)
    command = [sys.executable, "-c", LOOK, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
    assert "Permission denied; make it writable or give another folder with --runs" in done.stdout


def test_outcome_files_are_canonical_json_that_others_can_read(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with store.shared():
        keep(store, KEY, {"a": b"alpha"})
    data = json.loads((tmp_path / "outcomes" / f"{KEY}.json").read_bytes())
    assert data["outcome"]["artifact"] == {"stage": "train", "files": {"a": sha(b"alpha")}}
