"""`init PATH`: look at the user's data and write a spec in which every line is explained."""

from __future__ import annotations

import argparse
import json
import os
import re
import tomllib
from pathlib import Path
from statistics import median

from pydantic import ValidationError

from pipeline.core.errors import BadInput, nearest
from stages.data._image import dimensions
from stages.data._look import Look, look
from stages.data.arrays import Arrays
from stages.data.base import Dataset
from stages.data.folder import Folder
from stages.method import InputError
from stages.nn._atomic import write
from stages.task import Splits, Task
from stages.threat import Threat

_SIDES = (16, 24, 32, 48, 64)
_TARGETS = Path(__file__).resolve().parent.parent / "targets"


def run(args: argparse.Namespace) -> int:
    """Look, warn, write. Raises `BadInput` for data or options that cannot be used."""
    targets = sorted(path.stem for path in _TARGETS.glob("*.py") if path.stem[0] != "_")
    if args.target not in targets:
        raise BadInput(f'init: unknown target "{args.target}"{nearest(args.target, targets)}')
    if args.out.exists() and not args.force:
        raise BadInput(f"{args.out}: is there already; --force overwrites it, --out chooses another place")
    root = (args.data_root or Path(os.environ.get("TEMPER_DATA") or "data")).resolve()
    try:
        data = _dataset(args, root)
        splits = Task(data=data, threat=Threat(norm="linf", eps=8 / 255)).open(root)
    except InputError as error:
        raise BadInput(f"init: {error}") from error
    except ValidationError as error:
        raise BadInput(f"init: {error.errors()[0]['msg'].removeprefix('Value error, ')}") from error
    _, height, width = splits.input_shape
    if min(height, width) < 4:
        raise BadInput(
            f"{args.path}: expected pictures of at least 4x4 pixels, got {width}x{height}; enlarge them first"
        )
    seen = look(splits.train, splits.holdout, splits.test, len(splits.classes))
    warnings = _warnings(seen, splits, data)
    name = args.name or re.sub(r"[^A-Za-z0-9._-]+", "-", args.path.resolve().stem).strip("-._") or "own"
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise BadInput(f'init: --name: expected letters, digits, ".", "_" and "-", got "{name}"')
    text = spec_text(name, args.target, data, splits, seen, warnings)
    Task.load(tomllib.loads(text)["task"])
    try:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write(args.out, text.encode())
    except OSError as error:
        raise BadInput(
            f"{args.out}: cannot be written: {error.strerror or error}; choose a place with --out"
        ) from error
    print("\n".join(_summary(splits, seen)))
    for warning in warnings:
        print(f"warning: {warning}")
    print(f"wrote {args.out}; set its budgets, then: python -m pipeline build {args.out}")
    return 0


def spec_text(name: str, target: str, data: Dataset, splits: Splits, seen: Look, warnings: list[str]) -> str:
    """A spec that loads as it stands."""
    channels, height, width = splits.input_shape
    side, trained = max(height, width), len(splits.train)
    eps, why = _eps(channels, side, seen)
    epochs = _epochs(trained, side)
    arch = '{ builder = "small_cnn", width = 32 }' if channels == 1 or side < 16 else '{ builder = "wrn" }'
    crop = f"augment = {{ crop = {side // 8} }}   # shifts by up to so many pixels; flip = true mirrors, too\n"
    chance = max(seen.counts) / sum(seen.counts)
    notes = "".join(f"# warning: {warning}\n" for warning in warnings)
    return f"""\
# {name}: {sum(seen.counts)} images, {len(splits.classes)} classes, {width}x{height}, {_colour(channels)}.
name = {_quote(name)}   # the run's folder is runs/{name}-{target}
target = {_quote(target)}   # the device; `python -m pipeline list targets` shows them
seed = 0   # everything random follows from it

[task]
{notes}# Where the images are: an absolute path, or one below the data root (--data-root, TEMPER_DATA, ./data).
data = {_table(data)}
# What an attacker may do: {why}
threat = {{ norm = "linf", eps = {_quote(eps)} }}
holdout = 0.1   # share of the training part that is kept for measuring; the test part is read at the end only

[stages.search]
kind = "fixed"   # take the network below; "random_search" looks for a better one
arch = {arch}   # a builder and its options; `list builders` shows them

[stages.train]
kind = "at"   # adversarial training; "trades" trades clean accuracy for robustness, "fast" is quicker
epochs = {epochs}   # for {trained} images of this size; more rarely hurts, halve it for a first try
{crop if side >= 16 else ""}
[stages.compress]
kind = "prune"   # takes channels away and trains on; "fixed" leaves the network as it is
tune_epochs = {max(3, epochs // 3)}   # of further training after pruning
attempts = [{{ ratio = 0.5 }}, {{ ratio = 0.25 }}]   # boldest first; the first that passes its gate is taken

[stages.validate]
samples = {min(1000, len(splits.test))}   # test images that are attacked, of {len(splits.test)}

# Budgets decide whether a build passes. The numbers below are PLACEHOLDERS that ask for next to nothing: set what your
# product needs. An accuracy is held against the low end of its 95 % interval, so few images make a harder test.
[[budget.train]]
metric = "accuracy.robust.holdout"   # under a quick attack, on the hold-out
at_least = 0.0   # placeholder: asks for nothing

[[budget.compress]]
metric = "accuracy.robust.holdout"   # the same after compression
at_least = 0.0   # placeholder: set it to what compression may leave, and bolder attempts are refused

[[budget.validate]]
metric = "accuracy.clean.test"   # without an attack
at_least = {_up(chance)}   # placeholder: the commonest class is {chance:.0%} of the images

[[budget.validate]]
metric = "accuracy.robust.test"   # under the worst of all attacks, image by image
at_least = 0.0   # placeholder: asks for nothing

[[budget.export]]
metric = "accuracy.robust.shipped.holdout"   # of the very file that ships
at_least = 0.0   # placeholder: asks for nothing

# `python -m pipeline ci --baseline record.json` fails where a metric fell by more than this.
[[regression.validate]]
metric = "accuracy.robust.test"   # any metric that the stage measures
max_loss = 0.02   # placeholder: two points
"""


