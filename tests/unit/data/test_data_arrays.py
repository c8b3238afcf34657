"""One .npz: layouts, types, splits, and every way in which it is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from stages.data.arrays import Arrays
from stages.method import InputError

X = np.random.default_rng(0).integers(0, 256, (12, 6, 5, 3), np.uint8)
Y = np.arange(12) % 3
DATA = Arrays(path="own.npz", test=0.25)


def save(root: Path, **arrays: Any) -> Path:
    path = root / "own.npz"
    np.savez(path, **{"images": X, "labels": Y, **arrays})
    return path


def images(root: Path, data: Arrays = DATA) -> torch.Tensor:
    """All images, in file order."""
    source = data.read(root)
    both = torch.cat([source.train.images, source.test.images])
    return both[torch.cat([source.train.indices, source.test.indices]).argsort()]


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("axes", [(0, 1, 2, 3), (0, 3, 1, 2)])
def test_layouts_and_types_give_the_same_bytes(tmp_path: Path, dtype: type, axes: tuple[int, ...]) -> None:
    want = torch.from_numpy(X).permute(0, 3, 1, 2)
    save(tmp_path, images=X.transpose(axes))
    assert torch.equal(images(tmp_path), want)
    save(tmp_path, images=(X.transpose(axes).astype(np.float64) / 255).astype(dtype))
    assert torch.equal(images(tmp_path), want)


def test_grey_images_need_no_channel_axis(tmp_path: Path) -> None:
    save(tmp_path, images=X[..., 0])
    assert torch.equal(images(tmp_path), torch.from_numpy(X[..., 0]).unsqueeze(1))


def test_ambiguous_layout_is_asked_for(tmp_path: Path) -> None:
    x = np.random.default_rng(1).integers(0, 256, (12, 3, 8, 3), np.uint8)
    save(tmp_path, images=x)
    with pytest.raises(InputError, match='may be NHWC or NCHW; set layout = "NHWC"'):
        DATA.read(tmp_path)
    nhwc, nchw = (images(tmp_path, Arrays(path="own.npz", layout=o)) for o in ("NHWC", "NCHW"))
    assert torch.equal(nchw, torch.from_numpy(x))
    assert torch.equal(nhwc, torch.from_numpy(x).permute(0, 3, 1, 2))


def test_cut_is_stratified_and_groups_are_whole(tmp_path: Path) -> None:
    save(tmp_path)
    assert DATA.read(tmp_path).test.labels.bincount().tolist() == [1, 1, 1]
    groups = np.array([f"burst {i // 3 // 2}-{i % 3}" for i in range(12)])
    save(tmp_path, groups=groups)
    source = DATA.read(tmp_path)
    assert source.train.groups is not None
    assert source.test.groups is not None
    assert not set(source.train.groups.tolist()) & set(source.test.groups.tolist())


def test_test_arrays_are_taken_as_they_are(tmp_path: Path) -> None:
    save(tmp_path, test_images=X[:3], test_labels=Y[:3])
    source = DATA.read(tmp_path)
    assert (len(source.train), len(source.test)) == (12, 3)


def test_class_names_come_from_field_array_or_number(tmp_path: Path) -> None:
    save(tmp_path)
    assert DATA.read(tmp_path).classes == ("0", "1", "2")
    save(tmp_path, classes=np.array(["cat", "dog", "eel"]))
    assert DATA.read(tmp_path).classes == ("cat", "dog", "eel")
    assert Arrays(path="own.npz", classes=("x", "y", "z")).read(tmp_path).classes == ("x", "y", "z")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": X.astype(np.float32)}, r"expected floats in \[0, 1\], got 0\.\.255; store 0\.\.255 as uint8"),
        ({"images": X.astype(np.float32) / 256}, "expected multiples of 1/255"),
        ({"images": np.full(X.shape, np.nan)}, r"expected floats in \[0, 1\], got nan"),
        ({"images": X.astype(np.int64)}, r"expected uint8 or floats .* got int64; store \.astype\(np\.uint8\)"),
        ({"images": X[..., :2]}, "with 1 or 3 channels"),
        ({"images": X[0, 0]}, "with 1 or 3 channels"),
        ({"images": X[:0]}, "with 1 or 3 channels"),
        ({"labels": Y[:5]}, "expected 12 labels, one per image"),
        ({"labels": Y.astype(float)}, r"labels: expected whole numbers \[N\], got float64"),
        ({"labels": np.zeros(12, int)}, "at least two classes"),
        ({"labels": np.where(Y == 2, 7, Y)}, "up to 7, but none is 2"),
        ({"labels": Y - 1}, "from 0 on, got -1"),
        ({"classes": np.array(["a", "b"])}, r"expected labels within 0\.\.1, got 0\.\.2"),
        ({"classes": np.array([1, 2, 3])}, "classes: expected a list of names"),
        ({"groups": np.arange(5)}, r"groups: expected one per image, 12, got \(5,\)"),
        ({"group": np.arange(12)}, 'unknown array "group"; did you mean "groups"'),
        ({"test_images": X}, 'no array "test_labels"'),
        ({"test_images": X[:, :4], "test_labels": Y}, r"test_images: expected images of shape \[3, 6, 5\]"),
    ],
)
def test_what_cannot_be_used_is_refused(tmp_path: Path, arrays: dict[str, NDArray[Any]], message: str) -> None:
    save(tmp_path, **arrays)
    with pytest.raises(InputError, match=rf"own\.npz: .*{message}"):
        DATA.read(tmp_path)


def test_objects_are_never_unpickled(tmp_path: Path) -> None:
    np.savez(tmp_path / "own.npz", images=X, labels=np.array([{}] * 12, dtype=object))
    with pytest.raises(InputError, match=r"own\.npz: not a readable \.npz of plain arrays"):
        DATA.read(tmp_path)


@pytest.mark.parametrize("keep", [0, 10, 500, -40])
def test_truncated_archives_are_named(tmp_path: Path, keep: int) -> None:
    path = save(tmp_path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputError, match=r"own\.npz"):
        DATA.read(tmp_path)


def test_a_flipped_byte_is_noticed(tmp_path: Path) -> None:
    path = save(tmp_path)
    data = bytearray(path.read_bytes())
    data[600] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"own\.npz: not a readable"):
        DATA.read(tmp_path)


def test_a_single_array_and_a_missing_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"own\.npz: does not exist; a relative path is looked for below"):
        DATA.files(tmp_path)
    with (tmp_path / "own.npz").open("wb") as file:
        np.save(file, X)
    with pytest.raises(InputError, match=r"own\.npz: .*\.npz"):
        DATA.read(tmp_path)
