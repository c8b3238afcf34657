"""One way to write JSON, so that equal values have equal bytes, equal digests and equal seeds."""

import hashlib
import json
from pathlib import Path

_CHUNK = 1 << 20


def canonical(data: object) -> bytes:
    """Sorted keys, no spaces, UTF-8, no NaN; raises `ValueError` or `TypeError` on what JSON cannot hold."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def digest(data: object) -> str:
    """SHA-256 of the canonical JSON, as 64 hexadecimal digits."""
    return hashlib.sha256(canonical(data)).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, read in pieces."""
    state = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_CHUNK):
            state.update(piece)
    return state.hexdigest()


def derive_seed(root: int, *names: str | int) -> int:
    """A 63-bit seed that depends on the root seed and on every name, in order.

    `stages/seeding.py` derives in the same way, below a stage's own seed.
    """
    return int.from_bytes(hashlib.sha256(canonical(["seed", root, *names])).digest()[:8], "big") >> 1
