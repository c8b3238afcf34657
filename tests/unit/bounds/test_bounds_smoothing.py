"""Randomised smoothing: exact intervals, and a linear classifier, which is its own smoothed one, of known radii."""

from fractions import Fraction
from math import comb

import pytest
import torch
from torch import Tensor, nn

from stages.bounds._binomial import lower_confidence
from stages.bounds.smoothing import Smoothing
from stages.method import InputError
from stages.seeding import derive, generator
from stages.threat import Threat

IMAGES = 40


def linear() -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    """Two classes of images [1, 2, 2]: the classifier, images, its answers, and the exact radii margin / ||w||."""
    rng = generator(0, "linear")
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).eval()
    layer = net[1]
    assert isinstance(layer, nn.Linear)
    with torch.no_grad():
        for value in layer.parameters():
            value.copy_(torch.randn(value.shape, generator=rng))
        x = torch.rand(IMAGES, 1, 2, 2, generator=rng)
        z = net(x).double()
        w = (layer.weight[0] - layer.weight[1]).double()
    return net, x, z.argmax(1), (z[:, 0] - z[:, 1]).abs() / w.norm()


def seeds(root: int, name: str = "image") -> list[int]:
    return [derive(root, name, i) for i in range(IMAGES)]


@pytest.mark.parametrize(("hits", "trials"), [(1, 1), (1, 7), (5, 7), (19, 20), (20, 20), (137, 200)])
def test_the_interval_is_exact_in_rational_arithmetic(hits: int, trials: int) -> None:
    def tail(p: Fraction) -> Fraction:
        return sum((comb(trials, k) * p**k * (1 - p) ** (trials - k) for k in range(hits, trials + 1)), Fraction(0))

    p, alpha = Fraction(lower_confidence(hits, trials, 0.001)), Fraction(0.001)
    assert tail(p) <= alpha
    assert tail(p * (1 + Fraction(1, 10**5))) > alpha


def test_all_hits_give_a_root_and_none_give_nothing() -> None:
    assert lower_confidence(100_000, 100_000, 0.001) == pytest.approx(0.001 ** (1 / 100_000), rel=1e-9)
    assert lower_confidence(0, 10, 0.5) == 0.0
    with pytest.raises(ValueError, match="11 of 10"):
        lower_confidence(11, 10, 0.5)


def test_radii_of_a_linear_classifier_exceed_the_exact_ones_with_probability_alpha_at_most() -> None:
    """800 draws at alpha 0.05: a coverage that is too low by a third would be seen with near certainty."""
    net, x, y, exact = linear()
    smoothing = Smoothing(sigma=0.5, n0=20, n=300, alpha=0.05)
    over = wrong = total = 0
    for root in range(20):
        found = smoothing.judge(net, x, seeds(root).__getitem__)
        answered = ~found.abstained
        over += int((answered & (found.classes == y) & (found.radii > exact)).sum())
        wrong += int((answered & (found.classes != y)).sum())
        total += IMAGES
    share = Fraction(1, 20)
    likely = sum(comb(total, k) * share**k * (1 - share) ** (total - k) for k in range(over + wrong, total + 1))
    assert likely > 1e-3
    assert over > 0  # the bound is tight enough to be exceeded at times


def test_radii_approach_the_exact_ones_with_more_copies() -> None:
    net, x, _, exact = linear()
    chosen = ((exact > 0.3) & (exact < 0.9)).nonzero().flatten()[:6]
    means = []
    for n in (100, 1000, 30_000):
        found = Smoothing(sigma=0.5, n0=50, n=n).judge(net, x[chosen], seeds(1).__getitem__)
        means.append(float((found.radii / exact[chosen]).mean()))
    assert means[0] < means[1] < means[2] < 1
    assert means[2] > 0.96


def test_it_abstains_where_no_class_has_half_of_the_copies() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(3, 3, bias=False)).eval()
    with torch.no_grad():
        net[1].weight.copy_(torch.eye(3))  # type: ignore[operator]
    found = Smoothing(n0=50, n=2000).judge(net, torch.full((1, 1, 1, 3), 0.5), lambda i: i)
    assert found.abstained.tolist() == [True]
    assert found.radii.tolist() == [0.0]
    assert not bool(found.right(found.classes).any())
    assert not bool(found.certified(found.classes, 0.0).any())


def test_estimation_has_draws_of_its_own_and_an_image_no_neighbours() -> None:
    net, x, y, exact = linear()
    clear = (exact > 0.2).nonzero().flatten()[:5]
    short, long = (Smoothing(n0=n0, n=700).judge(net, x[clear], seeds(0).__getitem__) for n0 in (30, 900))
    assert torch.equal(short.classes, y[clear])
    assert torch.equal(short.counts, long.counts)
    steps: list[tuple[int, int]] = []
    alone = Smoothing(n0=30, n=700).judge(net, x[clear[2:3]], lambda _: seeds(0)[2], lambda *at: steps.append(at))
    assert (alone.counts[0], alone.radii[0]) == (short.counts[2], short.radii[2])
    assert steps == [(1, 1)]
    other = Smoothing(n0=30, n=700).judge(net, x[clear], seeds(0, "else").__getitem__)
    assert not torch.equal(other.counts, short.counts)


def test_an_open_ball_is_not_a_closed_one_and_reach_is_the_largest_radius() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).eval()
    with torch.no_grad():
        net[1].bias.copy_(torch.tensor([100.0, 0.0]))  # type: ignore[operator]
    smoothing, y = Smoothing(sigma=0.3, n=500), torch.zeros(1, dtype=torch.int64)
    found = smoothing.judge(net, torch.rand(1, 1, 2, 2, generator=generator(0, "x")), lambda i: i)
    assert found.radii.tolist() == [smoothing.reach]
    assert not bool(found.certified(y, smoothing.reach))
    assert bool(found.certified(y, smoothing.reach * (1 - 1e-9)))
    assert not bool(found.certified(1 - y, 0.0))


@pytest.mark.parametrize("norm", ["linf", "l1"])
def test_other_norms_are_refused(norm: str) -> None:
    Smoothing().accept(Threat(norm="l2", eps=0.1))
    with pytest.raises(InputError, match="expected a threat in l2"):
        Smoothing().accept(Threat.load({"norm": norm, "eps": 0.1}))
