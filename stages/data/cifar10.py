"""CIFAR-10 from the official binary files, or from lossless sheets."""

from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stages.data._cifar import records
from stages.data._files import LOOK_ALIKE, PLACE, arrays, content, expect, present
from stages.data._image import tiles
from stages.data.base import Dataset, Source, Split, check
from stages.method import InputError

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_BINARY = ("cifar-10-batches-bin", "cifar10/cifar-10-batches-bin")
_BATCHES = ("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch")
_SHEET_SHA256 = {
    "data_batch_1.webp": "be07d284e29905f3c4a65320995f89e5e540a47b827de77a1d069d332df5a062",
    "data_batch_2.webp": "e87571dfbaa192764144cbb986c4df4332217ed371af70bf60099355b9d605e1",
    "data_batch_3.webp": "0393549413a605200b52e532bb662c2407195742e8f185c58de7eb507d063b72",
    "data_batch_4.webp": "1ed4ceb3c635f2965aaeb63395b61a041d1e8ed0c4150fbe57865c907b3de104",
    "data_batch_5.webp": "6514029910954e6548863094ec7827531b34d4544e6554a088f8a6810740c17c",
    "test_batch.webp": "110ab725da0ff2d4eaec28a5ac330b1ee4f62c79f6e7be904e9fab5e528f672d",
    "labels.npz": "6cdf1de5caa9ecba78ea8351d06c96d2ff679cd1dfd7170edaec8402905670e4",
}
_LABELS_SHA256 = "3edb456524d5918aefded81f5aef7c32efab2a788211df998a4eb0c8957baa1f"
_TRAIN = 5


class Cifar10(Dataset):
    """50,000 photographs to train on, 10,000 to test on, 32x32 colour, ten classes (Krizhevsky, 2009).

    The official `cifar-10-batches-bin` is taken where it is there (file sizes and all labels are held against the
    originals; no checksum of its pixels is known to us). Else `cifar10/` holds one lossless WebP sheet per batch of
    100 x 100 tiles, and `labels.npz`; there the images whose pixels are not the original ones are kept at their place
    and flagged as inexact. Both are in file order. `original = false` reads other images in the same formats.
    """

    LIBRARIES: ClassVar[tuple[str, ...]] = ("pillow",)

    original: bool = True

    def files(self, root: Path) -> tuple[Path, ...]:
        binary = _binary(root)
        if binary is not None:
            return present(binary / f"{batch}.bin" for batch in _BATCHES)
        hint = f"looked for {_BINARY[0]} and for cifar10/*.webp in {root}; {PLACE}"
        return present((root / "cifar10" / name for name in _SHEET_SHA256), hint)

    def read(self, root: Path) -> Source:
        paths = self.files(root)
        if _binary(root) is None:
            images, labels, inexact = self._sheets(paths)
        else:
            images, labels = self._batches(paths)
            inexact = [torch.zeros(len(part), dtype=torch.bool) for part in images]
        if self.original:
            expect(paths[-1].parent, np.concatenate(labels).tobytes(), "sha256", _LABELS_SHA256)
        train = _part(images[:_TRAIN], labels[:_TRAIN], inexact[:_TRAIN])
        test = _part(images[_TRAIN:], labels[_TRAIN:], inexact[_TRAIN:])
        where = str(paths[0].parent)
        return Source(check(train, 10, where), check(test, 10, where), CLASSES)

    def _batches(self, paths: tuple[Path, ...]) -> tuple[list[NDArray[np.uint8]], list[NDArray[np.uint8]]]:
        read = [records(path, 1, 10_000 if self.original else None) for path in paths]
        for path, (labels, _) in zip(paths, read, strict=True):
            if labels.max() > 9:
                raise InputError(f"{path}: expected labels within 0..9, got {labels.max()}")
        return [images for _, images in read], [labels[:, 0] for labels, _ in read]

    def _sheets(self, paths: tuple[Path, ...]) -> tuple[list[NDArray[np.uint8]], list[NDArray[np.uint8]], list[Tensor]]:
        if self.original:
            for path in paths:
                expect(path, content(path), "sha256", _SHEET_SHA256[path.name])
        stored = arrays(paths[-1])
        labels, exact = stored.get("labels"), stored.get("exact")
        if labels is None or exact is None or labels.dtype != np.uint8 or exact.dtype != np.bool_:
            raise InputError(
                f"{paths[-1]}: expected labels (uint8) and exact (bool), got {sorted(stored)}; {LOOK_ALIKE}"
            )
        if labels.shape != (60_000,) or exact.shape != (60_000,):
            raise InputError(f"{paths[-1]}: expected 60000 labels and flags, got {labels.shape} and {exact.shape}")
        images = [tiles(path, 100, 100, 32) for path in paths[:-1]]
        return images, np.split(labels, 6), [torch.from_numpy(~part) for part in np.split(exact, 6)]


def _binary(root: Path) -> Path | None:
    return next((root / folder for folder in _BINARY if (root / folder).is_dir()), None)


def _part(images: list[NDArray[np.uint8]], labels: list[NDArray[np.uint8]], inexact: list[Tensor]) -> Split:
    y = torch.from_numpy(np.concatenate(labels).astype(np.int64))
    return Split(torch.from_numpy(np.concatenate(images)), y, torch.arange(len(y)), inexact=torch.cat(inexact))
