"""Carlini-Wagner: the critical price and the least distance on linear nets, the chain rule, the edge of the range."""

import pytest
import torch
from torch import nn

from stages.attacks.carlini_wagner import CarliniWagner, _Found, _Run
from stages.evaluate import frozen
from stages.method import InputError
from stages.oracle import Oracle
from stages.seeding import generator
from stages.threat import Threat
from tests.linear_nets import with_leads


@pytest.mark.parametrize(("share", "succeeds"), [(0.8, False), (1.2, True)])
def test_a_try_succeeds_from_the_critical_price_on(share: float, succeeds: bool) -> None:
    """min |d|^2 + c (s + w.d) is solved by d = -c w / 2, which is beyond the boundary from c = 2 s / |w|^2 on."""
    net, x, y, threat = with_leads("l2", 1.0)
    critical = 2 * net.lead(x).detach() / net.w.detach().square().sum()
    tiny = threat.model_copy(update={"eps": 1e-6})
    with frozen(net):
        attack = CarliniWagner(steps=400)
        success = attack._descend(net, x, y, tiny, share * critical, _Found.nothing(x))
    assert bool((success == succeeds).all())


def test_the_nearest_wrong_point_is_at_the_distance_of_the_boundary() -> None:
    net, x, y, threat = with_leads("l2", 1.0)
    least = net.lead(x).detach() / torch.linalg.vector_norm(net.w.detach())
    found = _Found.nothing(x)
    attack, tiny = CarliniWagner(steps=300), threat.model_copy(update={"eps": 1e-6})
    with frozen(net):
        for share in (1.02, 1.1):
            price = share * 2 * net.lead(x).detach() / net.w.detach().square().sum()
            attack._descend(net, x, y, tiny, price, found)
    assert bool((found.distance >= least * (1 - 1e-5)).all())
    assert bool((found.distance <= 1.02 * least).all())


@pytest.mark.parametrize(("share", "broken"), [(0.95, True), (1.01, False)])
def test_it_breaks_what_lies_within_eps_and_nothing_else(share: float, broken: bool) -> None:
    net, x, y, threat = with_leads("l2", share)
    found = CarliniWagner(steps=200)(net, x, y, threat, generator(0))
    assert bool(((found != x).flatten(1).any(1) == broken).all())


def test_the_variable_starts_at_the_image_and_its_slope_is_that_of_autograd() -> None:
    threat = Threat(norm="l2", eps=1.0, low=-0.5, high=2.0)
    x = 2.5 * torch.rand(4, 7, generator=generator(0), dtype=torch.float64) - 0.5
    x[0, 0], x[1, 1] = -0.5, 2.0
    run = _Run.begin(torch.arange(4), x, threat)
    point, rate = run.seen(threat)
    assert torch.allclose(point, x, atol=1.3e-4)
    w = run.w.clone().requires_grad_(True)
    (slope,) = torch.autograd.grad((-0.5 + 1.25 * (1 + w.tanh())).sum(), w)
    assert torch.allclose(rate, slope, atol=1e-12)


def test_its_adam_is_that_of_the_library() -> None:
    rng = generator(2)
    start = torch.rand(3, 5, generator=rng)
    run = _Run.begin(torch.arange(3), start, Threat(norm="l2", eps=1.0))
    parameter = nn.Parameter(run.w.clone())
    adam = torch.optim.Adam([parameter], lr=0.03)
    for number in range(1, 6):
        slope = torch.randn(3, 5, generator=rng)
        parameter.grad = slope.clone()
        adam.step()
        run.step(slope, 0.03, number)
    assert torch.allclose(run.w, parameter.detach(), atol=1e-6)


def test_black_and_white_pixels_can_be_moved() -> None:
    net, x, y, threat = with_leads("l2", 1.0, count=4)
    x = (torch.rand(x.shape, generator=generator(3)) > 0.5).to(x.dtype)
    for row in range(4):
        one = slice(row, row + 1)
        net.b = torch.zeros(())
        net.b = 0.2 - net.lead(x[one]).detach().squeeze()
        found = CarliniWagner()(net, x[one], y[one], threat, generator(0))
        assert bool((found != x[one]).any())
        assert float(found.min()) >= 0
        assert float(found.max()) <= 1


def test_confidence_keeps_the_search_away_from_the_boundary() -> None:
    net, x, y, threat = with_leads("l2", 1.0)
    tiny = threat.model_copy(update={"eps": 1e-6})
    critical = 2 * net.lead(x).detach() / net.w.detach().square().sum()
    with frozen(net):
        success = CarliniWagner(steps=300, confidence=0.5)._descend(net, x, y, tiny, 1.2 * critical, _Found.nothing(x))
    assert not bool(success.all())


def test_tries_end_when_they_make_no_headway_and_broken_examples_leave() -> None:
    net, x, y, threat = with_leads("l2", 0.5)
    far = with_leads("l2", 3.0)[1]
    oracle = Oracle.of(net, 2 * len(x))
    CarliniWagner(steps=100, searches=4).perturb(oracle, torch.cat([x, far]), torch.cat([y, y]), threat, generator(0))
    spent = oracle.spent.queries
    assert int(spent.max()) < 4 * 100
    assert torch.equal(spent, oracle.spent.gradients)
    assert float(spent[: len(x)].float().mean()) < float(spent[len(x) :].float().mean())


def test_other_norms_are_refused() -> None:
    net, x, y, threat = with_leads("linf", 1.0)
    with pytest.raises(InputError, match="carlini_wagner: expected a threat in l2, got linf"):
        CarliniWagner()(net, x, y, threat, generator(0))
