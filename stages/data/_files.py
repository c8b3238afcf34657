"""Opening what the user has on disk: every failure is one sentence that names the file."""

import gzip
import hashlib
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from stages.method import InputError

PLACE = "data lies under --data-root, else TEMPER_DATA, else ./data"
LOOK_ALIKE = "fetch the file again, or set original = false for other images in the same format"


def present(paths: Iterable[Path], hint: str = PLACE) -> tuple[Path, ...]:
    """The paths, each one an existing file; raises `InputError` naming the first that is not."""
    found = tuple(paths)
    for path in found:
        if not path.is_file():
            what = "is not a file" if path.exists() else "does not exist"
            raise InputError(f"{path}: {what}; {hint}")
    return found


def content(path: Path) -> bytes:
    """A file's bytes. Raises `InputError` where it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error


def unzipped(path: Path) -> bytes:
    """A file's bytes, without the gzip around them if there is one."""
    data = content(path)
    if data[:2] != b"\x1f\x8b":
        return data
    try:
        return gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: corrupt or truncated gzip: {error}; fetch the file again") from error


def expect(path: Path, data: bytes | memoryview, algorithm: str, digest: str, hint: str = LOOK_ALIKE) -> None:
    """Raises `InputError` where `data`, the content of `path`, has another digest than the known one."""
    got = hashlib.new(algorithm, data, usedforsecurity=False).hexdigest()
    if got != digest:
        raise InputError(f"{path}: corrupt or another file: expected {algorithm} {digest}, got {got}; {hint}")


def arrays(path: Path) -> dict[str, NDArray[np.generic]]:
    """All arrays of a .npz, read without unpickling. Raises `InputError` where they are not plain, or are damaged."""
    try:
        # Opened here: where NumPy opens a file itself and then refuses it, it leaves it open.
        with path.open("rb") as file:
            magic = file.read(6)
            if magic[:2] != b"PK" and magic != b"\x93NUMPY":  # NumPy would advise to unpickle it
                raise InputError(f"{path}: expected a .npz archive of named arrays, got another kind of file")
            file.seek(0)
            archive = np.load(file, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise InputError(f"{path}: expected a .npz archive of named arrays, got a single array")
            with archive:
                return {name: archive[name] for name in archive.files}
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error
    except InputError:
        raise
    except (ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"{path}: not a readable .npz of plain arrays: {error}") from error
