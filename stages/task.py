"""The task: which images, which threat, and how the hold-out is cut. The spec's `[task]` section, parsed once."""

from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import Field, field_validator

from stages.data._cut import cut, subset
from stages.data.base import AnyDataset, Split
from stages.method import InputError, Value
from stages.seeding import generator
from stages.threat import Threat


@dataclass(frozen=True, slots=True)
class Splits:
    """Train and hold-out are cut from the training part; the test split is read by validate and export alone."""

    train: Split
    holdout: Split
    test: Split
    classes: tuple[str, ...]

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        c, h, w = self.train.images.shape[1:]
        return c, h, w


class Task(Value):
    """Data, threat and sizes.

    `holdout` is the share of the training part that is held out, stratified, groups kept together. `train_samples`
    keeps that many images of what remains, stratified; None keeps all. Both are drawn by `split_seed` alone, not by
    the spec's seed, so runs that differ in their seed are measured on the same images.
    """

    data: AnyDataset
    threat: Threat
    holdout: float = Field(default=0.1, gt=0, lt=1)
    train_samples: int | None = Field(default=None, ge=2)
    split_seed: int = Field(default=0, ge=0)

    @field_validator("threat")
    @classmethod
    def _possible(cls, threat: Threat) -> Threat:
        if threat.eps == 0:
            raise ValueError("eps: expected more than 0, got 0; at eps 0 there is nothing to defend against")
        if threat.norm == "linf" and threat.eps > 1:
            raise ValueError(
                f"eps: expected at most 1, since pixels lie in [0, 1], got {threat.eps:g}; "
                f'did you mean "{threat.eps:g}/255"?'
            )
        if (threat.low, threat.high) != (0.0, 1.0):
            raise ValueError(
                f"low, high: expected 0 and 1, the range of pixels, got {threat.low:g} and {threat.high:g}; "
                "normalisation lies inside the network"
            )
        return threat

    def files(self, root: Path) -> tuple[Path, ...]:
        """Every file that `open` will read."""
        return self.data.files(root)

    def open(self, root: Path) -> Splits:
        """Read the data and cut the hold-out. Raises `InputError` where the data and the task do not fit together."""
        source = self.data.read(root)
        _check_reach(self.threat, source.train)
        stays, held = cut(source.train.labels, source.train.groups, self.holdout, generator(self.split_seed, "holdout"))
        if len(held) == 0:
            raise InputError("task.holdout: no class has two images (or two groups) to divide; give more data")
        train = source.train.select(stays)
        if self.train_samples is not None:
            present = int((train.labels.bincount() > 0).sum())
            if not present <= self.train_samples <= len(train):
                raise InputError(
                    f"task.train_samples: expected {present} (one per class) to {len(train)} (all that remain "
                    f"after the hold-out), got {self.train_samples}"
                )
            train = train.select(subset(train.labels, self.train_samples, generator(self.split_seed, "train_samples")))
        return Splits(train, source.train.select(held), source.test, source.classes)


def statistics(split: Split) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel over all pixels, for images in [0, 1].

    Computed from integer histograms, so the result is exact to rounding and depends on no summation order. A constant
    channel gets 1/255, so that dividing by it is safe.
    """
    levels = torch.arange(256, dtype=torch.int64)
    means, stds = [], []
    for channel in range(split.images.shape[1]):
        counts = torch.bincount(split.images[:, channel].flatten(), minlength=256)
        n, first, second = (int((counts * levels**power).sum()) for power in (0, 1, 2))
        means.append(first / n / 255)
        stds.append(max((n * second - first * first) ** 0.5 / n, 1.0) / 255)
    return tuple(means), tuple(stds)


def _check_reach(threat: Threat, split: Split) -> None:
    size = split.images[0].numel()
    farthest = {"linf": 1.0, "l2": size**0.5, "l1": float(size)}[threat.norm]
    if threat.eps > farthest:
        raise InputError(
            f"task.threat.eps: expected at most {farthest:g}, the {threat.norm} distance between a black and a white "
            f"image of this size, got {threat.eps:g}"
        )
