"""Files that are either whole or not there."""

import os
import tempfile
from pathlib import Path


def write(path: Path, data: bytes) -> None:
    """Temporary file in the same folder, fsync, rename. Raises `OSError` and leaves nothing behind.

    A device or a pipe is written into: renamed over, /dev/null would be gone for everybody.
    """
    if path.exists() and not path.is_file():
        path.write_bytes(data)
        return
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
