"""SVHN and its MATLAB files: two written by scipy (`tests/fixtures/svhn`), the rest built by hand."""

import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from stages.data._mat import load
from stages.data.svhn import Svhn
from stages.method import InputError

FIXTURES = Path(__file__).resolve().parents[2] / "fixtures" / "svhn"
TINY = Svhn(original=False)


def element(kind: int, body: bytes, order: str = "<", small: bool = False) -> bytes:
    if small:
        return struct.pack(order + "I", len(body) << 16 | kind) + body.ljust(4, b"\0")
    return struct.pack(order + "II", kind, len(body)) + body + b"\0" * (-len(body) % 8)


def matrix(
    name: str, array: NDArray[np.generic], mat_class: int, stored: str, kind: int, order: str = "<", small: bool = False
) -> bytes:
    """An array of class `mat_class` whose numbers are stored in another type."""
    body = element(6, struct.pack(order + "II", mat_class, 0), order)
    body += element(5, struct.pack(f"{order}{array.ndim}i", *array.shape), order)
    body += element(1, name.encode(), order, small=len(name) <= 4)
    body += element(kind, array.astype(order + stored).tobytes(order="F"), order, small)
    return element(14, body, order)


def mat(*elements: bytes, order: str = "<") -> bytes:
    mark = b"IM" if order == "<" else b"MI"
    return b"MATLAB 5.0 MAT-file".ljust(124) + struct.pack(order + "H", 0x0100) + mark + b"".join(elements)


def packed(inner: bytes) -> bytes:
    data = zlib.compress(inner)
    return struct.pack("<II", 15, len(data)) + data


def pair(labels: list[int], order: str = "<") -> bytes:
    x = np.arange(4 * 5 * 3 * len(labels)).astype(np.uint8).reshape(4, 5, 3, len(labels))
    y = np.array(labels).reshape(-1, 1)
    return mat(matrix("X", x, 9, "u1", 2, order), matrix("y", y, 6, "u1", 2, order, len(labels) <= 4), order=order)


def place(root: Path, train: bytes, test: bytes | None = None) -> None:
    (root / "SVHN").mkdir()
    (root / "SVHN" / "train_32x32.mat").write_bytes(train)
    (root / "SVHN" / "test_32x32.mat").write_bytes(pair([1, 2]) if test is None else test)


@pytest.mark.parametrize("folder", ["SVHN", "svhn", ""])
def test_files_written_by_scipy(tmp_path: Path, folder: str) -> None:
    """One compressed, one plain; pixels and sums as printed when they were written."""
    shutil.copytree(FIXTURES, tmp_path / folder, dirs_exist_ok=True)
    source = TINY.read(tmp_path)
    assert source.train.images.shape == (12, 3, 8, 8)
    assert source.test.images.shape == (6, 3, 8, 8)
    train, test = source.train.images, source.test.images
    assert (int(train[0, 0, 1, 2]), int(train[11, 2, 0, 0]), int(train[3, 1, 7, 0])) == (234, 44, 199)
    assert (int(test[0, 0, 1, 2]), int(test[5, 2, 0, 0]), int(test[3, 1, 7, 0])) == (163, 252, 212)
    assert int(train.long().sum()) == 290784
    assert source.train.labels.tolist() == [8, 9, 0] * 4


def test_numbers_stored_smaller_than_their_class() -> None:
    """MATLAB stores doubles that are small whole numbers as bytes; four of them fit into the tag itself."""
    y = np.array([[1.0], [2.0], [10.0]])
    for small in (False, True):
        found = load(mat(matrix("y", y, 6, "u1", 2, small=small)))["y"]
        assert found.dtype == np.float64
        assert found.tolist() == y.tolist()


def test_big_endian_files_and_names_of_any_length(tmp_path: Path) -> None:
    place(tmp_path, pair([1, 10, 3], ">"), pair([1, 10, 3]))
    source = TINY.read(tmp_path)
    assert (source.train.images == source.test.images).all()
    assert source.train.labels.tolist() == [1, 0, 3]
    wide = np.arange(6, dtype=np.int32).reshape(2, 3)
    assert load(mat(matrix("longer_name", wide, 12, "i4", 5, ">"), order=">"))["longer_name"].tolist() == wide.tolist()


def test_other_variables_are_passed_over() -> None:
    cell = element(14, element(6, struct.pack("<II", 1, 0)) + element(5, struct.pack("<2i", 0, 0)) + element(1, b"c"))
    numbers = matrix("n", np.ones((1, 1)), 6, "f8", 9)
    assert list(load(mat(cell, packed(numbers)))) == ["n"]


def test_unknown_file_is_refused_by_checksum(tmp_path: Path) -> None:
    place(tmp_path, pair([1, 2]))
    with pytest.raises(InputError, match=r"train_32x32\.mat: corrupt or another file: expected md5 e26d"):
        Svhn().read(tmp_path)


@pytest.mark.parametrize("labels", [[0, 1, 2], [1, 2, 11]])
def test_svhn_labels_out_of_range(tmp_path: Path, labels: list[int]) -> None:
    place(tmp_path, pair(labels))
    with pytest.raises(InputError, match=r"train_32x32\.mat: expected labels within 1\.\.10"):
        TINY.read(tmp_path)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "no MATLAB 5 header"),
        (b"MATLAB 7.3 MAT-file".ljust(124) + b"\0\2IM" + b"\x89HDF", "not version 5"),
        (mat(), "expected X, uint8 .* got no arrays"),
        (mat(matrix("X", np.ones((2, 2)), 6, "f8", 9)), "expected X, uint8 .* got X float64"),
        (mat(packed(b"")[:-2]), "cut short"),
        (mat(struct.pack("<II", 15, 4) + b"abcd"), "damaged compressed data"),
        (mat(b"\1\2\3"), "cut short within a tag"),
        (mat(element(14, b"")), "without flags"),
        (mat(matrix("X", np.ones((2, 2)), 6, "f8", 99)), "without numbers"),
    ],
)
def test_what_is_no_such_file_is_refused(tmp_path: Path, data: bytes, message: str) -> None:
    place(tmp_path, data)
    with pytest.raises(InputError, match=rf"train_32x32\.mat: .*{message}"):
        TINY.read(tmp_path)


@pytest.mark.parametrize("part", ["train", "test"])
def test_every_truncation_is_noticed(tmp_path: Path, part: str) -> None:
    whole = (FIXTURES / f"{part}_32x32.mat").read_bytes()
    shutil.copytree(FIXTURES, tmp_path, dirs_exist_ok=True)
    for length in range(0, len(whole) - 8, 97):
        (tmp_path / f"{part}_32x32.mat").write_bytes(whole[:length])
        with pytest.raises(InputError, match=rf"{part}_32x32\.mat"):
            TINY.read(tmp_path)


def test_a_label_too_few_is_refused(tmp_path: Path) -> None:
    x = np.zeros((4, 4, 3, 3), np.uint8)
    place(tmp_path, mat(matrix("X", x, 9, "u1", 2), matrix("y", np.array([[1], [2]]), 9, "u1", 2)))
    with pytest.raises(InputError, match="2 labels for 3 images"):
        TINY.read(tmp_path)
