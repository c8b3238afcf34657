"""Expected tight bounds: the closed forms of the notes, one of them no bound; and an explicit product of matrices."""

import pytest
import torch
from torch import nn

from stages.bounds._etb import etb
from stages.bounds.base import Box
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
def test_closed_forms_of_the_notes(net: nn.Module, x0: list[float], eps: float, expected: tuple[float, float]) -> None:
    x = torch.tensor([x0], dtype=torch.float64)
    low, high = etb(net, Box(x - eps, x + eps), torch.ones(1, 1, 1, dtype=torch.float64))
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
    found = etb(net, Box(x - 0.1, x + 0.1), torch.eye(3, dtype=torch.float64).unsqueeze(0))
    assert torch.allclose(found[1] - found[0], 0.2 * slopes.abs().sum(1), atol=1e-9)


def test_other_activations_are_refused() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Tanh()).eval()
    x = torch.zeros(1, 2)
    with pytest.raises(InputError, match="in expected tight bounds"):
        etb(net, Box(x, x), torch.ones(1, 1, 2))
