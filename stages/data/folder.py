"""A folder per class: the user's own pictures."""

import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, field_validator
from torch import Tensor

from stages.data._cut import cut
from stages.data._image import SUFFIXES, pixels
from stages.data.base import Dataset, Source, Split, check
from stages.method import InputError
from stages.seeding import generator

_PARTS = ("train", "test")
_SEPARATOR = "\0"


class Folder(Dataset):
    """Pictures in `path/CLASS/...`, or in `path/train/CLASS/...` and `path/test/CLASS/...`; classes sorted by name.

    `path` is absolute, or relative to the data root. `size` resizes every picture to a square of that many pixels;
    without it all pictures must be of one size. Where every picture is grey the images have one channel, else three.
    `groups` is a regular expression that is searched for in a file's path below its class folder; what its groups
    catch names the set of near-duplicates (one burst, one sign, one patient) that must not be divided. Without
    `train/` and `test/`, the share `test` becomes the test part: stratified, groups whole, drawn by `split_seed`.
    Hidden files are passed over; any other file that is no picture is refused.
    """

    LIBRARIES: ClassVar[tuple[str, ...]] = ("pillow",)

    path: str = Field(min_length=1)
    size: int | None = Field(default=None, ge=4, le=1024)
    groups: str | None = None
    test: float = Field(default=0.2, gt=0, lt=1)
    split_seed: int = Field(default=0, ge=0)

    @field_validator("groups")
    @classmethod
    def _catches(cls, pattern: str | None) -> str | None:
        if pattern is not None:
            try:
                caught = re.compile(pattern).groups
            except re.error as error:
                raise ValueError(f'groups: "{pattern}" is not a regular expression: {error}') from None
            if caught == 0:
                raise ValueError(f'groups: expected at least one group in parentheses, got none in "{pattern}"')
        return pattern

    def files(self, root: Path) -> tuple[Path, ...]:
        return tuple(path for listing in self._listings(root).values() for paths in listing.values() for path in paths)

    def read(self, root: Path) -> Source:
        listings = self._listings(root)
        classes = tuple(listings["train"])
        parts, names = [], []
        for part, listing in listings.items():
            unknown = sorted(set(listing) - set(classes))
            if unknown:
                raise InputError(f'{self._base(root) / part}: class "{unknown[0]}" is not in train/')
            labels = [classes.index(name) for name, paths in listing.items() for _ in paths]
            parts.append((_load([p for paths in listing.values() for p in paths], self.size), torch.tensor(labels)))
            names.append(self._groups(root, part if len(listings) == 2 else "", listing))
        depth = max(len(image) for images, _ in parts for image in images)
        shape = parts[0][0][0].shape[1:]
        if parts[-1][0][0].shape[1:] != shape:
            raise InputError(f"{self._base(root) / 'test'}: expected pictures of the size of train/'s; set size")
        number = {name: i for i, name in enumerate(sorted({name for part in names for name in part}))}
        splits = [
            check(
                Split(
                    _stack(images, depth),
                    labels,
                    torch.arange(len(labels)),
                    torch.tensor([number[n] for n in caught]) if self.groups is not None else None,
                ),
                len(classes),
                str(self._base(root)),
            )
            for (images, labels), caught in zip(parts, names, strict=True)
        ]
        if len(splits) == 2:
            crossing = sorted(set(names[0]) & set(names[1]))
            if crossing:
                raise InputError(
                    f'{self._base(root)}: group "{_shown(crossing[0])}" has pictures in both train/ and test/'
                )
            return Source(splits[0], splits[1], classes)
        stays, held = cut(splits[0].labels, splits[0].groups, self.test, generator(self.split_seed, "test"))
        where = f"{self._base(root)}: the test part of {len(held)} pictures"
        return Source(splits[0].select(stays), check(splits[0].select(held), len(classes), where), classes)

    def _base(self, root: Path) -> Path:
        return root / Path(self.path).expanduser()

    def _listings(self, root: Path) -> dict[str, dict[str, list[Path]]]:
        """Part -> class -> its pictures, all in order of their names."""
        base = self._base(root)
        if not base.is_dir():
            what = "is not a folder" if base.exists() else "does not exist"
            raise InputError(f"{base}: {what}; a relative path is looked for below the data root ({root})")
        try:
            inside = {entry.name for entry in base.iterdir() if entry.is_dir() and entry.name[0] != "."}
            if set(_PARTS) <= inside:
                if len(inside) > 2:
                    others = ", ".join(sorted(inside - set(_PARTS)))
                    raise InputError(f"{base}: has train/ and test/ and beside them {others}; move that elsewhere")
                return {part: _classes(base / part) for part in _PARTS}
            return {"train": _classes(base)}
        except OSError as error:
            raise InputError(f"{error.filename or base}: cannot be read: {error.strerror or error}") from error

    def _groups(self, root: Path, part: str, listing: dict[str, list[Path]]) -> list[str]:
        if self.groups is None:
            return []
        pattern, found = re.compile(self.groups), []
        for name, paths in listing.items():
            for path in paths:
                inner = path.relative_to(self._base(root) / part / name).as_posix()
                match = pattern.search(inner)
                if match is None:
                    raise InputError(f'{path}: "{inner}" does not match the group pattern "{self.groups}"')
                found.append(_SEPARATOR.join(text or "" for text in match.groups()))
        return found


def _shown(group: str) -> str:
    return group.replace(_SEPARATOR, ", ")


def _classes(base: Path) -> dict[str, list[Path]]:
    stray = sorted(p for p in base.iterdir() if not p.is_dir() and p.name[0] != ".")
    if stray:
        raise InputError(f"{stray[0]}: expected folders only, one per class, got a file; move it elsewhere")
    folders = sorted(p for p in base.iterdir() if p.is_dir() and p.name[0] != ".")
    if len(folders) < 2:
        raise InputError(f"{base}: expected a folder for each of at least two classes, got {len(folders)}")
    found = {folder.name: list(_pictures(folder)) for folder in folders}
    empty = [name for name, paths in found.items() if not paths]
    if empty:
        raise InputError(f"{base / empty[0]}: expected pictures of this class, got none")
    return found


def _pictures(folder: Path) -> Iterator[Path]:
    for place, folders, names in os.walk(folder, onerror=_raise):
        folders[:] = sorted(f for f in folders if f[0] != ".")
        for name in sorted(n for n in names if n[0] != "."):
            if not name.lower().endswith(SUFFIXES):
                raise InputError(f"{Path(place, name)}: not a picture ({' '.join(SUFFIXES)}); move it elsewhere")
            yield Path(place, name)


def _raise(error: OSError) -> None:
    raise error


def _load(paths: list[Path], size: int | None) -> list[NDArray[np.uint8]]:
    """uint8 [C, H, W] of each file; C is 1 or 3, H and W are the same for all."""
    with ThreadPoolExecutor() as pool:
        images = [image.transpose(2, 0, 1) for image in pool.map(partial(pixels, size=size), paths)]
    for path, image in zip(paths, images, strict=True):
        if image.shape[1:] != images[0].shape[1:]:
            (h, w), (h0, w0) = image.shape[1:], images[0].shape[1:]
            raise InputError(f"{path}: {w} x {h} pixels, but {paths[0].name} has {w0} x {h0}; set size to resize all")
    return images


def _stack(images: list[NDArray[np.uint8]], depth: int) -> Tensor:
    whole = np.empty((len(images), depth, *images[0].shape[1:]), np.uint8)
    for row, image in zip(whole, images, strict=True):
        row[:] = image
    return torch.from_numpy(whole)
