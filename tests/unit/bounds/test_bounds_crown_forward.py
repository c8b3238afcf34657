"""Bands of linear functions: exact where the network is affine, never looser than CROWN, tight on small boxes."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from stages.bounds.base import Box
from stages.bounds.crown import Crown
from stages.bounds.crown_forward import CrownForward
from stages.bounds.crown_ibp import CrownIBP
from stages.seeding import generator


def net(*sizes: int, seed: int = 0) -> nn.Sequential:
    rng = generator(seed, "net")
    parts: list[nn.Module] = []
    for a, b in pairwise(sizes):
        layer = nn.Linear(a, b)
        with torch.no_grad():
            layer.weight.copy_(torch.randn(b, a, generator=rng) * (2 / a) ** 0.5)
            layer.bias.copy_(torch.randn(b, generator=rng) * 0.3)
        parts += [layer, nn.ReLU()]
    return nn.Sequential(*parts[:-1]).eval()


def ends(network: nn.Module, centre: Tensor, eps: float, certifier: CrownForward | Crown | CrownIBP) -> Tensor:
    rows = torch.eye(3, dtype=torch.float64).expand(len(centre), -1, -1)
    with torch.no_grad():
        return certifier.lower(network, Box(centre - eps, centre + eps), rows)


def test_exact_on_an_affine_network() -> None:
    network = nn.Sequential(net(4, 3), nn.Linear(3, 3)).eval()
    x = torch.rand(5, 4, generator=generator(0, "x"))
    with torch.no_grad():
        slope = network[1].weight @ network[0][0].weight  # type: ignore[index]
        least = network(x) - 0.2 * slope.abs().sum(1)
    torch.testing.assert_close(ends(network, x, 0.2, CrownForward()), least.double(), rtol=0, atol=1e-5)


def test_never_looser_than_crown() -> None:
    x = torch.rand(32, 4, generator=generator(1, "x"))
    for eps in (0.3, 0.03, 0.003):
        forward, backward = (ends(net(4, 20, 20, 3), x, eps, c) for c in (CrownForward(), Crown(arithmetic="real")))
        assert (forward >= backward - 1e-4).all()


def test_on_small_boxes_the_forward_pass_alone_settles_signs() -> None:
    """What is lost against the best linear bound, the tangent, shrinks faster than the box."""
    network = net(4, 30, 30, 3)
    x = torch.rand(16, 4, generator=generator(2, "x"), requires_grad=True)
    slopes = torch.stack([torch.autograd.grad(network(x)[:, k].sum(), x)[0] for k in range(3)], 1)
    for eps in (1e-3, 1e-4):
        tangent = (network(x) - eps * slopes.abs().sum(2)).detach().double()
        lost = (tangent - ends(network, x.detach(), eps, CrownForward())).median()
        assert lost < 0.02 * eps + 2e-5


def test_a_fixed_input_costs_no_column_and_changes_nothing() -> None:
    network, low = net(4, 12, 3), torch.rand(3, 4, generator=generator(3, "x"))
    high = low + torch.tensor([0.1, 0.0, 0.0, 0.2])
    rows = torch.eye(3, dtype=torch.float64).expand(3, -1, -1)
    with torch.no_grad():
        bound = CrownForward().lower(network, Box(low, high), rows)
        points = low + torch.rand(200, 3, 4, generator=generator(4, "x")) * (high - low)
        reached = network(points).amin(0).double()
    assert (bound <= reached).all()
    assert (reached - bound).max() < 0.5


class Mixed(nn.Module):
    """Constants from the left, of which torch makes one for every image."""

    def __init__(self) -> None:
        super().__init__()
        rng = generator(5, "weights")
        self.mix = nn.Parameter(torch.randn(4, 4, generator=rng).tril())
        self.last = nn.Parameter(torch.randn(12, 3, generator=rng))
        self.eval().requires_grad_(False)  # torch multiplies otherwise, where it may need gradients

    def forward(self, x: Tensor) -> Tensor:
        return (self.mix @ torch.relu(self.mix @ x)).flatten(1) @ self.last


@pytest.mark.parametrize("double", [False, True])
def test_constants_from_the_left(double: bool) -> None:
    x, rng = torch.rand(2, 4, 3, generator=generator(6, "x")), generator(7, "points")
    rows = torch.eye(3).expand(2, -1, -1)
    with torch.no_grad():
        bound, plain = (
            certifier.lower(Mixed(), Box(x - 0.1, x + 0.1), rows)
            for certifier in (CrownForward(double=double), Crown())
        )
        points = x + 0.2 * torch.rand(300, 2, 4, 3, generator=rng) - 0.1
        assert (bound <= Mixed()(points.flatten(0, 1)).unflatten(0, (300, 2)).amin(0)).all()
    assert (bound >= plain - 1e-4).all()


def test_inputs_owe_what_their_ranges_make_lines_lose() -> None:
    """-relu(2 x_0 + x_2) on [-1, 1]^2 and [0, 1]^2, the input between them fixed."""
    first = nn.Linear(3, 1)
    with torch.no_grad():
        first.weight.copy_(torch.tensor([[2.0, 9.0, 1.0]]))
        first.bias.copy_(torch.tensor([-9.0]))
    network = nn.Sequential(first, nn.ReLU()).eval()
    low = torch.tensor([[-1.0, 1.0, -1.0], [0.0, 1.0, 0.0]])
    high = torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]])
    with torch.no_grad():
        found = CrownForward().planes(network, Box(low, high), -torch.ones(2, 1, 1, dtype=torch.float64))
    assert found.free.tolist() == [0, 2]
    # The line above relu on [-3, 3] is 1.5 high in the middle; where no sign is open nothing is lost.
    torch.testing.assert_close(found.owed[:, 0], torch.tensor([[1.0, 0.5], [0.0, 0.0]]).double(), rtol=0, atol=1e-4)
