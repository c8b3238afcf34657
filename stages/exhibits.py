"""Which images an audit looks at: of a data set, a folder or a .npz, in file order or as a list says."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pipeline.core.errors import BadInput, nearest
from stages.data.arrays import Arrays
from stages.data.base import FOLDER, Dataset, Source, Split
from stages.data.folder import Folder
from stages.method import load, names
from stages.seeding import generator

_PATHS = ("arrays", "folder")
_EXAMINED = (20, 100)


@dataclass(frozen=True, slots=True)
class Images:
    """The chosen examples x [N, C, H, W] with labels y, and their places within the split, in file order.

    The network's gradients are examined on `examined`: a hundred of the examples, or, where there are fewer than 20,
    filled up with others of the split. `text` says what was chosen of what, `notes` what may not be expected.
    """

    x: Tensor
    y: Tensor
    indices: Tensor
    examined: tuple[Tensor, Tensor]
    source: Source
    text: str
    notes: tuple[str, ...]


def images(data: str, root: Path, part: str, limit: int | None, indices: Path | None, seed: int) -> Images:
    """The first `limit` images of a part ("test" or "train"), or those that the file `indices` lists, in its order."""
    dataset = _dataset(data, root)
    source = dataset.read(root)
    split = source.test if part == "test" else source.train
    notes: tuple[str, ...] = ()
    if not isinstance(dataset, Arrays | Folder) or _divided(source):
        split, what = split.select(split.indices.argsort()), f"{data} {part}"
    else:
        split, what = _whole(source), data
        notes = (f"{data} has no test part of its own: all of it is taken, and a model may have been trained on it",)
    rows = torch.arange(min(len(split), limit or len(split))) if indices is None else _listed(indices, len(split))
    count = "all" if len(rows) == len(split) else f"{len(rows)} of"
    text = f"{what}, {count} {len(split)} images"
    checked = _examined(rows, len(split), seed)
    return Images(
        split.floats(rows),
        split.labels[rows],
        rows,
        (split.floats(checked), split.labels[checked]),
        source,
        text,
        notes,
    )


def _dataset(text: str, root: Path) -> Dataset:
    """A data set by name, or a folder of pictures, or a .npz; the latter below the working folder or the data root."""
    known = [name for name in names(FOLDER) if name not in _PATHS]
    if text in known:
        return load(FOLDER, Dataset, text)  # type: ignore[type-abstract]
    path = next((place for place in (Path(text), root / text) if place.exists()), None)
    if path is None:
        raise BadInput(f'audit: --data: no data set "{text}", and no such file or folder{nearest(text, known)}')
    return Folder(path=str(path.resolve())) if path.is_dir() else Arrays(path=str(path.resolve()))


def _divided(source: Source) -> bool:
    """Does the source hold a test part? Where a reader cut one out, no index occurs twice."""
    return bool(torch.isin(source.test.indices, source.train.indices).any())


def _whole(source: Source) -> Split:
    train, test = source.train, source.test
    both = Split(
        torch.cat([train.images, test.images]),
        torch.cat([train.labels, test.labels]),
        torch.cat([train.indices, test.indices]),
    )
    return both.select(both.indices.argsort())


def _listed(path: Path, count: int) -> Tensor:
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{path}: cannot be read as text: {error}") from error
    found: dict[int, int] = {}
    for number, line in enumerate(lines, 1):
        entry = line.strip()
        if not entry:
            continue
        if not (entry.isascii() and entry.isdecimal()) or int(entry) >= count:
            raise BadInput(f'{path}: line {number}: expected a whole number from 0 to {count - 1}, got "{entry}"')
        if int(entry) in found:
            raise BadInput(f"{path}: line {number}: {entry} stands on line {found[int(entry)]} already")
        found[int(entry)] = number
    if not found:
        raise BadInput(f"{path}: expected one 0-based index a line, got none")
    return torch.tensor(list(found))


def _examined(rows: Tensor, count: int, seed: int) -> Tensor:
    least, most = _EXAMINED
    rng = generator(seed, "examined")
    some = rows[torch.randperm(len(rows), generator=rng)[:most]]
    if len(some) < least:
        others = torch.randperm(count, generator=rng)
        some = torch.cat([some, others[~torch.isin(others, some)][: least - len(some)]])
    return some.sort().values
