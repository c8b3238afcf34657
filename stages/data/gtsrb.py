"""German traffic signs, 32x32, from one lossless sheet; split by track."""

from pathlib import Path
from typing import ClassVar

import numpy as np
import torch

from stages.data._files import LOOK_ALIKE, PLACE, arrays, content, expect, present
from stages.data._image import tiles
from stages.data.base import Dataset, Source, Split, check
from stages.method import InputError

# The official names, shortened.
CLASSES = (
    *(f"speed limit {kmh}" for kmh in (20, 30, 50, 60, 70, 80)),
    *("end of speed limit 80", "speed limit 100", "speed limit 120", "no passing", "no passing for lorries"),
    *("right of way at crossing", "priority road", "yield", "stop", "no vehicles", "no lorries", "no entry"),
    *("danger", "curve left", "curve right", "double curve", "bumpy road", "slippery road", "road narrows"),
    *("road works", "traffic lights", "pedestrians", "children", "bicycles", "ice or snow", "wild animals"),
    *("end of all limits", "turn right", "turn left", "ahead only", "ahead or right", "ahead or left"),
    *("keep right", "keep left", "roundabout", "end of no passing", "end of no passing for lorries"),
)
_SHA256 = {
    "gtsrb32.webp": "783f06bd038c97581308a89568420177e5adaa9a3c22c7e2c6d9e93bb1a70273",
    "gtsrb32_meta.npz": "ab4926d49432a6c1eb50e6f0f72088bf50a9af65bf81ebd5100a2fb6a44dfd8e",
}
_ROWS, _COLUMNS = 74, 72
_N = _ROWS * _COLUMNS


class Gtsrb(Dataset):
    """4,272 sign crops to train on, 1,056 to test on, 32x32 colour, 43 classes (Stallkamp et al., 2012).

    A part of the official training set: six frames of each of 888 tracks. A track is one physical sign photographed as
    the car nears it; its frames are near-duplicates, so both the test part and every later cut go by track (`groups`).
    The official test set is not here; numbers do not compare with its leaderboard.
    """

    LIBRARIES: ClassVar[tuple[str, ...]] = ("pillow",)

    original: bool = True

    def files(self, root: Path) -> tuple[Path, ...]:
        return present((root / "gtsrb" / name for name in _SHA256), f"looked for gtsrb/ in {root}; {PLACE}")

    def read(self, root: Path) -> Source:
        sheet, meta = paths = self.files(root)
        if self.original:
            for path in paths:
                expect(path, content(path), "sha256", _SHA256[path.name])
        stored = arrays(meta)
        for name, kind in (("label", "u"), ("track", "u"), ("test", "b")):
            found = stored.get(name)
            if found is None or found.shape != (_N,) or found.dtype.kind != kind:
                raise InputError(
                    f'{meta}: expected "{name}", {_N} {"flags" if kind == "b" else "numbers"}; {LOOK_ALIKE}'
                )
        labels = torch.from_numpy(stored["label"].astype(np.int64))
        groups = labels * 1000 + torch.from_numpy(stored["track"].astype(np.int64))
        test = torch.from_numpy(stored["test"])
        if len(np.intersect1d(groups[test].numpy(), groups[~test].numpy())):
            raise InputError(f"{meta}: a track lies in both the training and the test part; {LOOK_ALIKE}")
        whole = Split(torch.from_numpy(tiles(sheet, _ROWS, _COLUMNS, 32)), labels, torch.arange(_N), groups)
        check(whole, len(CLASSES), str(meta))
        train, held = (whole.select(rows.nonzero().flatten()) for rows in (~test, test))
        return Source(check(train, len(CLASSES), str(meta)), check(held, len(CLASSES), str(meta)), CLASSES)
