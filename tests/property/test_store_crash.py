"""Any interleaving of crash and restart leaves a readable store.

A child process works on the store and dies (`os._exit`, so no handler runs) at the n-th time it touches the file
system, for any n that hypothesis picks; then another one starts. Only the page cache survives, as after SIGKILL.
"""

import hashlib
import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.core.stage import Result
from pipeline.engine.disk import write_atomic
from pipeline.engine.store import Store

TOUCHES = ("open", "os.", "shutil.", "tempfile.", "fcntl.")
DIED = 99

# What is kept: contents overlap between keys, so that blobs are shared.
WORK = {f"{key:064x}": {f"f{i}": bytes([i % 3]) * (10 + key % 2) for i in range(key + 1)} for key in range(3)}


def work(root: Path, keys: list[str]) -> None:
    """As a build does it: look, run what is missing, keep it; then clean what is not wanted."""
    store = Store(root)
    with store.shared():
        for key in keys:
            with store.lock(key):
                if store.find(key) is None:
                    scratch = store.scratch(key)
                    for name, content in WORK[key].items():
                        (scratch / name).write_bytes(content)
                    store.keep(key, "train", Result({name: scratch / name for name in WORK[key]}), 0.0)
    with store.alone():
        store.collect(keys)


def dies_at(root: Path, keys: list[str], touch: int) -> bool:
    """Work in a child that dies at its `touch`-th touch; whether it died before it was done."""
    child = os.fork()
    if child == 0:
        left = touch

        def count(event: str, args: object) -> None:
            nonlocal left
            del args
            if event.startswith(TOUCHES):
                left -= 1
                if left == 0:
                    os._exit(DIED)

        status = 1
        try:
            sys.addaudithook(count)
            work(root, keys)
            status = 0
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, DIED)
    return status == DIED


def assert_readable(root: Path) -> None:
    store = Store(root)
    for path in root.glob("outcomes/*.json"):
        outcome = store.find(path.stem)
        assert outcome is not None
        found = {name: file.read_bytes() for name, file in store.open(outcome.artifact.files).items()}
        assert found == WORK[path.stem]
    for path in root.glob("blobs/*/*"):
        assert hashlib.sha256(path.read_bytes()).hexdigest() == path.name


KEYS = st.lists(st.sampled_from(sorted(WORK)), min_size=1, max_size=3, unique=True)


@settings(max_examples=25, deadline=None)
@given(lives=st.lists(st.tuples(KEYS, st.integers(1, 160)), min_size=1, max_size=5))
def test_any_interleaving_of_crash_and_restart_leaves_a_readable_store(lives: list[tuple[list[str], int]]) -> None:
    with TemporaryDirectory() as folder:
        root = Path(folder) / "store"
        for keys, touch in lives:
            dies_at(root, keys, touch)
            assert_readable(root)
        assert not dies_at(root, sorted(WORK), 10**9)
        assert_readable(root)
        assert {path.stem for path in root.glob("outcomes/*")} == set(WORK)
        assert not [*root.glob("tmp/*"), *root.glob("scratch/*"), *root.glob("damaged/*")]


def test_every_single_moment_of_one_life_is_survived(tmp_path: Path) -> None:
    key = sorted(WORK)[1]
    touch, died = 0, True
    while died:
        touch += 1
        root = tmp_path / str(touch)
        died = dies_at(root, [key], touch)
        assert_readable(root)
        assert not dies_at(root, [key], 10**9)
        assert_readable(root)
    assert touch > 40  # the hook saw the work


@settings(max_examples=40, deadline=None)
@given(touch=st.integers(1, 12), old=st.binary(max_size=50), new=st.binary(max_size=50))
def test_a_reader_of_an_atomic_write_sees_old_bytes_or_new_ones(touch: int, old: bytes, new: bytes) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "file"
        path.write_bytes(old)
        child = os.fork()
        if child == 0:
            left = touch

            def count(event: str, args: object) -> None:
                nonlocal left
                del args
                if event.startswith(TOUCHES):
                    left -= 1
                    if left == 0:
                        os._exit(DIED)

            try:
                sys.addaudithook(count)
                write_atomic(path, new)
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        assert path.read_bytes() in (old, new)
