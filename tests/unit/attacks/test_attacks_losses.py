"""Each loss against its formula on a few numbers, and gradients that are per example, float32 and of x alone."""

import math

import pytest
import torch
from torch import Tensor, nn

from stages.attacks._losses import cross_entropy, dlr, gradient, margin
from stages.evaluate import frozen

Z = torch.tensor([[3.0, 1.0, 0.5, -1.0], [0.0, 2.0, 5.0, 1.0]])
Y = torch.tensor([0, 1])


def test_cross_entropy_is_log_sum_exp_minus_the_true_logit() -> None:
    expected = [math.log(sum(math.exp(v) for v in row)) - row[k] for row, k in zip(Z.tolist(), [0, 1], strict=True)]
    assert cross_entropy(Z, Y).tolist() == pytest.approx(expected, abs=1e-6)


def test_margin_is_the_best_other_logit_minus_the_true_one() -> None:
    assert margin(Z, Y).tolist() == [-2.0, 3.0]


def test_dlr_divides_the_margin_by_first_minus_third() -> None:
    assert dlr(Z, Y).tolist() == pytest.approx([-2.0 / 2.5, 3.0 / 4.0])


def test_dlr_does_not_change_with_the_scale_of_logits() -> None:
    assert torch.allclose(dlr(Z, Y), dlr(1000 * Z, Y))


def test_dlr_is_the_margin_with_fewer_than_four_classes() -> None:
    assert torch.equal(dlr(Z[:, :3], Y), margin(Z[:, :3], Y))
    assert torch.equal(dlr(Z[:, :2], Y), margin(Z[:, :2], Y))


def test_losses_are_float32_on_bfloat16_logits() -> None:
    for loss in (cross_entropy, margin, dlr):
        assert loss(Z.bfloat16(), Y).dtype == torch.float32


def test_an_examples_gradient_does_not_depend_on_its_batch() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    x = torch.linspace(0, 1, 8).view(2, 1, 2, 2)
    _, _, both = gradient(net, x, Y, "ce")
    for i in range(2):
        _, _, alone = gradient(net, x[i : i + 1], Y[i : i + 1], "ce")
        assert torch.allclose(alone[0], both[i], atol=1e-7)


def test_the_gradient_reaches_x_under_no_grad_and_leaves_none_in_the_weights() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 4))
    x = torch.rand(2, 1, 2, 2)
    with torch.no_grad(), frozen(net):
        z, loss, slope = gradient(net, x, Y, "margin")
    assert bool((slope != 0).any())
    assert not any(tensor.requires_grad for tensor in (z, loss, slope, x))
    assert all(parameter.grad is None for parameter in net.parameters())


def test_the_loss_stays_in_float32_under_autocast() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 4))
    x = torch.rand(2, 1, 2, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z, loss, slope = gradient(net, x, Y, "ce")
    assert z.dtype == torch.bfloat16
    assert loss.dtype == slope.dtype == torch.float32
    assert torch.equal(loss, cross_entropy(z.float(), Y))


def test_a_step_function_without_a_graph_has_gradient_zero() -> None:
    def steps(x: Tensor) -> Tensor:
        return (x.flatten(1) > 0.5).float()

    _, _, slope = gradient(steps, torch.rand(2, 1, 2, 2), Y, "ce")
    assert torch.equal(slope, torch.zeros(2, 1, 2, 2))
