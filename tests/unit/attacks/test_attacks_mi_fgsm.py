"""MI-FGSM: the update of the paper, plain steps without momentum, and the optimum on linear nets."""

import pytest
import torch
from torch import Tensor, nn

from stages.attacks._losses import gradient
from stages.attacks.mi_fgsm import MIFGSM
from stages.attacks.pgd import PGD
from stages.evaluate import frozen
from stages.oracle import Oracle
from stages.seeding import generator
from stages.threat import Threat
from tests.linear_nets import NORMS, Norm, drop, with_leads


def curved() -> tuple[nn.Module, Tensor, Tensor]:
    rng = generator(1, "curved")
    net = nn.Sequential(nn.Flatten(), nn.Linear(9, 12), nn.Tanh(), nn.Linear(12, 3))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=rng))
    x = torch.rand(20, 1, 3, 3, generator=rng)
    with torch.no_grad():
        return net, x, net(x).argmax(1)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_each_step_follows_the_sum_of_normalised_gradients(norm: Norm) -> None:
    """Algorithm 1 of the paper, on images of which none is broken."""
    net, x, y = curved()
    threat = Threat(norm=norm, eps=0.02)
    point, g = x, torch.zeros_like(x)
    for _ in range(4):
        _, _, slope = gradient(net, point, y, "ce")
        g = 0.7 * g + slope / slope.abs().sum(dim=(1, 2, 3), keepdim=True)
        way = g.sign() if norm == "linf" else g / g.square().sum(dim=(1, 2, 3), keepdim=True).sqrt()
        point = threat.project(point + 0.02 / 4 * way, x)
    with torch.no_grad():
        kept = net(point).argmax(1) == y
    found = MIFGSM(steps=4, decay=0.7).perturb(net, x, y, threat, generator(0))
    assert int(kept.sum()) > 10
    assert torch.allclose(found[kept], point[kept], atol=1e-7)


@pytest.mark.parametrize("norm", NORMS)
def test_without_momentum_it_is_iterated_fgsm(norm: Norm) -> None:
    net, x, y = curved()
    threat = Threat(norm=norm, eps=0.1)
    plain = PGD(steps=6, step=1 / 6, start="zero").perturb(net, x, y, threat, generator(0))
    assert torch.allclose(MIFGSM(steps=6, decay=0).perturb(net, x, y, threat, generator(0)), plain, atol=1e-6)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("steps", [1, 3, 10])
def test_the_default_step_just_reaches_the_optimum_of_a_linear_net(norm: Norm, steps: int) -> None:
    net, x, y, threat = with_leads(norm, 3.0)
    with frozen(net):
        found = MIFGSM(steps=steps).perturb(net, x, y, threat, generator(0))
        assert torch.allclose(net.lead(found), net.lead(x) - drop(net, threat), atol=2e-6)


def test_an_example_pays_one_pass_a_step_until_it_is_broken() -> None:
    net, x, y, threat = with_leads("linf", 0.55)
    x = torch.cat([x, with_leads("linf", 3.0)[1]])
    oracle = Oracle.of(net, len(x))
    MIFGSM(steps=10).perturb(oracle, x, torch.cat([y, y]), threat, generator(0))
    # After k steps the lead has fallen by k tenths of what can be taken away: the sixth breaks, the seventh sees it.
    assert oracle.spent.gradients.tolist() == [7] * 24 + [10] * 24
