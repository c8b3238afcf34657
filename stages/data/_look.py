"""What a first look at a data set says: counts, copies, look-alike neighbours, balance."""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from stages.data.base import Split

_BURST = 0.5


@dataclass(frozen=True, slots=True)
class Look:
    """`counts` per class; `extreme` is the share of pixels near black or white; `copies` counts images that repeat an
    earlier one, `contradictions` those whose twin has another label, `leaks` test images that are also trained on.
    `neighbours` is how far files lie from the next one of their class, as a share of the distance of random pairs.
    """

    counts: tuple[int, ...]
    extreme: float
    copies: int
    contradictions: int
    leaks: int
    neighbours: float

    @property
    def bursts(self) -> bool:
        """True where neighbours look so alike that files seem to come in series of one thing.

        The bound is ours: the share is 0.3 on the tracks of GTSRB, 0.7 on digits sorted by writer, 0.95 and more on
        MNIST and CIFAR-10.
        """
        return self.neighbours < _BURST


def look(train: Split, holdout: Split, test: Split, classes: int) -> Look:
    """Exact copies are found by their pixels; distances are between 8x8 grey thumbnails, in file order."""
    trained = _in_file_order(train, holdout)
    seen: dict[bytes, int] = {}
    copies = contradictions = leaks = 0
    for part, split in enumerate((trained, test)):
        before = set(seen)
        for image, label in zip(split.images.numpy(), split.labels.tolist(), strict=True):
            key = image.tobytes()
            if key in seen:
                copies += 1
                contradictions += seen[key] != label
                leaks += part == 1 and key in before
            else:
                seen[key] = label
    pixels = np.bincount(trained.images.numpy().reshape(-1), minlength=256)
    extreme = float((pixels[:32].sum() + pixels[224:].sum()) / pixels.sum())
    counts = torch.cat([trained.labels, test.labels]).bincount(minlength=classes)
    return Look(tuple(counts.tolist()), extreme, copies, contradictions, leaks, _neighbours(trained, classes))


def _in_file_order(*parts: Split) -> Split:
    images, labels, indices = (
        torch.cat([getattr(part, name) for part in parts]) for name in ("images", "labels", "indices")
    )
    return Split(images, labels, indices).select(indices.argsort())


def _neighbours(split: Split, classes: int) -> float:
    """Median distance of neighbours in a class over that of pairs half the class apart; 1 where there are too few."""
    thumbs = F.adaptive_avg_pool2d(split.images.float().mean(1, keepdim=True), 8).flatten(1)
    near: list[Tensor] = []
    far: list[Tensor] = []
    for rows in (thumbs[split.labels == c] for c in range(classes)):
        half = len(rows) // 2
        if half >= 2:
            near += [(a - b).abs().mean() for a, b in pairwise(rows)]
            far += [(a - b).abs().mean() for a, b in zip(rows[:half], rows[half:], strict=False)]
    if not far or float(torch.stack(far).median()) == 0:
        return 1.0
    return float(torch.stack(near).median() / torch.stack(far).median())
