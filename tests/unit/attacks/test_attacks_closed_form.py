"""On linear networks the strongest point is known: margin - eps ||w||_dual."""

import pytest
import torch

from stages.attacks._ascent import Ball, Hill, Path
from stages.attacks.apgd import APGD
from stages.attacks.base import Attack
from stages.attacks.fgsm import FGSM
from stages.attacks.pgd import PGD
from stages.attacks.square import Square
from stages.evaluate import frozen
from stages.seeding import generator
from stages.threat import Threat
from tests.linear_nets import NORMS, Norm, drop, with_leads

UNBREAKABLE = 3.0
EXACT: list[tuple[Attack, Norm]] = [
    (FGSM(), "linf"),
    (FGSM(), "l2"),
    (FGSM(), "l1"),
    (PGD(), "linf"),
    (PGD(loss="margin"), "linf"),
    (PGD(steps=40, step=1.0), "l2"),
    (PGD(steps=60, step=0.5), "l1"),
    (APGD(), "linf"),
    (APGD(loss="dlr"), "linf"),
    (APGD(), "l2"),
    (APGD(), "l1"),
    (APGD(loss="dlr", targets=9), "linf"),
    (APGD(loss="dlr", targets=9), "l2"),
    (APGD(loss="dlr", targets=9), "l1"),
    (Square(queries=1500), "linf"),
]


@pytest.mark.parametrize(("attack", "norm"), EXACT, ids=repr)
def test_the_lowest_lead_is_reached(attack: Attack, norm: Norm) -> None:
    net, x, y, threat = with_leads(norm, UNBREAKABLE)
    with frozen(net):
        found = threat.project(attack.perturb(net, x, y, threat, generator(1)), x)
        lowest = net.lead(x) - drop(net, threat)
        assert torch.allclose(net.lead(found), lowest, atol=2e-6)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("attack", [FGSM(), PGD(steps=40, step=0.5)], ids=["fgsm", "pgd"])
def test_just_breakable_breaks_and_just_unbreakable_does_not(attack: Attack, norm: Norm) -> None:
    for share, broken in ((0.99, True), (1.01, False)):
        net, x, y, threat = with_leads(norm, share)
        found = attack(net, x, y, threat, generator(0))
        assert bool(((found != x).flatten(1).any(1) == broken).all())


@pytest.mark.parametrize("loss", ["ce", "margin"])
def test_the_edge_of_the_range_is_used_and_kept(loss: str) -> None:
    """Pixels at 0 or 1 can only move one way; the optimum moves every other pixel by eps."""
    net, x, y, threat = with_leads("linf", UNBREAKABLE)
    x, threat = (x > 0.5).to(x.dtype), threat.model_copy(update={"eps": 0.3})
    net.b = 20 - net.lead(x).detach()
    found = PGD.load({"loss": loss}).perturb(net, x, y, threat, generator(0))
    best = (x - 0.3 * net.w.detach().sign()).clamp(0, 1)
    assert torch.allclose(net.lead(found), net.lead(best), atol=1e-5)


def test_cross_entropy_stands_still_where_it_saturates_and_the_margin_does_not() -> None:
    net, x, y, threat = with_leads("linf", UNBREAKABLE)
    net.b += 500
    lowest = net.lead(x) - drop(net, threat)
    assert not torch.allclose(net.lead(PGD().perturb(net, x, y, threat, generator(0))), lowest, atol=1e-3)
    assert torch.allclose(net.lead(PGD(loss="margin").perturb(net, x, y, threat, generator(0))), lowest, atol=1e-3)


def test_more_restarts_never_break_fewer() -> None:
    rng = generator(3)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 12), torch.nn.ReLU(), torch.nn.Linear(12, 4))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=rng))
    x = torch.rand(64, 1, 4, 4, generator=rng)
    y = net(x).argmax(1)
    threat = Threat(norm="linf", eps=0.05)
    broken = []
    for restarts in (1, 2, 5):
        found = PGD(steps=3, restarts=restarts)(net, x, y, threat, generator(0))
        broken.append((found != x).flatten(1).any(1))
    assert bool((broken[0] <= broken[1]).all())
    assert bool((broken[1] <= broken[2]).all())


def test_apgd_halves_a_step_by_either_rule_and_goes_back_to_the_best_point() -> None:
    """Four examples after a window of 10 steps, best loss 1 at the last checkpoint; the rules of algorithm 1."""
    ones = torch.ones(4)
    hill = Hill(lambda x: x, torch.zeros(4, 1), torch.zeros(4, dtype=torch.int64), "ce")
    ball = Ball.around(hill.x, Threat(norm="linf", eps=4.0))
    path = Path.begin(hill, ball, torch.zeros(4, 1), ones, torch.zeros(4, 1))
    path.point, path.best = torch.full((4, 1), 5.0), torch.full((4, 1), 7.0)
    path.rises = torch.tensor([8, 7, 8, 8])
    path.best_loss = torch.tensor([2.0, 2.0, 1.0, 1.0])
    path.halved = torch.tensor([False, False, False, True])
    path.check(10)
    assert path.step.tolist() == [8.0, 4.0, 4.0, 8.0]
    assert path.point.flatten().tolist() == [5.0, 7.0, 7.0, 5.0]
    assert path.halved.tolist() == [False, True, True, False]
    assert path.rises.tolist() == [0, 0, 0, 0]
