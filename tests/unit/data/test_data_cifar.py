"""CIFAR-10 and CIFAR-100: tiny binary files, tiny sheets, and the real sheets where they are."""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from stages.data import cifar10
from stages.data.cifar10 import Cifar10
from stages.data.cifar100 import _COARSE, CLASSES, Cifar100
from stages.method import InputError

TINY10, TINY100 = Cifar10(original=False), Cifar100(original=False)
BATCHES = ("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch")


def records(labels: NDArray[np.uint8], seed: int) -> tuple[bytes, NDArray[np.uint8]]:
    """A binary file and its pixels, [N, 3, 32, 32]; `labels` is [N, 1] or [N, 2]."""
    pixels = np.random.default_rng(seed).integers(0, 256, (len(labels), 3, 32, 32), np.uint8)
    return np.concatenate([labels, pixels.reshape(len(labels), -1)], axis=1).tobytes(), pixels


def write10(root: Path, folder: str = "cifar-10-batches-bin") -> NDArray[np.uint8]:
    (root / folder).mkdir(parents=True)
    pixels = []
    for seed, batch in enumerate(BATCHES):
        data, x = records(np.array([[0], [seed], [9]], np.uint8), seed)
        (root / folder / f"{batch}.bin").write_bytes(data)
        pixels.append(x)
    return np.concatenate(pixels)


def write100(root: Path, coarse_of: int = 0) -> None:
    folder = root / "cifar-100-binary"
    folder.mkdir(parents=True)
    for name in ("train", "test"):
        labels = np.array([[_COARSE[k] + coarse_of, k] for k in (0, 99, 7)], np.uint8)
        (folder / f"{name}.bin").write_bytes(records(labels, 0)[0])


