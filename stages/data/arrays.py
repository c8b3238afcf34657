"""One .npz of images and labels."""

import difflib
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from stages.data._cut import cut
from stages.data._files import arrays, present
from stages.data.base import Dataset, Source, Split, check
from stages.method import InputError
from stages.seeding import generator

Layout = Literal["auto", "NHWC", "NCHW"]
_NAMES = ("images", "labels", "groups", "test_images", "test_labels", "classes")


class Arrays(Dataset):
    """`images` and `labels` of a .npz; also `test_images` and `test_labels`, `groups`, `classes`, where they are there.

    `path` is absolute, or relative to the data root. Images are [N, H, W], [N, H, W, C] or [N, C, H, W] with one or
    three channels, uint8, or floats in [0, 1] that are multiples of 1/255. Labels are whole numbers from 0 on.
    `groups` [N], numbers or text, marks near-duplicates that must not be divided. Class names are the field, else the
    array, else the numbers; without names, every number up to the largest must occur. Without `test_images`, the share
    `test` becomes the test part: stratified, groups whole, drawn by `split_seed`. Nothing is unpickled.
    """

    path: str = Field(min_length=1)
    layout: Layout = "auto"
    classes: tuple[str, ...] | None = None
    test: float = Field(default=0.2, gt=0, lt=1)
    split_seed: int = Field(default=0, ge=0)

    def files(self, root: Path) -> tuple[Path, ...]:
        path = root / Path(self.path).expanduser()
        return present([path], f"a relative path is looked for below the data root ({root})")

    def read(self, root: Path) -> Source:
        (path,) = self.files(root)
        stored = arrays(path)
        _check_names(path, stored)
        labels = _labels(path, "labels", stored)
        classes = self._classes(path, stored, labels)
        split = self._split(path, "", stored, labels, len(classes))
        if "groups" in stored:
            groups = stored["groups"]
            if groups.shape != (len(split),):
                raise InputError(f"{path}: groups: expected one per image, {len(split)}, got {groups.shape}")
            numbers = torch.from_numpy(np.unique(groups, return_inverse=True)[1].reshape(-1).astype(np.int64))
            split = Split(split.images, split.labels, split.indices, numbers)
        if "test_images" in stored:
            test = self._split(path, "test_", stored, _labels(path, "test_labels", stored), len(classes))
            if test.images.shape[1:] != split.images.shape[1:]:
                want, got = list(split.images.shape[1:]), list(test.images.shape[1:])
                raise InputError(f"{path}: test_images: expected images of shape {want}, got {got}")
            return Source(split, test, classes)
        stays, held = cut(split.labels, split.groups, self.test, generator(self.split_seed, "test"))
        where = f"{path}: the test part of {len(held)} images"
        return Source(split.select(stays), check(split.select(held), len(classes), where), classes)

    def _split(
        self, path: Path, prefix: str, stored: dict[str, NDArray[np.generic]], labels: Tensor, classes: int
    ) -> Split:
        images = _images(f"{path}: {prefix}images", stored[f"{prefix}images"], self.layout)
        return check(Split(images, labels, torch.arange(len(images))), classes, f"{path}: {prefix}labels")

    def _classes(self, path: Path, stored: dict[str, NDArray[np.generic]], labels: Tensor) -> tuple[str, ...]:
        if self.classes is not None:
            return self.classes
        if "classes" in stored:
            if stored["classes"].ndim != 1 or stored["classes"].dtype.kind != "U":
                raise InputError(f"{path}: classes: expected a list of names, got {stored['classes'].dtype}")
            return tuple(str(name) for name in stored["classes"])
        low, high = int(labels.min()), int(labels.max())
        if low < 0:
            raise InputError(f"{path}: labels: expected numbers from 0 on, got {low}")
        seen = np.unique(labels.numpy())
        if len(seen) != high + 1:
            missing = next(i for i, k in enumerate(seen) if i != k)
            raise InputError(f"{path}: labels: up to {high}, but none is {missing}; name the classes or renumber")
        return tuple(str(k) for k in range(high + 1))


def _check_names(path: Path, stored: dict[str, NDArray[np.generic]]) -> None:
    for name in stored:
        if name not in _NAMES:
            close = difflib.get_close_matches(name, _NAMES, n=1)
            hint = f'did you mean "{close[0]}"?' if close else f"it may hold {', '.join(_NAMES)}"
            raise InputError(f'{path}: unknown array "{name}"; {hint}')
    needed = ["images", "labels"]
    needed += ["test_images", "test_labels"] if {"test_images", "test_labels"} & set(stored) else []
    for name in needed:
        if name not in stored:
            raise InputError(f'{path}: no array "{name}"; there is {", ".join(stored) or "none"}')


def _labels(path: Path, name: str, stored: dict[str, NDArray[np.generic]]) -> Tensor:
    values = stored[name]
    if values.ndim == 2 and values.shape[1] == 1:
        values = values[:, 0]
    if values.ndim != 1 or values.dtype.kind not in "iu" or len(values) == 0:
        raise InputError(f"{path}: {name}: expected whole numbers [N], got {values.dtype} {list(values.shape)}")
    return torch.from_numpy(values.astype(np.int64))


def _images(where: str, values: NDArray[np.generic], layout: Layout) -> Tensor:
    if values.ndim == 3:
        values = values[:, None]
    elif values.ndim == 4:
        first, last = values.shape[1] in (1, 3), values.shape[3] in (1, 3)
        if layout == "auto" and first and last:
            raise InputError(f'{where}: {list(values.shape)} may be NHWC or NCHW; set layout = "NHWC" or "NCHW"')
        if layout == "NHWC" or (layout == "auto" and last):
            values = values.transpose(0, 3, 1, 2)
    if values.ndim != 4 or values.shape[1] not in (1, 3) or values.size == 0:
        raise InputError(
            f"{where}: expected [N, H, W], [N, H, W, C] or [N, C, H, W] with 1 or 3 channels, got {list(values.shape)}"
        )
    return torch.from_numpy(np.ascontiguousarray(_bytes(where, values)))


def _bytes(where: str, values: NDArray[np.generic]) -> NDArray[np.uint8]:
    if values.dtype == np.uint8:
        return values.astype(np.uint8, copy=False)
    if values.dtype.kind != "f":
        raise InputError(f"{where}: expected uint8 or floats in [0, 1], got {values.dtype}; store .astype(np.uint8)")
    scaled = values.astype(np.float64) * 255
    if not np.isfinite(scaled).all() or scaled.min() < 0 or scaled.max() > 255:
        low, high = float(np.min(values.astype(np.float64))), float(np.max(values.astype(np.float64)))
        raise InputError(f"{where}: expected floats in [0, 1], got {low:g}..{high:g}; store 0..255 as uint8")
    nearest = np.rint(scaled)
    # A multiple of 1/255 is off by at most half a unit in the last place of its own type.
    off = float(np.abs(scaled - nearest).max())
    if off > max(1e-3, 255 * float(np.finfo(str(values.dtype)).eps)):
        raise InputError(
            f"{where}: expected multiples of 1/255 (8-bit images), got values {off:.3g} of a step away; "
            "round them: (255 * x).round().astype(np.uint8)"
        )
    return nearest.astype(np.uint8)
