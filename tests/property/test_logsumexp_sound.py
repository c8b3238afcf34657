"""No point of a box escapes the bounds of log_softmax and logsumexp, and leads lose nothing to a log_softmax."""

from functools import cache

import pytest
import torch
from torch import Tensor, nn

from stages.bounds.base import Box, Certifier, lead_rows
from stages.bounds.crown import Crown
from stages.bounds.crown_ibp import CrownIBP
from stages.bounds.ibp import IBP
from stages.seeding import generator
from tests.networks import Single

ALL: list[Certifier] = [IBP(), CrownIBP(), Crown()]


@cache
def scores(scale: float) -> nn.Module:
    net = nn.Sequential(nn.Flatten(), nn.Linear(9, 8), nn.ReLU(), nn.Linear(8, 4)).eval().requires_grad_(False)
    rng = generator(0, "scores")
    for value in net.parameters():
        value.copy_(scale**0.5 * torch.randn(value.shape, generator=rng))
    return net


def ends(scale: float) -> dict[str, nn.Module]:
    base = scores(scale)
    return {
        "log_softmax": nn.Sequential(base, nn.LogSoftmax(1)).eval(),
        "kept": Single(lambda x: base(x).logsumexp(1, keepdim=True) * torch.tensor([1.0, -1.0, 2.0])).eval(),
        "two axes": Single(lambda x: torch.cat([x.logsumexp((2, 3)), -x.flatten(1).logsumexp(1, True)], 1)).eval(),
    }


def box(eps: float) -> Box:
    x = torch.rand(3, 1, 3, 3, generator=generator(1, "x"))
    return Box(x - eps, x + eps)


def least(net: nn.Module, within: Box, rows: Tensor) -> Tensor:
    """[B, R]: the smallest values that corners, random points and gradients find."""
    found, rng = torch.full(rows.shape[:2], torch.inf, dtype=torch.float64), generator(2, "points")
    for r in range(rows.shape[1]):
        x = within.low
        for step in range(8):
            x = x.clone().requires_grad_()
            values = torch.einsum("brk,bk->br", rows.double(), net(x).double())
            found = torch.minimum(found, values.detach())
            (grad,) = torch.autograd.grad(values[:, r].sum(), x)
            share = torch.rand(x.shape, generator=rng)
            inner = (within.low + share * (within.high - within.low)).clamp(within.low, within.high)
            x = inner if step % 3 == 2 else torch.where(grad > 0, within.low, within.high)
    return found


@pytest.mark.parametrize("name", ends(1.0))
@pytest.mark.parametrize(("scale", "eps"), [(1.0, 0.0), (1.0, 0.3), (10.0, 0.02), (300.0, 0.1)])
def test_nothing_escapes(name: str, scale: float, eps: float) -> None:
    net, within = ends(scale)[name], box(eps)
    classes = net(within.low).shape[1]
    rows = torch.cat([torch.eye(classes), -torch.eye(classes)]).expand(3, -1, -1)
    lowest = least(net, within, rows)
    for certifier in ALL:
        with torch.no_grad():
            bound = certifier.lower(net, within, rows)
        assert bool((bound <= lowest).all())
        if (
            isinstance(certifier, Crown) and scale * eps <= 0.2
        ):  # what an attack finds in so small a box is not far above
            assert bool((bound > lowest - 1.5 * (eps > 0) - 1e-3).all())


@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_leads_lose_nothing_to_a_log_softmax(scale: float) -> None:
    plain, within = scores(scale), box(0.1)
    rows = lead_rows(plain, within.low, torch.tensor([0, 1, 3]))
    for certifier in ALL:
        with torch.no_grad():
            before, after = (certifier.lower(net, within, rows) for net in (plain, ends(scale)["log_softmax"]))
        torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-4 * scale)
