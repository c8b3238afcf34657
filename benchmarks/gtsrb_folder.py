"""Write the GTSRB sheet as a folder per class of PNG files named CLASS_TRACK_FRAME.png, as the official set names them.

    python benchmarks/gtsrb_folder.py OUT [--data-root DIR]
    python -m pipeline init OUT --groups '^(\\d+_\\d+)_'

The test part is not marked: `init` and the folder reader cut their own, by track.
"""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from PIL import Image

from stages.data._files import arrays
from stages.data._image import tiles


def write(root: Path, out: Path, limit: int | None = None) -> int:
    """One PNG per tile, or the first `limit` tracks of each class; returns how many. The pixels are the sheet's."""
    sheet = tiles(root / "gtsrb" / "gtsrb32.webp", 74, 72, 32).transpose(0, 2, 3, 1)
    meta = arrays(root / "gtsrb" / "gtsrb32_meta.npz")
    rows = zip(sheet, *(meta[name].tolist() for name in ("label", "track", "frame")), strict=True)
    written = 0
    for tile, label, track, frame in rows:
        if limit is not None and track >= limit:
            continue
        folder = out / f"{label:05d}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.ascontiguousarray(tile)).save(folder / f"{label:05d}_{track:05d}_{frame:05d}.png")
        written += 1
    return written


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("out", type=Path)
    parser.add_argument("--data-root", type=Path, default=Path(os.environ.get("TEMPER_DATA") or "data"))
    args = parser.parse_args()
    print(f"{write(args.data_root, args.out)} files in {args.out}")
