"""The promises of every data set in the folder, on small files in its own format."""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from stages.data.base import FOLDER, Dataset, Source, Split
from stages.method import InputError, load, names

_FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
_RNG_SEED = 0


def _noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(_RNG_SEED).integers(0, 256, shape, np.uint8)


def _mnist(root: Path) -> object:
    (root / "MNIST/raw").mkdir(parents=True)
    for part, n in (("train", 12), ("t10k", 6)):
        head = bytes([0, 0, 8, 3]) + b"".join(v.to_bytes(4, "big") for v in (n, 4, 4))
        (root / f"MNIST/raw/{part}-images-idx3-ubyte").write_bytes(head + _noise(n, 4, 4).tobytes())
        labels = bytes([0, 0, 8, 1]) + n.to_bytes(4, "big") + bytes(i % 3 for i in range(n))
        (root / f"MNIST/raw/{part}-labels-idx1-ubyte").write_bytes(labels)
    return {"kind": "mnist", "original": False}


def _cifar10(root: Path) -> object:
    (root / "cifar-10-batches-bin").mkdir()
    for name in ("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch"):
        table = np.concatenate([np.arange(4, dtype=np.uint8)[:, None], _noise(4, 3072)], axis=1)
        (root / "cifar-10-batches-bin" / f"{name}.bin").write_bytes(table.tobytes())
    return {"kind": "cifar10", "original": False}


def _cifar100(root: Path) -> object:
    (root / "cifar-100-binary").mkdir()
    for name in ("train", "test"):
        table = np.concatenate([np.arange(8, dtype=np.uint8).reshape(4, 2), _noise(4, 3072)], axis=1)
        (root / "cifar-100-binary" / f"{name}.bin").write_bytes(table.tobytes())
    return {"kind": "cifar100", "original": False}


def _svhn(root: Path) -> object:
    shutil.copytree(_FIXTURES / "svhn", root / "SVHN")
    return {"kind": "svhn", "original": False}


def _gtsrb(root: Path) -> object:
    (root / "gtsrb").mkdir()
    n = 74 * 72
    track = np.arange(n) // 43 % 5
    Image.fromarray(_noise(74, 72, 3).repeat(32, 0).repeat(32, 1)).save(root / "gtsrb/gtsrb32.webp", lossless=True)
    label = (np.arange(n) % 43).astype(np.uint8)
    np.savez(root / "gtsrb/gtsrb32_meta.npz", label=label, track=track.astype(np.uint16), test=track == 4)
    return {"kind": "gtsrb", "original": False}


def _folder(root: Path) -> object:
    for name, i in ((name, i) for name in "ab" for i in range(6)):
        (root / "own" / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(_noise(5, 5, 3) + np.uint8(i)).save(root / "own" / name / f"g{i // 2}_{i}.png")
    return {"kind": "folder", "path": "own", "groups": r"(g\d)"}


def _arrays(root: Path) -> object:
    np.savez(root / "own.npz", images=_noise(12, 4, 4, 3), labels=np.arange(12) % 3, groups=np.arange(12))
    return {"kind": "arrays", "path": "own.npz"}


# A new data set is one new file and one line here; without it the first test fails.
MAKERS: dict[str, Callable[[Path], object]] = {
    "digits": lambda _: "digits",
    "mnist": _mnist,
    "cifar10": _cifar10,
    "cifar100": _cifar100,
    "svhn": _svhn,
    "gtsrb": _gtsrb,
    "folder": _folder,
    "arrays": _arrays,
}
EVERY = pytest.mark.parametrize("kind", names(FOLDER))


def _load(data: object) -> Dataset:
    return load(FOLDER, Dataset, data)  # type: ignore[type-abstract]  # it returns a subclass


def _made(kind: str, root: Path) -> Dataset:
    return _load(MAKERS[kind](root))


def test_every_data_set_is_held_to_the_contract() -> None:
    assert set(names(FOLDER)) == set(MAKERS)


@EVERY
def test_dumps_and_loads_to_itself(kind: str, tmp_path: Path) -> None:
    data = _made(kind, tmp_path)
    assert data.kind == kind
    assert _load(data.dump()) == data
    assert (sys.modules[type(data).__module__].__doc__ or "").strip()
    assert len((type(data).__doc__ or "").split()) > 20


@EVERY
def test_unknown_settings_are_refused(kind: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown key"):
        _load({**_made(kind, tmp_path).dump(), "colour": "red"})


@EVERY
def test_images_labels_and_indices_fit(kind: str, tmp_path: Path) -> None:
    source = _made(kind, tmp_path).read(tmp_path)
    for split in (source.train, source.test):
        n = len(split)
        assert split.images.dtype == torch.uint8
        assert split.images.shape == (n, *source.train.images.shape[1:])
        assert split.images.shape[1] in (1, 3)
        assert split.images.is_contiguous()
        assert split.labels.dtype == split.indices.dtype == torch.int64
        assert 0 <= int(split.labels.min()) <= int(split.labels.max()) < len(source.classes)
        assert split.indices.tolist() == sorted(set(split.indices.tolist()))
        assert len(split.indices) == n
        for mark, dtype in ((split.groups, torch.int64), (split.inexact, torch.bool)):
            assert mark is None or (mark.dtype == dtype and mark.shape == (n,))
        floats = split.floats()
        assert floats.dtype == torch.float32
        assert torch.equal((floats * 255).round().to(torch.uint8), split.images)
    assert len(set(source.classes)) == len(source.classes)


@EVERY
def test_groups_do_not_cross_into_the_test_part(kind: str, tmp_path: Path) -> None:
    source = _made(kind, tmp_path).read(tmp_path)
    assert (source.train.groups is None) == (source.test.groups is None)
    if source.train.groups is not None and source.test.groups is not None:
        assert not set(source.train.groups.tolist()) & set(source.test.groups.tolist())


@EVERY
def test_reading_twice_gives_the_same(kind: str, tmp_path: Path) -> None:
    data = _made(kind, tmp_path)
    _same(data.read(tmp_path), data.read(tmp_path))


@EVERY
def test_files_are_complete(kind: str, tmp_path: Path) -> None:
    """A root that holds the named files and nothing else reads the same, so the cache key covers all that matters."""
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    data = _made(kind, first)
    for path in data.files(first):
        assert path.is_file()
        if path.is_relative_to(first):
            copy = second / path.relative_to(first)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copy)
    _same(data.read(first), data.read(second))


@EVERY
def test_each_file_is_read_checked_and_missed(kind: str, tmp_path: Path) -> None:
    """Cut to less than half, any file is refused by name, and so is its absence from a format of named files."""
    data = _made(kind, tmp_path)
    for path in data.files(tmp_path):
        if not path.is_relative_to(tmp_path):
            continue  # part of the package; its checksum has a test of its own
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2 - 1])
        with pytest.raises(InputError, match=path.name):
            data.read(tmp_path)
        path.unlink()
        if kind != "folder":  # of a folder's pictures, one fewer is another data set, not a fault
            with pytest.raises(InputError, match=path.name):
                data.files(tmp_path)
        path.write_bytes(whole)
    data.read(tmp_path)


def _same(one: Source, other: Source) -> None:
    assert one.classes == other.classes
    for a, b in ((one.train, other.train), (one.test, other.test)):
        for x, y in zip(_tensors(a), _tensors(b), strict=True):
            assert (x is None) == (y is None)
            assert x is None or y is None or torch.equal(x, y)


def _tensors(split: Split) -> tuple[torch.Tensor | None, ...]:
    return split.images, split.labels, split.indices, split.groups, split.inexact
