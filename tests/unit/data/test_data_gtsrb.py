"""GTSRB sheets: groups are tracks, and the real ones where they are."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stages.data.gtsrb import CLASSES, Gtsrb
from stages.method import InputError
from stages.task import Task

TINY = Gtsrb(original=False)
N = 74 * 72


def write(root: Path, **changed: object) -> None:
    """A sheet of one colour per class; 30 tracks, every sixth image in the test part, by track."""
    (root / "gtsrb").mkdir(parents=True)
    label = np.arange(N) % 43
    track = np.arange(N) // 43 % 30
    colours = np.stack([label, track, label], axis=-1).reshape(74, 72, 3).astype(np.uint8)
    Image.fromarray(colours.repeat(32, 0).repeat(32, 1)).save(root / "gtsrb" / "gtsrb32.webp", lossless=True, method=0)
    meta: dict[str, object] = {
        "label": label.astype(np.uint8),
        "track": track.astype(np.uint16),
        "test": track % 6 == 0,
    }
    np.savez(root / "gtsrb" / "gtsrb32_meta.npz", **{**meta, **changed})  # type: ignore[arg-type]


def test_tiles_labels_and_tracks_stay_together(tmp_path: Path) -> None:
    write(tmp_path)
    source = TINY.read(tmp_path)
    for split in (source.train, source.test):
        assert split.groups is not None
        colours = split.images[:, :, 5, 7].long()
        assert (colours[:, 0] == split.labels).all()
        assert (split.groups == 1000 * split.labels + colours[:, 1]).all()
    assert source.classes == CLASSES
    assert len(set(CLASSES)) == 43


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"label": np.full(N, 43, np.uint8)}, r"expected labels within 0\.\.42, got 43\.\.43"),
        ({"label": np.zeros(N, np.uint8)}, "only one"),
        ({"label": np.zeros(7, np.uint8)}, 'expected "label", 5328 numbers'),
        ({"test": np.zeros(N, np.uint8)}, 'expected "test", 5328 flags'),
        ({"test": np.arange(N) >= N // 2}, "a track lies in both"),
    ],
)
def test_damaged_meta_is_refused(tmp_path: Path, changed: dict[str, object], message: str) -> None:
    write(tmp_path, **changed)
    with pytest.raises(InputError, match=rf"gtsrb32_meta\.npz: .*{message}"):
        TINY.read(tmp_path)


@pytest.mark.parametrize("name", ["gtsrb32.webp", "gtsrb32_meta.npz"])
def test_truncated_and_missing_files_are_named(tmp_path: Path, name: str) -> None:
    write(tmp_path)
    path = tmp_path / "gtsrb" / name
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match=name):
        TINY.read(tmp_path)
    path.unlink()
    with pytest.raises(InputError, match=f"{name}: does not exist"):
        TINY.files(tmp_path)


def test_another_sheet_is_refused(tmp_path: Path) -> None:
    write(tmp_path)
    with pytest.raises(InputError, match=r"gtsrb32\.webp: corrupt or another file: expected sha256"):
        Gtsrb().read(tmp_path)


@pytest.mark.data
def test_real_gtsrb_is_cut_by_track(data_root: Path) -> None:
    splits = Task.load({"data": "gtsrb", "threat": {"norm": "linf", "eps": "8/255"}}).open(data_root)
    parts = []
    for split in (splits.train, splits.holdout, splits.test):
        assert split.groups is not None
        assert set(split.labels.tolist()) == set(range(43))
        parts.append(set(split.groups.tolist()))
    assert sum(map(len, parts)) == len(set().union(*parts)) == 888
    assert (len(splits.train) + len(splits.holdout), len(splits.test)) == (4272, 1056)
    assert len(splits.holdout) == pytest.approx(427, abs=60)