def write_sheets(root: Path, side: int = 3200) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Sheets whose tile i is filled with the colour (i % 256, i // 256, batch)."""
    folder = root / "cifar10"
    folder.mkdir()
    tile = np.arange(10_000).reshape(100, 100)
    for number, batch in enumerate(BATCHES):
        colours = np.stack([tile % 256, tile // 256, np.full_like(tile, number)], axis=-1).astype(np.uint8)
        Image.fromarray(colours.repeat(32, 0).repeat(32, 1)[:side]).save(
            folder / f"{batch}.webp", lossless=True, method=0
        )
    labels, exact = (np.arange(60_000) % 10).astype(np.uint8), np.ones(60_000, np.bool_)
    exact[[3, 50_004]] = False
    np.savez(folder / "labels.npz", labels=labels, exact=exact)
    return labels, exact


@pytest.mark.parametrize("folder", cifar10._BINARY)
def test_binary_batches_keep_file_order(tmp_path: Path, folder: str) -> None:
    pixels = write10(tmp_path, folder)
    source = TINY10.read(tmp_path)
    assert np.array_equal(source.train.images.numpy(), pixels[:15])
    assert np.array_equal(source.test.images.numpy(), pixels[15:])
    assert source.train.labels.tolist() == [0, 0, 9, 0, 1, 9, 0, 2, 9, 0, 3, 9, 0, 4, 9]
    assert source.test.inexact is not None
    assert not source.test.inexact.any()


def test_sheets_keep_file_order_and_flag_the_inexact(tmp_path: Path) -> None:
    labels, _ = write_sheets(tmp_path)
    source = TINY10.read(tmp_path)
    assert source.train.images.shape == (50_000, 3, 32, 32)
    for i in (0, 1, 257, 9_999, 10_000, 49_999):
        want = [i % 10_000 % 256, i % 10_000 // 256, i // 10_000]
        assert source.train.images[i].flatten(1).float().mean(1).tolist() == want
    assert np.array_equal(source.test.labels.numpy(), labels[50_000:])
    assert source.train.inexact is not None
    assert source.train.inexact.nonzero().flatten().tolist() == [3]
    assert source.test.inexact is not None
    assert source.test.inexact.nonzero().flatten().tolist() == [4]


def test_another_sheet_than_the_known_one_is_refused(tmp_path: Path) -> None:
    write_sheets(tmp_path, side=64)
    with pytest.raises(InputError, match=r"data_batch_1\.webp: corrupt or another file: expected sha256 be07"):
        Cifar10().read(tmp_path)


def test_a_sheet_of_another_size_is_refused(tmp_path: Path) -> None:
    write_sheets(tmp_path, side=64)
    with pytest.raises(InputError, match=r"data_batch_1\.webp: expected an RGB sheet of 3200 x 3200 .* 3200 x 64"):
        TINY10.read(tmp_path)


def test_labels_of_the_wrong_kind_are_refused(tmp_path: Path) -> None:
    write_sheets(tmp_path, side=64)
    np.savez(tmp_path / "cifar10" / "labels.npz", labels=np.zeros(60_000))
    with pytest.raises(InputError, match=r"labels\.npz: expected labels \(uint8\) and exact"):
        TINY10.read(tmp_path)


def test_the_originals_number_of_records_is_asked_for(tmp_path: Path) -> None:
    write10(tmp_path)
    with pytest.raises(InputError, match=r"data_batch_1\.bin: expected 10000 records .* got 3"):
        Cifar10().read(tmp_path)


@pytest.mark.parametrize("length", [0, 100, 3072, 3073 * 3 - 1])
def test_truncated_batches_are_named(tmp_path: Path, length: int) -> None:
    write10(tmp_path)
    path = tmp_path / "cifar-10-batches-bin" / "test_batch.bin"
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(InputError, match=r"test_batch\.bin: truncated"):
        TINY10.read(tmp_path)


def test_cifar10_label_out_of_range_names_its_file(tmp_path: Path) -> None:
    write10(tmp_path)
    path = tmp_path / "cifar-10-batches-bin" / "data_batch_4.bin"
    path.write_bytes(b"\x0a" + path.read_bytes()[1:])
    with pytest.raises(InputError, match=r"data_batch_4\.bin: expected labels within 0\.\.9, got 10"):
        TINY10.read(tmp_path)


@pytest.mark.parametrize("name", ["data_batch_3.bin", "test_batch.bin"])
def test_a_missing_batch_is_named_even_where_sheets_are(tmp_path: Path, name: str) -> None:
    write10(tmp_path)
    (tmp_path / "cifar-10-batches-bin" / name).unlink()
    with pytest.raises(InputError, match=f"{name}: does not exist"):
        TINY10.files(tmp_path)


def test_cifar100_reads_the_fine_label(tmp_path: Path) -> None:
    write100(tmp_path)
    source = TINY100.read(tmp_path)
    assert source.train.labels.tolist() == [0, 99, 7]
    assert [source.classes[k] for k in (0, 7, 99)] == ["apple", "beetle", "worm"]
    assert len(set(CLASSES)) == 100
    assert list(CLASSES) == sorted(CLASSES)


def test_cifar100_superclasses_have_five_classes_each() -> None:
    assert np.bincount(_COARSE).tolist() == [5] * 20
    # Published members of three superclasses, by name.
    by_name = {k: {c for c, s in zip(CLASSES, _COARSE, strict=True) if s == k} for k in (1, 14, 17)}
    assert by_name[1] == {"aquarium_fish", "flatfish", "ray", "shark", "trout"}
    assert by_name[14] == {"baby", "boy", "girl", "man", "woman"}
    assert by_name[17] == {"maple_tree", "oak_tree", "palm_tree", "pine_tree", "willow_tree"}


def _write_full100(path: Path, count: int, wrong: tuple[int, int] | None = None) -> None:
    fine = np.arange(count) % 100
    table = np.zeros((count, 3074), np.uint8)
    table[:, 0], table[:, 1] = np.asarray(_COARSE)[fine], fine
    if wrong is not None:
        table[wrong[0], 0] = wrong[1]
    path.write_bytes(table.tobytes())


def test_cifar100_original_checks_catch_shifted_labels(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-100-binary"
    folder.mkdir()
    _write_full100(folder / "test.bin", 10_000, wrong=(105, 3))
    split = Cifar100()
    with pytest.raises(InputError, match=r'test\.bin: corrupt: record 105: "bed" belongs to superclass 6, got 3'):
        split._part(folder / "test.bin", 10_000)
    _write_full100(folder / "test.bin", 10_000)
    assert len(split._part(folder / "test.bin", 10_000)) == 10_000


def test_cifar100_label_out_of_range(tmp_path: Path) -> None:
    write100(tmp_path)
    path = tmp_path / "cifar-100-binary" / "train.bin"
    path.write_bytes(b"\0\x64" + path.read_bytes()[2:])
    with pytest.raises(InputError, match=r"train\.bin: expected labels within 0\.\.99, got 7\.\.100"):
        TINY100.read(tmp_path)


@pytest.mark.data
def test_real_cifar10(data_root: Path) -> None:
    source = Cifar10().read(data_root)
    assert source.test.labels.bincount().tolist() == [1000] * 10
    assert source.train.inexact is not None
    assert source.test.inexact is not None
    assert (int(source.train.inexact.sum()), int(source.test.inexact.sum())) == (72, 20)
    assert source.test.inexact.nonzero().flatten().tolist()[:3] == [1259, 1369, 1422]
    means = [float(source.train.images[:, c].double().mean() / 255) for c in range(3)]
    assert means == pytest.approx([0.4914, 0.4822, 0.4465], abs=1e-4)
