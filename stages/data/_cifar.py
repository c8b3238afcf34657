"""The CIFAR binary record: one or two label bytes, then 3,072 pixel bytes, channel by channel, row by row."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from stages.data._files import LOOK_ALIKE, content
from stages.method import InputError

_PIXELS = 3 * 32 * 32


def records(path: Path, labels: int, count: int | None) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Label bytes uint8 [N, labels] and images uint8 [N, 3, 32, 32]. Raises `InputError` unless N is `count`."""
    data = content(path)
    size = labels + _PIXELS
    if len(data) == 0 or len(data) % size:
        raise InputError(f"{path}: truncated: expected records of {size} bytes, got {len(data)} bytes")
    table = np.frombuffer(data, np.uint8).reshape(-1, size)
    if count is not None and len(table) != count:
        raise InputError(f"{path}: expected {count} records of {size} bytes, got {len(table)}; {LOOK_ALIKE}")
    return table[:, :labels].copy(), table[:, labels:].reshape(-1, 3, 32, 32)