def _dataset(args: argparse.Namespace, root: Path) -> Dataset:
    path = args.path.resolve()
    if not path.exists():
        raise InputError(f"{args.path}: does not exist; expected a folder with a folder per class, or a .npz file")
    place = path.relative_to(root).as_posix() if path.is_relative_to(root) and path != root else str(path)
    if path.is_dir():
        plain = Folder(path=place, groups=args.groups, size=args.size)
        return plain if args.size is not None else plain.model_copy(update={"size": _side(plain.files(root))})
    if args.groups is not None or args.size is not None:
        raise InputError(
            f'{args.path}: --groups and --size are for folders; a .npz has an array "groups", and one size'
        )
    return Arrays(path=place)


def _side(files: tuple[Path, ...]) -> int | None:
    """The pictures' own size where they are all alike and small; else the usual side nearest to their median."""
    sizes = {dimensions(path) for path in files}
    if len(sizes) == 1 and max(next(iter(sizes))) <= _SIDES[-1]:
        width, height = next(iter(sizes))
        return width if width == height else None
    middle = median(min(dimensions(path)) for path in files)
    return min(_SIDES, key=lambda side: abs(side - middle))


def _eps(channels: int, side: int, seen: Look) -> tuple[str, str]:
    if channels == 1 and seen.extreme >= 0.6:
        eps = "0.1" if side < 20 else "0.2"
        return eps, f"change each pixel by up to {eps} of the range\n# (ink on paper bears 0.1 to 0.3; 0.3 is MNIST's)."
    return "8/255", "change each pixel by up to 8 of 255 levels, the usual\n# amount for photographs; 4/255 is easier."


def _epochs(images: int, side: int) -> int:
    """About 150,000 images seen, fewer where they are large; 10 to 60 epochs."""
    return min(60, max(10, round(150_000 / images * min(1.0, (32 / side) ** 2))))


def _warnings(seen: Look, splits: Splits, data: Dataset) -> list[str]:
    found = []
    fewest, most = min(seen.counts), max(seen.counts)
    if seen.contradictions:
        found.append(f"{seen.contradictions} images are exact copies of an image with another label")
    if seen.leaks:
        found.append(f"{seen.leaks} test images are exact copies of training images; test accuracy will flatter")
    elif seen.copies:
        found.append(f"{seen.copies} images are exact copies of others")
    if seen.bursts and splits.train.groups is None:
        how = "give --groups REGEX" if isinstance(data, Folder) else 'add an array "groups"'
        found.append(f"neighbouring images look alike, as in a burst or a film; {how}, or copies will cross the split")
    if most > 10 * fewest:
        found.append(f'unbalanced: "{_name(splits, seen, most)}" has {most}, "{_name(splits, seen, fewest)}" {fewest}')
    if fewest < 20:
        found.append(f'"{_name(splits, seen, fewest)}" has only {fewest} images; its accuracy will say little')
    return found


def _summary(splits: Splits, seen: Look) -> list[str]:
    channels, height, width = splits.input_shape
    rows = sorted(zip(seen.counts, splits.classes, strict=True), reverse=True)
    shown = rows if len(rows) <= 12 else [*rows[:5], *rows[-5:]]
    lines = [f"{sum(seen.counts)} images, {len(rows)} classes, {width}x{height}, {_colour(channels)}"]
    lines += [f"  {count:>7} {name}" for count, name in shown]
    if len(shown) < len(rows):
        lines.insert(6, f"      ... {len(rows) - 10} classes between")
    parts = f"{len(splits.train)} to train, {len(splits.holdout)} hold-out, {len(splits.test)} test"
    if splits.train.groups is not None:
        parts += f"; {len(set(splits.train.groups.tolist()))} groups to train on, none divided"
    return [*lines, parts]


def _name(splits: Splits, seen: Look, count: int) -> str:
    return splits.classes[seen.counts.index(count)]


def _colour(channels: int) -> str:
    return "grey" if channels == 1 else "colour"


def _up(share: float) -> float:
    return min(0.99, int(share * 100 + 1) / 100)


def _table(data: Dataset) -> str:
    kept = {k: v for k, v in data.dump().items() if k in ("kind", "path", "size", "groups") and v is not None}
    return "{ " + ", ".join(f"{k} = {_quote(v) if isinstance(v, str) else v}" for k, v in kept.items()) + " }"


def _quote(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
