"""MNIST from its four idx files, gzipped or not."""

from math import prod
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from stages.data._files import expect, present, unzipped
from stages.data.base import Dataset, Source, Split, check
from stages.method import InputError

_FOLDERS = ("MNIST/raw", "MNIST", "mnist/raw", "mnist")
# MD5 of the unpacked content, so that a file is known whether or not, and however, it is gzipped.
_FILES = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}


class Mnist(Dataset):
    """60,000 handwritten digits to train on, 10,000 to test on, 28x28 grey (LeCun, Cortes and Burges, 1998).

    The files are looked for in MNIST/raw, MNIST, mnist/raw and mnist under the data root, with or without `.gz`.
    `original = false` reads other images in the same format: any size, classes still 0..9.
    """

    original: bool = True

    def files(self, root: Path) -> tuple[Path, ...]:
        folders = [root / folder for folder in _FOLDERS]
        folder = next((f for f in folders if any(p.is_file() for name in _FILES for p in _spellings(f, name))), None)
        if folder is None:
            names = ", ".join(_FOLDERS)
            return present([folders[0] / f"{next(iter(_FILES))}.gz"], f"looked for the idx files in {names} of {root}")
        return present(
            next((p for p in _spellings(folder, name) if p.is_file()), folder / f"{name}.gz") for name in _FILES
        )

    def read(self, root: Path) -> Source:
        paths = self.files(root)
        parts = []
        for path, md5 in zip(paths, _FILES.values(), strict=True):
            data = unzipped(path)
            if self.original:
                expect(path, data, "md5", md5)
            parts.append(_idx(path, data))
        train, test = _split(paths[0], *parts[:2]), _split(paths[2], *parts[2:])
        if train.images.shape[1:] != test.images.shape[1:]:
            raise InputError(f"{paths[2]}: expected images of the size of {paths[0].name}, got another")
        return Source(train, test, tuple(str(digit) for digit in range(10)))


def _spellings(folder: Path, name: str) -> tuple[Path, ...]:
    dotted = name.replace("-idx", ".idx")
    return tuple(folder / spelling for spelling in (f"{name}.gz", name, f"{dotted}.gz", dotted))


def _idx(path: Path, data: bytes) -> NDArray[np.uint8]:
    """The idx format: two zero bytes, 8 for uint8, the number of axes, each length as big-endian uint32, the data."""
    axes = data[3] if len(data) >= 4 else 0
    if data[:3] != b"\0\0\x08" or axes not in (1, 3) or len(data) < 4 + 4 * axes:
        raise InputError(f"{path}: not an idx file of bytes: it starts with {data[:4].hex(' ') or 'nothing'}")
    shape = tuple(int.from_bytes(data[4 + 4 * i : 8 + 4 * i], "big") for i in range(axes))
    start = 4 + 4 * axes
    if len(data) - start != prod(shape):
        raise InputError(f"{path}: truncated: expected {prod(shape)} bytes for {shape}, got {len(data) - start}")
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


def _split(path: Path, images: NDArray[np.uint8], labels: NDArray[np.uint8]) -> Split:
    if images.ndim != 3 or labels.ndim != 1:
        raise InputError(f"{path}: expected images with three axes and labels with one, got the files exchanged")
    x = torch.from_numpy(images.copy()).unsqueeze(1)
    return check(Split(x, torch.from_numpy(labels.astype(np.int64)), torch.arange(len(x))), 10, str(path))
