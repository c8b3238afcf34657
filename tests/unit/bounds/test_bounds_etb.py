"""Expected tight bounds: the closed forms of the notes, one of them no bound; and an explicit product of matrices."""

from typing import Literal

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stages.bounds.base import Ball, Box
from stages.bounds.etb import ETB
from stages.method import InputError
from stages.seeding import generator

SQUARE = [[1.0, 1.0], [1.0, -1.0]]


def block(a1: list[list[float]], b1: list[float], a2: list[float], b2: float) -> nn.Module:
    first, second = nn.Linear(len(a1[0]), len(a1)), nn.Linear(len(a1), 1)
    with torch.no_grad():
        first.weight.copy_(torch.tensor(a1))
        first.bias.copy_(torch.tensor(b1))
        second.weight.copy_(torch.tensor([a2]))
        second.bias.fill_(b2)
    return nn.Sequential(first, nn.ReLU(), second).double().eval()


@pytest.mark.parametrize(
    ("net", "x0", "eps", "expected"),
    [
        pytest.param(block(SQUARE, [0, 0], [1, 1], 0), [1.0, 0.0], 1.0, (0.0, 4.0), id="case 1"),
        pytest.param(block(SQUARE, [0, 0], [1, 1], 0), [0.0, 0.0], 1.0, (-2.0, 2.0), id="case 2"),
        pytest.param(block(SQUARE, [0.5, -0.5], [1, -2], 0.25), [0.5, 0.25], 0.5, (0.0, 4.0), id="case 3"),
        pytest.param(block([[1.0], [-1.0]], [0, 0], [1, 1], 0), [0.0], 1.0, (0.0, 0.0), id="case 4, no bound"),
        pytest.param(block([[1.0], [-1.0]], [0, 0], [1, -1], 0), [0.0], 1.0, (-2.0, 2.0), id="case 4, identity"),
    ],
)
@pytest.mark.parametrize("form", ["deep", "blocks"])
def test_closed_forms_of_the_notes(
    form: Literal["deep", "blocks"], net: nn.Module, x0: list[float], eps: float, expected: tuple[float, float]
) -> None:
    """One block is the whole network here, so both forms are the notes' block."""
    x = torch.tensor([x0], dtype=torch.float64)
    low, high = ETB(form=form).estimate(net, Box(x - eps, x + eps), torch.ones(1, 1, 1, dtype=torch.float64))
    assert (float(low), float(high)) == pytest.approx(expected, abs=1e-9)


def test_the_jacobian_is_the_product_of_masked_matrices() -> None:
    rng = generator(0, "etb")
    net = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, 3)).double().eval()
    with torch.no_grad():
        for value in net.parameters():
            value.copy_(torch.randn(value.shape, generator=rng))
        x = torch.randn(1, 5, generator=rng, dtype=torch.float64)
        low, high = x - 0.1, x + 0.1
        slopes = torch.eye(5, dtype=torch.float64)
        for at in (0, 2, 4):
            weight, bias = net.get_parameter(f"{at}.weight"), net.get_parameter(f"{at}.bias")
            middle, radius = (low + high) / 2 @ weight.T + bias, (high - low) / 2 @ weight.abs().T
            fires = (middle + radius > 0)[0].double() if at < 4 else torch.ones(3, dtype=torch.float64)
            low, high = (middle - radius).clamp(min=0), (middle + radius).clamp(min=0)
            slopes = fires.unsqueeze(1) * (weight @ slopes)
    found = ETB().estimate(net, Box(x - 0.1, x + 0.1), torch.eye(3, dtype=torch.float64).unsqueeze(0))
    assert torch.allclose(found[1] - found[0], 0.2 * slopes.abs().sum(1), atol=1e-9)


def test_blocks_hand_their_interval_on_as_the_next_ones_box() -> None:
    """Two blocks with a convolution: each by explicit matrices, the ReLU between them applied to both ends."""
    rng = generator(1, "etb")
    net = nn.Sequential(
        nn.Conv2d(1, 2, 2), nn.ReLU(), nn.Conv2d(2, 2, 2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 5), nn.ReLU(),
        nn.Linear(5, 3),
    ).double().eval()  # fmt: skip
    with torch.no_grad():
        for value in net.parameters():
            value.copy_(torch.randn(value.shape, generator=rng))

        def matrix(layers: nn.Module, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
            size = torch.Size(shape).numel()
            bias = layers(torch.zeros(1, *shape, dtype=torch.float64)).flatten(1)
            return (layers(torch.eye(size, dtype=torch.float64).view(-1, *shape)).flatten(1) - bias).T, bias

        def etb_block(first: Tensor, b1: Tensor, second: Tensor, b2: Tensor, low: Tensor, high: Tensor) -> list[Tensor]:
            middle, radius = (low + high) / 2, (high - low) / 2
            hidden = middle @ first.T + b1
            fires = ((hidden + radius @ first.abs().T) > 0).double()
            reach = radius @ (second * fires @ first).abs().T
            value = (fires * hidden) @ second.T + b2
            return [value - reach, value + reach]

        x = torch.rand(1, 1, 4, 4, generator=rng, dtype=torch.float64)
        low, high = (x - 0.1).flatten(1), (x + 0.1).flatten(1)
        low, high = etb_block(*matrix(net[0], (1, 4, 4)), *matrix(net[2], (2, 3, 3)), low, high)
        ends = etb_block(*matrix(net[5], (8,)), *matrix(net[7], (5,)), F.relu(low), F.relu(high))
    rows = torch.eye(3, dtype=torch.float64).unsqueeze(0)
    found = ETB(form="blocks").estimate(net, Box(x - 0.1, x + 0.1), rows)
    assert all(torch.allclose(*pair, atol=1e-9) for pair in zip(found, ends, strict=True))
    deep = ETB().estimate(net, Box(x - 0.1, x + 0.1), rows)
    assert not torch.allclose(deep[0], found[0])


def test_without_an_open_relu_a_ball_is_met_by_the_dual_norm() -> None:
    net = nn.Sequential(nn.Linear(3, 2)).double().eval()
    x, rows = (
        torch.rand(2, 3, generator=generator(2, "etb"), dtype=torch.float64),
        torch.eye(2).double().expand(2, 2, 2),
    )
    layer = net[0]
    assert isinstance(layer, nn.Linear)
    for norm, dual in (("l2", 2.0), ("l1", float("inf"))):
        box = Box(x - 0.5, x + 0.5, Ball(x, norm, 0.5))  # type: ignore[arg-type]  # one of two literals
        low, high = ETB().estimate(net, box, rows)
        wide = torch.linalg.vector_norm(layer.weight.detach(), dual, dim=1)
        assert torch.allclose(high - low, wide.expand(2, 2), atol=1e-9)


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.relu(self.second(F.relu(self.first(x))))


def test_blocks_refuse_a_network_with_branches_and_deep_does_not() -> None:
    net, x = Branches().eval(), torch.zeros(1, 2)
    assert ETB().estimate(net, Box(x, x), torch.ones(1, 1, 2))[0].shape == (1, 1)
    with pytest.raises(InputError, match="branch, and blocks follow chains"):
        ETB(form="blocks").estimate(net, Box(x, x), torch.ones(1, 1, 2))


def test_other_activations_are_refused() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Tanh()).eval()
    x = torch.zeros(1, 2)
    with pytest.raises(InputError, match="in expected tight bounds"):
        ETB().estimate(net, Box(x, x), torch.ones(1, 1, 2))
