"""Numbers at the ends of float32: constants that look like masks, coefficients that underflow."""

from collections.abc import Callable
from contextlib import nullcontext, suppress

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stages.bounds.base import Box, Certifier
from stages.bounds.crown import Crown
from stages.bounds.crown_ibp import CrownIBP
from stages.bounds.ibp import IBP
from stages.method import InputError
from stages.seeding import generator
from tests.certifiers import ALL

SEEN = torch.tensor([True, False, True, True])
FAR = torch.tensor([-1e35, 0.0, 0.0, 0.0])


class Net(nn.Module):
    def __init__(self, way: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.way, self.last = way, nn.Linear(4, 3)
        with torch.no_grad():
            self.last.weight.copy_(torch.randn(3, 4, generator=generator(0, "weights")))
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.way(x))
        return out


def escape(net: nn.Module, certifier: Certifier, box: Box) -> float:
    """By how much the least logit that is found lies under its bound."""
    share = torch.rand(200, *box.low.shape, generator=generator(1, "points"))
    share[::2] = share[::2].round()
    points = torch.cat([box.low.lerp(box.high, share).flatten(0, 1), box.low, box.high])
    rows = torch.cat([torch.eye(3), -torch.eye(3)]).unsqueeze(0)
    with torch.no_grad():
        return float((certifier.lower(net, box, rows) - (net(points) @ rows[0].T).amin(0)).max())


def seen_twice(x: Tensor) -> Tensor:
    far = x + 10 * FAR
    return far.softmax(1) + far.clamp(min=-3e35) * 1e-35


# Each way, and whether every certifier has finite bounds for it.
WAYS: list[tuple[Callable[[Tensor], Tensor], bool]] = [
    (lambda x: torch.relu((x + FAR) - FAR), False),
    (lambda x: (x + 1e3 * FAR) * 1e-37, True),
    (lambda x: torch.where(SEEN, x, -torch.inf).clamp(min=-2e30) * 1e-30, False),
    (lambda x: torch.where(SEEN, x, -torch.inf).sigmoid(), False),
    (seen_twice, True),
    (lambda x: ((x + FAR) - FAR).softmax(1), True),
    (lambda x: ((x + FAR) + x).softmax(1), True),
]


@pytest.mark.parametrize("place", range(len(WAYS)))
def test_a_number_far_below_zero_is_a_mask_for_a_softmax_alone(place: int) -> None:
    way, finite = WAYS[place]
    x = torch.tensor([[0.1, 0.7, 0.4, 0.9]])
    for certifier in ALL:
        with nullcontext() if finite or isinstance(certifier, IBP) else suppress(InputError):
            assert escape(Net(way), certifier, Box(x - 0.1, x + 0.1)) <= 0, certifier


def test_a_mask_that_scores_may_outweigh_is_refused() -> None:
    net, x = Net(lambda x: (1e32 * x + FAR).softmax(1)), torch.ones(1, 4)
    with pytest.raises(InputError, match="it is none any more"):
        escape(net, IBP(), Box(x - 0.1, x + 0.1))


@pytest.mark.parametrize("relu", [False, True])
def test_coefficients_that_underflow_are_not_lost(relu: bool) -> None:
    layers: list[nn.Module] = []
    for scale in (1e19, 1e19, 1e-23, 1e-23):
        linear = nn.Linear(3, 3, bias=False)
        layers += [linear, *((nn.ReLU(),) if relu else ())]
        with torch.no_grad():
            linear.weight.copy_(scale * torch.eye(3))
    for certifier in ALL:
        assert escape(nn.Sequential(*layers).eval(), certifier, Box(-torch.ones(1, 3), torch.ones(1, 3))) <= 0, (
            certifier
        )


@pytest.mark.parametrize("alpha", [1.7, 1000.0])
def test_an_exponential_linear_unit_is_bounded_as_runtimes_compute_it(alpha: float) -> None:
    """alpha (e^x - 1) with e^x rounded before 1 is taken off, as in onnxruntime: it loses units of alpha, not of x."""
    x = torch.linspace(-0.3, 0.1, 4000).view(-1, 4)
    net, ran = Net(lambda x: F.elu(x, alpha)), Net(lambda x: torch.where(x < 0, alpha * (x.exp() - 1), x))
    ran.last = net.last
    rows = torch.cat([torch.eye(3), -torch.eye(3)]).double().expand(len(x), -1, -1)
    with torch.no_grad():
        seen = torch.cat([ran(x), -ran(x)], 1)
        for certifier in (IBP(), CrownIBP(), Crown()):
            lower = certifier.lower(net, Box(x, x), rows)
            assert bool((lower <= seen).all()), certifier
            assert float((seen - lower).max()) < 1e-3 * alpha
