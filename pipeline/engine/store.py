"""Content-addressed store: contents by digest, outcomes by key. The commit point of a stage is one rename.

store.json            version of the layout       scratch/<key>/   half-done work of an interrupted stage
blobs/ab/abcd...      contents, read-only         locks/<key>      held while a stage runs; released on death
outcomes/<key>.json   what a stage gave           damaged/         set aside: bytes that were not the recorded ones
"""

import fcntl
import json
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, Literal

from pydantic import ValidationError

from pipeline.core.canonical import canonical, digest, file_digest
from pipeline.core.errors import BadInput
from pipeline.core.measurement import Measurement
from pipeline.core.record import Artifact, Outcomes
from pipeline.core.stage import Result
from pipeline.core.value import Value
from pipeline.engine.disk import copy_hashed, remove, sync, temporary, write_atomic, writing

VERSION = 1
_FOLDERS = ("blobs", "outcomes", "scratch", "locks", "damaged", "tmp")

Tell = Callable[[str], None]


class Outcome(Value):
    """What a stage gave under a key. `sizes` go with `artifact.files`, for the cheap check."""

    schema_version: Literal[1] = 1
    key: str
    artifact: Artifact
    sizes: dict[str, int]
    measurements: tuple[Measurement, ...]
    outcomes: dict[str, Outcomes]
    findings: tuple[str, ...]
    seconds: float


class Damaged(Exception):
    """A blob held other bytes than its name says. It has been set aside, so the step that made it can run again."""


