"""A first look: counts, copies, leaks, bursts; thresholds against the real sets where they are."""

from pathlib import Path

import pytest
import torch

from stages.data._look import look
from stages.data.base import Dataset, Split
from stages.data.digits import Digits
from stages.data.gtsrb import Gtsrb
from stages.data.mnist import Mnist
from stages.seeding import generator


def _split(values: list[int], labels: list[int], first: int = 0) -> Split:
    images = torch.tensor(values, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 8, 8).contiguous()
    return Split(images, torch.tensor(labels), torch.arange(first, first + len(labels)))


def test_copies_contradictions_and_leaks_are_counted() -> None:
    train = _split([1, 2, 2, 3], [0, 0, 1, 1])
    holdout = _split([1], [0], first=4)
    test = _split([3, 9, 9, 4], [1, 0, 0, 1])
    seen = look(train, holdout, test, 2)
    assert (seen.copies, seen.contradictions, seen.leaks) == (4, 1, 1)
    assert seen.counts == (5, 4)
    assert seen.extreme == 1.0


def test_bursts_are_noticed_in_file_order_whatever_the_cut() -> None:
    """Ten scenes of six nearly equal frames; rows shuffled, indices telling the order."""
    rng = generator(0, "bursts")
    scenes = torch.randint(40, 200, (10, 1, 8, 8), generator=rng).repeat_interleave(6, 0)
    images = (scenes + torch.randint(0, 9, (60, 1, 8, 8), generator=rng)).to(torch.uint8)
    whole = Split(images, torch.zeros(60).long(), torch.arange(60))
    rows = torch.randperm(60, generator=rng)
    assert look(whole.select(rows[:40]), whole.select(rows[40:50]), whole.select(rows[50:]), 1).bursts
    mixed = Split(images[rows], whole.labels, whole.indices)
    order = torch.arange(60)
    assert not look(mixed.select(order[:40]), mixed.select(order[40:50]), mixed.select(order[50:]), 1).bursts


@pytest.mark.data
@pytest.mark.parametrize(("data", "bursts"), [(Digits(), False), (Mnist(), False), (Gtsrb(), True)])
def test_real_sets_lie_on_the_right_side(data_root: Path, data: Dataset, bursts: bool) -> None:
    source = data.read(data_root)
    train = source.train.select(torch.arange(min(4000, len(source.train))))
    seen = look(train, train.select(torch.arange(0)), source.test, len(source.classes))
    assert seen.bursts is bursts
    assert seen.leaks == 0
