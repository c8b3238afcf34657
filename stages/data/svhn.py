"""Street View House Numbers, cropped digits, from the official MATLAB files."""

from pathlib import Path

import numpy as np
import torch

from stages.data._files import PLACE, content, expect, present
from stages.data._mat import load
from stages.data.base import Dataset, Source, Split, check
from stages.method import InputError

_FOLDERS = ("SVHN", "svhn", "")
_MD5 = {
    "train_32x32.mat": "e26dedcc434d2e4c54c9b2d4a06d8373",
    "test_32x32.mat": "eb5a983be6a315427106f1b164d9cef3",
}


class Svhn(Dataset):
    """73,257 house-number digits to train on, 26,032 to test on, 32x32 colour (Netzer et al., 2011).

    Reads `train_32x32.mat` and `test_32x32.mat` from SVHN, svhn or the data root itself. The files label the digit 0
    with 10; here it is 0. `original = false` reads other images in the same format, of any size.
    """

    original: bool = True

    def files(self, root: Path) -> tuple[Path, ...]:
        places = [root / folder for folder in _FOLDERS]
        folder = next((p for p in places if any((p / name).is_file() for name in _MD5)), places[0])
        return present((folder / name for name in _MD5), f"looked in SVHN, svhn and {root} itself; {PLACE}")

    def read(self, root: Path) -> Source:
        train, test = (self._part(path) for path in self.files(root))
        return Source(train, test, tuple(str(digit) for digit in range(10)))

    def _part(self, path: Path) -> Split:
        data = content(path)
        if self.original:
            expect(path, data, "md5", _MD5[path.name])
        try:
            stored = load(data)
        except ValueError as error:
            raise InputError(f"{path}: not a readable MATLAB 5 file: {error}; fetch it again") from error
        x, y = stored.get("X"), stored.get("y")
        if x is None or y is None or x.ndim != 4 or x.shape[2] != 3 or x.dtype != np.uint8:
            raise InputError(f"{path}: expected X, uint8 [H, W, 3, N], and y, got {_shapes(stored)}")
        if y.size != x.shape[3]:
            raise InputError(f"{path}: expected one label per image, got {y.size} labels for {x.shape[3]} images")
        labels = y.reshape(-1).astype(np.int64)
        if labels.min() < 1 or labels.max() > 10 or (labels != y.reshape(-1)).any():
            raise InputError(f"{path}: expected labels within 1..10, got {y.min()}..{y.max()}")
        images = torch.from_numpy(np.ascontiguousarray(x.transpose(3, 2, 0, 1)))
        return check(Split(images, torch.from_numpy(labels % 10), torch.arange(len(labels))), 10, str(path))


def _shapes(stored: dict[str, np.ndarray]) -> str:
    return ", ".join(f"{name} {a.dtype} {list(a.shape)}" for name, a in stored.items()) or "no arrays"
