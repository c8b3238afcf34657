"""Writes that are whole or absent: temporary file, flush, fsync, rename, fsync of the folder.

Whatever the disk refuses (full, read-only, not ours) becomes one `BadInput` that says what to do next.
"""

import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from pipeline.core.errors import BadInput

_CHUNK = 1 << 20
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_CLOSED = {errno.EROFS, errno.EACCES, errno.EPERM}


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn any refusal of the file system into `BadInput` naming `path`."""
    try:
        yield
    except OSError as error:
        raise BadInput(refusal(error, path)) from error


def refusal(error: OSError, path: Path | None = None) -> str:
    """One line: what could not be written, why, and what to do."""
    if error.errno in _FULL:
        advice = "free some space or give another folder with --runs"
    elif error.errno in _CLOSED:
        advice = "make it writable or give another folder with --runs"
    else:
        advice = "give another folder with --runs"
    where = path if path is not None else (error.filename or "the output")
    return f"cannot write {where}: {error.strerror or error}; {advice}, then run the same command again"


def disk_refused(error: BaseException) -> OSError | None:
    """The full or read-only disk behind an exception, if there is one, also where a library wrapped it in its own."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in _FULL | {errno.EROFS}:
            return seen
        for code in (errno.ENOSPC, errno.EROFS):
            if os.strerror(code) in str(seen):
                return OSError(code, os.strerror(code))
        seen = seen.__cause__ or seen.__context__
    return None


def sync(folder: Path) -> None:
    """Make the renames in a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomic(path: Path, data: bytes) -> None:
    """Readers see the old bytes or the new ones, never a mixture, whatever is killed when.

    A device or a pipe is written into: renamed over, /dev/null would be gone for everybody.
    """
    with writing(path):
        if path.exists() and not path.is_file():
            path.write_bytes(data)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary(path.parent) as (spare, file):
            file.write(data)
            _settle(file)
            Path(spare).replace(path)
        sync(path.parent)


def copy_hashed(source: Path, target: BinaryIO) -> tuple[str, int]:
    """Copy into an open file and fsync it; the SHA-256 and size of what was copied."""
    state, size = hashlib.sha256(), 0
    with source.open("rb") as file:
        while piece := file.read(_CHUNK):
            state.update(piece)
            target.write(piece)
            size += len(piece)
    _settle(target)
    return state.hexdigest(), size


@contextmanager
def temporary(folder: Path) -> Iterator[tuple[Path, BinaryIO]]:
    """A new file in `folder`, to be renamed away inside the block; removed where it was not."""
    handle, name = tempfile.mkstemp(prefix=".tmp-", dir=folder)
    path = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            os.fchmod(file.fileno(), 0o666 & ~_umask())
            yield path, file
    finally:
        with suppress(FileNotFoundError):
            path.unlink()


def remove(path: Path) -> None:
    """Remove a file or a folder; whatever is gone already is fine."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _settle(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _umask() -> int:
    # mkstemp gives 0600, which would keep colleagues from reading a record; the kernel tells the mask only when set.
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
