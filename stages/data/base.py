"""The contract of a data set: named files in, labelled uint8 images out."""

from abc import abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from stages.method import InputError, Method, polymorphic

FOLDER = "stages.data"


@dataclass(frozen=True, slots=True)
class Split:
    """Images uint8 [N, C, H, W], labels int64 [N], and each image's index in file order (unique within its part).

    `groups` int64 [N] marks near-duplicates that must not be separated; `inexact` bool [N] marks images whose pixels
    are not the original ones.
    """

    images: Tensor
    labels: Tensor
    indices: Tensor
    groups: Tensor | None = None
    inexact: Tensor | None = None

    def __len__(self) -> int:
        return self.images.shape[0]

    def select(self, rows: Tensor) -> "Split":
        """The examples at positions `rows` int64 [M], in that order."""
        return Split(
            self.images[rows],
            self.labels[rows],
            self.indices[rows],
            None if self.groups is None else self.groups[rows],
            None if self.inexact is None else self.inexact[rows],
        )

    def floats(self, rows: Tensor | slice = slice(None)) -> Tensor:
        """Float32 images in [0, 1], NCHW."""
        return to_float(self.images[rows])


def to_float(images: Tensor) -> Tensor:
    """uint8 [N, C, H, W] -> float32 in [0, 1]."""
    return images.to(torch.float32).div_(255)


@dataclass(frozen=True, slots=True)
class Source:
    """What a data set holds before the hold-out is cut: its training part, its test part, and the class names."""

    train: Split
    test: Split
    classes: tuple[str, ...]


class Dataset(Method):
    """A data set on local files. `files` is cheap and complete: the cache key covers exactly these files' bytes.

    `LIBRARIES` are distributions that decode the files; their versions are part of the cache key.
    """

    LIBRARIES: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def files(self, root: Path) -> tuple[Path, ...]:
        """Every file that `read` will open. Raises `InputError` naming the first one that is missing."""

    @abstractmethod
    def read(self, root: Path) -> Source:
        """Read and check everything. Raises `InputError` naming the file where it is corrupt."""


AnyDataset = Annotated[Dataset, *polymorphic(FOLDER, Dataset)]


def check(split: Split, classes: int, where: str) -> Split:
    """Shapes, types and label range hold, and there are at least two classes; raises `InputError` with `where`."""
    n = len(split)
    if n == 0:
        raise InputError(f"{where}: expected at least one image, got none")
    if split.images.dtype != torch.uint8 or split.images.dim() != 4:
        raise InputError(f"{where}: expected uint8 images [N, C, H, W], got {split.images.dtype} {split.images.shape}")
    if split.labels.shape != (n,):
        raise InputError(f"{where}: expected {n} labels, one per image, got {tuple(split.labels.shape)}")
    low, high = int(split.labels.min()), int(split.labels.max())
    if low < 0 or high >= classes:
        raise InputError(f"{where}: expected labels within 0..{classes - 1}, got {low}..{high}")
    if classes < 2 or low == high:
        raise InputError(f"{where}: expected at least two classes, got only one (label {low})")
    return split
