"""The task: hold-out, subsets and statistics, on real digits and on cases small enough to check by hand."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from stages.data._cut import cut, subset
from stages.data.base import Split
from stages.method import InputError
from stages.seeding import generator
from stages.task import Task, statistics

LINF = {"norm": "linf", "eps": "0.1"}
NOWHERE = Path("nowhere")


def _task(**fields: object) -> Task:
    return Task.load({"data": "digits", "threat": LINF, **fields})


def test_digits_splits_are_disjoint_and_complete() -> None:
    splits = _task().open(NOWHERE)
    parts = [set(split.indices.tolist()) for split in (splits.train, splits.holdout, splits.test)]
    assert sum(len(part) for part in parts) == len(set().union(*parts)) == 1797
    assert splits.input_shape == (1, 8, 8)
    assert splits.classes == tuple("0123456789")


def test_holdout_is_stratified() -> None:
    splits = _task(holdout=0.2).open(NOWHERE)
    both = torch.stack([splits.train.labels.bincount(), splits.holdout.labels.bincount()]).double()
    assert ((both[1] / both.sum(0) - 0.2).abs() < 0.5 / both.sum(0)).all()


def test_split_depends_on_its_seed_alone() -> None:
    first, again, other = (_task(split_seed=s).open(NOWHERE) for s in (0, 0, 1))
    assert torch.equal(first.holdout.indices, again.holdout.indices)
    assert torch.equal(first.train.images, again.train.images)
    assert not torch.equal(first.holdout.indices, other.holdout.indices)
    assert torch.equal(first.test.indices, other.test.indices)


def test_train_samples_leave_the_holdout_alone() -> None:
    whole, few = _task().open(NOWHERE), _task(train_samples=100).open(NOWHERE)
    assert len(few.train) == 100
    assert few.train.labels.bincount().tolist() == [10] * 10
    assert torch.equal(few.holdout.indices, whole.holdout.indices)
    assert set(few.train.indices.tolist()) <= set(whole.train.indices.tolist())


@pytest.mark.parametrize("count", [9, 1158])
def test_impossible_train_samples_are_refused(count: int) -> None:
    with pytest.raises(InputError, match=r"train_samples: expected 10 .* to 1157 .*, got"):
        _task(train_samples=count).open(NOWHERE)


@pytest.mark.parametrize(
    ("threat", "message"),
    [
        ({"norm": "linf", "eps": 0}, "more than 0"),
        ({"norm": "linf", "eps": 8}, 'did you mean "8/255"'),
        ({"norm": "linf", "eps": -0.1}, "greater than or equal to 0"),
        ({"norm": "linf", "eps": float("nan")}, "finite|greater than"),
        ({"norm": "l2", "eps": 1, "low": -1}, "range of pixels"),
        ({"norm": "l7", "eps": 1}, "'linf', 'l2' or 'l1'"),
    ],
)
def test_impossible_threats_are_refused(threat: dict[str, object], message: str) -> None:
    with pytest.raises((ValidationError, InputError), match=message):
        _task(threat=threat)


def test_an_l2_ball_larger_than_the_pixel_cube_is_refused() -> None:
    assert _task(threat={"norm": "l2", "eps": 8}).open(NOWHERE).input_shape == (1, 8, 8)
    with pytest.raises(InputError, match="at most 8, the l2 distance"):
        _task(threat={"norm": "l2", "eps": 8.01}).open(NOWHERE)


def test_statistics_equal_the_definition() -> None:
    images = torch.randint(0, 256, (7, 3, 5, 4), generator=generator(0, "x"), dtype=torch.uint8)
    mean, std = statistics(Split(images, torch.zeros(7).long(), torch.arange(7)))
    x = images.double() / 255
    assert mean == pytest.approx(x.mean((0, 2, 3)).tolist(), rel=1e-12)
    assert std == pytest.approx(x.std((0, 2, 3), correction=0).tolist(), rel=1e-12)


def test_a_constant_channel_keeps_a_usable_deviation() -> None:
    images = torch.full((2, 1, 3, 3), 51, dtype=torch.uint8)
    assert statistics(Split(images, torch.zeros(2).long(), torch.arange(2))) == ((0.2,), (1 / 255,))


labelled = st.lists(st.integers(0, 4), min_size=2, max_size=60).map(torch.tensor)
shares = st.floats(0.02, 0.98)


@given(labelled, shares, st.integers(0, 2**32))
@settings(max_examples=100, deadline=None)
def test_cut_is_a_partition_with_every_class_on_both_sides(labels: torch.Tensor, share: float, seed: int) -> None:
    stays, held = cut(labels, None, share, generator(seed, "cut"))
    assert sorted([*stays.tolist(), *held.tolist()]) == list(range(len(labels)))
    for c in labels.unique().tolist():  # type: ignore[no-untyped-call]
        n, out = int((labels == c).sum()), int((labels[held] == c).sum())
        assert (0 < out < n) if n >= 2 else out == 0
        assert abs(out - share * n) <= 1


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5)), min_size=2, max_size=60), shares, st.integers(0, 99))
@settings(max_examples=100, deadline=None)
def test_groups_of_one_class_never_cross(pairs: list[tuple[int, int]], share: float, seed: int) -> None:
    labels = torch.tensor([c for c, _ in pairs])
    groups = torch.tensor([10 * c + g for c, g in pairs])
    stays, held = cut(labels, groups, share, generator(seed, "cut"))
    assert sorted([*stays.tolist(), *held.tolist()]) == list(range(len(labels)))
    assert not set(groups[stays].tolist()) & set(groups[held].tolist())
    for c in set(labels.tolist()):
        sides = [c in labels[rows].tolist() for rows in (stays, held)]
        assert sides == [True, len(set(groups[labels == c].tolist())) >= 2]


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5)), min_size=2, max_size=60), shares, st.integers(0, 99))
@settings(max_examples=100, deadline=None)
def test_groups_that_mix_classes_never_cross_either(pairs: list[tuple[int, int]], share: float, seed: int) -> None:
    labels, groups = (torch.tensor([pair[i] for pair in pairs]) for i in (0, 1))
    stays, held = cut(labels, groups, share, generator(seed, "cut"))
    assert not set(groups[stays].tolist()) & set(groups[held].tolist())
    assert set(labels[stays].tolist()) == set(labels.tolist())


def test_grouped_cut_comes_near_its_share() -> None:
    labels = torch.arange(4).repeat_interleave(300)
    groups = torch.arange(120).repeat_interleave(10)
    _, held = cut(labels, groups, 0.2, generator(0, "cut"))
    assert labels[held].bincount().tolist() == [60] * 4


@given(labelled, st.integers(0, 99), st.data())
@settings(max_examples=100, deadline=None)
def test_subset_is_exact_and_in_proportion(labels: torch.Tensor, seed: int, data: st.DataObject) -> None:
    present = len(set(labels.tolist()))
    count = data.draw(st.integers(present, len(labels)))
    rows = subset(labels, count, generator(seed, "subset"))
    assert len(set(rows.tolist())) == count
    assert rows.tolist() == sorted(rows.tolist())
    assert set(labels[rows].tolist()) == set(labels.tolist())
    for c in set(labels.tolist()):
        fair = count * int((labels == c).sum()) / len(labels)
        assert int((labels[rows] == c).sum()) <= max(fair + 1, 1)
