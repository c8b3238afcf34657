"""MNIST: tiny idx files in the official format, and the real ones where they are."""

import gzip
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from stages.data.mnist import Mnist
from stages.method import InputError

TINY = Mnist(original=False)
NAMES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


def idx(array: NDArray[np.uint8]) -> bytes:
    head = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    return head + array.tobytes()


def write(root: Path, zipped: bool = True, folder: str = "MNIST/raw") -> list[Path]:
    rng = np.random.default_rng(0)
    (root / folder).mkdir(parents=True)
    paths = []
    for name, n in zip(NAMES, (6, 6, 4, 4), strict=True):
        shape = (n, 5, 7) if "images" in name else (n,)
        data = idx((np.arange(n) % 3).astype(np.uint8) if len(shape) == 1 else rng.integers(0, 256, shape, np.uint8))
        path = root / folder / (f"{name}.gz" if zipped else name)
        path.write_bytes(gzip.compress(data) if zipped else data)
        paths.append(path)
    return paths


@pytest.mark.parametrize("folder", ["MNIST/raw", "MNIST", "mnist/raw", "mnist"])
@pytest.mark.parametrize("zipped", [True, False])
def test_reads_every_place_and_both_packings(tmp_path: Path, folder: str, zipped: bool) -> None:
    paths = write(tmp_path, zipped, folder)
    assert TINY.files(tmp_path) == tuple(paths)
    source = TINY.read(tmp_path)
    assert source.train.images.shape == (6, 1, 5, 7)
    want = np.random.default_rng(0).integers(0, 256, (6, 5, 7), np.uint8)
    assert np.array_equal(source.train.images[:, 0].numpy(), want)
    assert source.test.labels.tolist() == [0, 1, 2, 0]


def test_a_file_that_is_not_the_original_is_refused(tmp_path: Path) -> None:
    write(tmp_path)
    with pytest.raises(InputError, match=r"train-images-idx3-ubyte\.gz: corrupt or another file: expected md5 6bbc9"):
        Mnist().read(tmp_path)


@pytest.mark.parametrize("broken", range(4))
def test_a_missing_file_is_named(tmp_path: Path, broken: int) -> None:
    path = write(tmp_path)[broken]
    path.unlink()
    with pytest.raises(InputError, match=f"{path.name}: does not exist"):
        TINY.files(tmp_path)


def test_no_data_at_all_says_where_it_looked(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"MNIST/raw/train-images-idx3-ubyte\.gz: does not exist; looked for .* mnist"):
        TINY.files(tmp_path)


@pytest.mark.parametrize("broken", range(4))
@pytest.mark.parametrize("zipped", [True, False])
def test_a_truncated_file_is_named(tmp_path: Path, broken: int, zipped: bool) -> None:
    path = write(tmp_path, zipped)[broken]
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(InputError, match=f"{path.name}: .*truncated"):
        TINY.read(tmp_path)


@pytest.mark.parametrize("head", [b"", b"\0\0", b"\0\0\x0d\x03\0\0", b"PK\x03\x04", b"\0\0\x08\x03\0\0\0\1"])
def test_other_bytes_are_refused(tmp_path: Path, head: bytes) -> None:
    path = write(tmp_path, zipped=False)[0]
    path.write_bytes(head)
    with pytest.raises(InputError, match="train-images-idx3-ubyte: not an idx file"):
        TINY.read(tmp_path)


def test_labels_out_of_range_are_refused(tmp_path: Path) -> None:
    write(tmp_path, zipped=False)[1].write_bytes(idx(np.array([0, 1, 2, 3, 4, 10], np.uint8)))
    with pytest.raises(InputError, match=r"expected labels within 0\.\.9, got 0\.\.10"):
        TINY.read(tmp_path)


def test_fewer_labels_than_images_are_refused(tmp_path: Path) -> None:
    write(tmp_path, zipped=False)[1].write_bytes(idx(np.array([0, 1, 2], np.uint8)))
    with pytest.raises(InputError, match="expected 6 labels"):
        TINY.read(tmp_path)


def test_exchanged_files_are_refused(tmp_path: Path) -> None:
    images, labels, *_ = write(tmp_path, zipped=False)
    images_data, labels_data = images.read_bytes(), labels.read_bytes()
    images.write_bytes(labels_data)
    labels.write_bytes(images_data)
    with pytest.raises(InputError, match="exchanged"):
        TINY.read(tmp_path)


@pytest.mark.data
def test_real_mnist(data_root: Path) -> None:
    source = Mnist().read(data_root)
    assert source.train.labels.bincount().tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert source.test.labels.bincount().tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert float(source.train.images.double().mean() / 255) == pytest.approx(0.1307, abs=5e-5)
