"""Opening what the user has on disk: every failure is one sentence that names the file."""

import hashlib
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from stages.method import InputError


def present(paths: Iterable[Path], hint: str) -> tuple[Path, ...]:
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


def expect(path: Path, data: bytes, algorithm: str, digest: str, hint: str) -> None:
    """Raises `InputError` where `data`, the content of `path`, has another digest than the known one."""
    got = hashlib.new(algorithm, data, usedforsecurity=False).hexdigest()
    if got != digest:
        raise InputError(f"{path}: corrupt: expected {algorithm} {digest}, got {got}; {hint}")


def arrays(path: Path, wanted: Iterable[str] | None = None) -> dict[str, NDArray[np.generic]]:
    """The arrays of a .npz, read without pickling; `wanted` are read where present, None reads all.

    Raises `InputError` where the file is not an archive of plain arrays, or is damaged.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise InputError(f"{path}: expected a .npz archive of arrays, got a single array")
            return {name: archive[name] for name in archive.files if wanted is None or name in set(wanted)}
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"{path}: not a readable .npz of plain arrays: {error}") from error