class Store:
    """Open it to read by naming it; write inside `with store.shared()`. `tell` gets a line per thing worth knowing."""

    def __init__(self, root: Path, tell: Tell = lambda _: None) -> None:
        self.root, self._tell = root, tell
        self._checked: dict[str, tuple[int, int, int]] = {}
        _check_version(root / "store.json")

    @contextmanager
    def shared(self) -> Iterator[bool]:
        """Hold the store open for writing; any number of builds may, but not together with `alone`.

        Yields whether nobody else held it, so that the leavings of processes that died can be swept.
        """
        with self._gate() as gate:
            nobody_else = _try(gate, fcntl.LOCK_EX)
            if nobody_else:
                for spare in (*self.root.glob("tmp/*"), *self.root.glob("outcomes/.tmp-*"), *self._outlived()):
                    remove(spare)
            fcntl.flock(gate, fcntl.LOCK_SH)
            yield nobody_else

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keep every build out; raises `BadInput` where one is running."""
        with self._gate() as gate:
            if not _try(gate, fcntl.LOCK_EX):
                raise BadInput(f"{self.root}: a build is using the store; wait until it has ended, then try again")
            yield

    @contextmanager
    def lock(self, key: str, what: str = "this") -> Iterator[None]:
        """One process at a time per key. Waits, and says for whom; the kernel releases it when the holder dies."""
        with self._held(self.root / "locks" / key) as handle:
            if not _try(handle, fcntl.LOCK_EX):
                holder = handle.read(200).decode(errors="replace").strip() or "another process"
                self._tell(f"waiting: {what} is in the hands of {holder}")
                fcntl.flock(handle, fcntl.LOCK_EX)
            with writing(self.root):
                os.ftruncate(handle.fileno(), 0)
                since = time.strftime("%H:%M:%S")
                os.pwrite(handle.fileno(), f"process {os.getpid()} since {since}\n".encode(), 0)
            yield

    def find(self, key: str) -> Outcome | None:
        """The stored outcome, if every blob is there in its right size. Reads no blob."""
        path = self._outcome(key)
        try:
            stored = json.loads(path.read_bytes())
            outcome = Outcome.load(stored["outcome"])
            sound = digest(stored["outcome"]) == stored["digest"] and outcome.key == key
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, KeyError, ValidationError):
            sound = False
        if not sound:
            self._set_aside(path, f"outcome {key[:12]} was damaged")
            return None
        return outcome if all(self._present(d, outcome.sizes[n]) for n, d in outcome.artifact.files.items()) else None

    def open(self, files: Mapping[str, str]) -> dict[str, Path]:
        """Blobs by name, every one of them hashed. Raises `Damaged` once the bad ones are set aside."""
        bad = [f"{name} ({found[:12]})" for name, found in sorted(files.items()) if not self._sound(found)]
        if bad:
            raise Damaged(", ".join(bad))
        return {name: self.blob(found) for name, found in files.items()}

    def keep(self, key: str, stage: str, result: Result, seconds: float) -> Outcome:
        """Take a stage's files in and write its outcome: whole or, where anything goes wrong before, not at all."""
        files, sizes = {}, {}
        for name, path in sorted(result.files.items()):
            files[name], sizes[name] = self._take(path)
        outcome = Outcome(
            key=key,
            artifact=Artifact(stage=stage, files=files),
            sizes=sizes,
            measurements=result.measurements,
            outcomes=dict(result.outcomes),
            findings=result.findings,
            seconds=seconds,
        )
        body = outcome.dump()
        write_atomic(self._outcome(key), canonical({"digest": digest(body), "outcome": body}))
        remove(self.root / "scratch" / key)
        return outcome

    def scratch(self, key: str) -> Path:
        """Where the stage of this key leaves half-done work; it survives a crash and goes once the outcome is kept."""
        path = self.root / "scratch" / key
        with writing(path):
            path.mkdir(parents=True, exist_ok=True)
        return path

    def _outlived(self) -> list[Path]:
        """Scratches of outcomes that are kept: whoever kept them died before the scratch was removed."""
        return [path for path in self.root.glob("scratch/*") if self.find(path.name) is not None]

    def blob(self, found: str) -> Path:
        return self.root / "blobs" / found[:2] / found

    def verify(self, repair: bool = True) -> list[str]:
        """Rehash everything; one sentence per damaged entry, each set aside unless `repair` is off."""
        bad = []
        for path in sorted(self.root.glob("blobs/*/*")):
            if file_digest(path) != path.name:
                bad.append(f"blob {path.name}: its bytes are not the recorded ones (used by {self._users(path.name)})")
                if repair:
                    self._set_aside(path)
        for path in sorted(self.root.glob("outcomes/*.json")):
            try:
                stored = json.loads(path.read_bytes())
                sound = digest(stored["outcome"]) == stored["digest"]
            except (ValueError, TypeError, KeyError):
                sound = False
            if not sound:
                bad.append(f"outcome {path.stem}: its bytes are not the recorded ones")
                if repair:
                    self._set_aside(path)
        return bad

    def collect(self, keys: Iterable[str], dry_run: bool = False) -> list[Path]:
        """Drop every outcome not in `keys`, every blob that none of those needs, and all half-done work."""
        kept = set(keys)
        blobs = {d for key in kept if (outcome := self.find(key)) for d in outcome.artifact.files.values()}
        doomed = [path for path in self.root.glob("outcomes/*.json") if path.stem not in kept]
        doomed += [path for path in self.root.glob("blobs/*/*") if path.name not in blobs]
        doomed += [
            *self.root.glob("scratch/*"),
            *self.root.glob("damaged/*"),
            *self.root.glob("tmp/*"),
        ]
        # Lock files are empty of meaning here: whoever could hold one also holds the store, which is ours alone.
        locks = [path for path in self.root.glob("locks/*") if path.name != "store"]
        if not dry_run:
            for path in (*doomed, *locks):
                with writing(path):
                    remove(path)
        return sorted(doomed)

    def _outcome(self, key: str) -> Path:
        return self.root / "outcomes" / f"{key}.json"

    def _take(self, path: Path) -> tuple[str, int]:
        if path.parent.parent == self.root / "blobs":
            return path.name, path.stat().st_size  # an input passed through
        with writing(self.root), temporary(self.root / "tmp") as (spare, file):
            found, size = copy_hashed(path, file)
            os.fchmod(file.fileno(), 0o444)
            target = self.blob(found)
            if not target.parent.is_dir():
                target.parent.mkdir(parents=True, exist_ok=True)
                sync(target.parent.parent)
            # Over whatever is there: the same bytes, or damaged ones that this heals.
            spare.replace(target)
            sync(target.parent)
        return found, size

    def _present(self, found: str, size: int) -> bool:
        path = self.blob(found)
        try:
            right = path.stat().st_size == size
        except FileNotFoundError:
            return False
        if not right:
            self._set_aside(path, f"stored file {found[:12]} was damaged (wrong size)")
        return right

    def _sound(self, found: str) -> bool:
        path = self.blob(found)
        try:
            about = path.stat()
            seen = (about.st_ino, about.st_size, about.st_mtime_ns)
            if self._checked.get(found) == seen:
                return True
            right = file_digest(path) == found
        except FileNotFoundError:
            return False
        if right:
            self._checked[found] = seen
        else:
            self._set_aside(path, f"stored file {found[:12]} was damaged (its bytes are not the recorded ones)")
        return right

    def _set_aside(self, path: Path, why: str | None = None) -> None:
        # Best effort: somebody else may have been quicker, and on a read-only disk it stays where it is, unused.
        with suppress(OSError):
            (self.root / "damaged").mkdir(parents=True, exist_ok=True)
            path.replace(self.root / "damaged" / path.name)
        if why:
            self._tell(f"{why}; set aside, and what needs it is made again")

    def _users(self, found: str) -> str:
        """By the text of the outcomes alone: `find` would not count one whose other blobs were set aside before."""
        stages = set()
        for path in self.root.glob("outcomes/*.json"):
            text = path.read_text(errors="replace")
            if found in text:
                named = re.search(r'"stage":"(\w+)"', text)
                stages.add(named[1] if named else "a damaged outcome")
        return ", ".join(sorted(stages)) or "nothing"

    @contextmanager
    def _gate(self) -> Iterator[BinaryIO]:
        with writing(self.root):
            for folder in _FOLDERS:
                (self.root / folder).mkdir(parents=True, exist_ok=True)
            if not (self.root / "store.json").exists():
                write_atomic(self.root / "store.json", canonical({"schema_version": VERSION}))
        with self._held(self.root / "locks" / "store") as handle:
            yield handle

    @contextmanager
    def _held(self, path: Path) -> Iterator[BinaryIO]:
        with writing(path):
            handle = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666), "rb", buffering=0)
        with handle:
            yield handle


def _try(handle: BinaryIO, how: int) -> bool:
    try:
        fcntl.flock(handle, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _check_version(marker: Path) -> None:
    try:
        version = json.loads(marker.read_bytes())["schema_version"]
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise BadInput(f"{marker}: cannot be read: {error.strerror}; give another folder with --runs") from None
    except (ValueError, TypeError, KeyError):
        version = None
    if not isinstance(version, int):
        raise BadInput(
            f'{marker}: expected {{"schema_version": {VERSION}}}, got something else; give another folder with --runs, '
            "or delete this file if the store beside it is yours"
        )
    if version > VERSION:
        raise BadInput(
            f"{marker.parent}: a newer Temper wrote this store (version {version}, this one reads up to {VERSION}); "
            "use that newer version, or give another folder with --runs"
        )
