"""Gradients that tell the change, and gradients that do not; each against a case with a known answer."""

import pytest
import torch
from torch import Tensor, nn

from stages.evaluate import frozen
from stages.seeding import generator
from stages.smoothness import gradients_explain, hidden_parts, no_inner_optimiser, rises_along_gradient, told
from stages.threat import Threat
from tests.trained import digits, digits_model

THREAT = Threat(norm="linf", eps=0.1)


def images() -> tuple[Tensor, Tensor]:
    test = digits().test
    return test.floats(slice(0, 100)), test.labels[:100]


def test_a_polynomial_is_told_up_to_the_midpoint_rule() -> None:
    start, end = torch.zeros(3, 1), torch.tensor([[1.0], [2.0], [-1.0]])
    found = told(lambda x: x.pow(3).squeeze(1), lambda x: 3 * x.square(), start, end)
    # The midpoint rule on n cells errs by (f'(1) - f'(0)) / 24 n^2, here one part in 4 * 16^2.
    assert found.share == pytest.approx(1 - 1 / (4 * 16**2), abs=1e-6)
    assert found.ok


@pytest.mark.parametrize("jump", [0.0, 0.1, 0.5, 1.0])
def test_of_a_line_with_a_jump_the_gradient_tells_the_line(jump: float) -> None:
    """f(x) = x + jump [x > 1/2] on 0..1: the change is 1 + jump, the integral 1."""
    ends = torch.ones(4, 1)
    found = told(lambda x: (x + jump * (x > 0.5)).squeeze(1), torch.ones_like, torch.zeros_like(ends), ends)
    assert found.share == pytest.approx(1 / (1 + jump), abs=1e-6)
    assert found.error == pytest.approx(0, abs=1e-6)
    assert found.ok == (jump <= 0.1)


def test_no_gradient_tells_nothing_of_a_change_and_all_of_none() -> None:
    flat = torch.zeros(4, 1)
    assert told(lambda x: x.squeeze(1), torch.zeros_like, flat, flat + 1).share == 0
    assert told(lambda x: 0 * x.squeeze(1), torch.zeros_like, flat, flat + 1).share == 1


class Steps(nn.Module):
    """Rounding to `levels`, with the gradient of the identity where `through`."""

    def __init__(self, levels: int, through: bool) -> None:
        super().__init__()
        self.levels, self.through = levels, through

    def forward(self, x: Tensor) -> Tensor:
        rounded = (x * self.levels).round() / self.levels
        return x + (rounded - x).detach() if self.through else rounded


@pytest.mark.parametrize("part", [nn.ReLU(), nn.MaxPool2d(2), nn.SiLU(), nn.Sigmoid(), Steps(255, through=True)])
def test_a_part_with_a_gradient_of_its_own_is_not_named(part: nn.Module) -> None:
    x = torch.randn(64, 3, 8, 8, generator=generator(0))
    assert hidden_parts(nn.Sequential(part), x) == []


@pytest.mark.parametrize("part", [Steps(4, through=False), nn.Threshold(0.5, -2.0), nn.Hardshrink(1.0)])
def test_a_part_whose_change_hides_in_jumps_is_named(part: nn.Module) -> None:
    x = torch.randn(64, 3, 8, 8, generator=generator(0))
    found = hidden_parts(nn.Sequential(nn.ReLU(), nn.Sequential(part)), 2 * x)
    assert len(found) == 1
    assert found[0].startswith(f"1.0 ({type(part).__name__}) tells ")


def test_naming_parts_leaves_no_hooks() -> None:
    net = nn.Sequential(nn.ReLU())
    hidden_parts(net, torch.rand(4, 3))
    assert not net[0]._forward_pre_hooks


@pytest.mark.parametrize("recipe", ["natural", "at"])
def test_networks_that_hide_nothing_are_told_in_full_and_rise_along_the_gradient(recipe: str) -> None:
    net = digits_model(recipe=recipe).net
    with frozen(net):
        found = gradients_explain(net, *images(), THREAT)
        assert found.ok
        assert "gradients tell 100% of the change of the margin (standard error 0%, " in found.text
        assert "does more for 0 of 100 images" in rises_along_gradient(net, *images(), THREAT, 0).text


def test_a_gradient_that_is_noise_rises_no_more_than_a_random_direction() -> None:
    net = digits_model().net
    rng = generator(3)

    def noisy(x: Tensor) -> Tensor:
        at = x.clone()
        if at.requires_grad:
            at.register_hook(lambda grad: torch.randn(grad.shape, generator=rng))  # type: ignore[no-untyped-call]
        out: Tensor = net(at)
        return out

    with frozen(net):
        assert not rises_along_gradient(noisy, *images(), THREAT, 0).ok
        assert not gradients_explain(noisy, *images(), THREAT).ok


def test_an_optimiser_inside_the_forward_pass_is_called_out() -> None:
    net = digits_model().net

    def purified(x: Tensor) -> Tensor:
        with torch.enable_grad():
            at = x.detach().requires_grad_(True)
            (slope,) = torch.autograd.grad(net(at).logsumexp(1).sum(), at)
        out: Tensor = net(x - 0.1 * slope)
        return out

    x, _ = images()
    with frozen(net):
        assert no_inner_optimiser(net, x).ok
        found = no_inner_optimiser(purified, x)
    assert not found.ok
    assert "one forward pass made 1 backward passes; must make none" in found.text
