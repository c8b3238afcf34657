"""The form for attacks is the same function, with the same slopes and the same curvature."""

import pytest
import torch
from torch import Tensor, nn

from stages.evaluate import frozen
from stages.nn.brisk import _Narrow, brisk
from tests.networks import built, every_builder, images


def _slopes(net: nn.Module, x: Tensor) -> Tensor:
    point = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(net(point).square().sum(), point)
    return slope


@pytest.mark.parametrize("number", range(len(every_builder())), ids=[arch.builder for arch in every_builder()])
def test_outputs_and_slopes_of_every_builder_agree(number: int) -> None:
    arch = every_builder()[number]
    net, x = built(arch), images(3, arch.input_shape)
    state = {name: value.clone() for name, value in net.state_dict().items()}
    twin = brisk(net)
    assert not twin.training
    with frozen(net), frozen(twin), torch.no_grad():
        torch.testing.assert_close(twin(x), net(x), rtol=1e-3, atol=1e-4)
    with frozen(net), frozen(twin):
        torch.testing.assert_close(_slopes(twin, x), _slopes(net, x), rtol=1e-3, atol=1e-3)
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())


@pytest.mark.parametrize(("stride", "padding", "kernel"), [(1, 0, 1), (1, 1, 3), (2, 1, 4), (3, (2, 0), (5, 2))])
@pytest.mark.parametrize("bias", [False, True])
def test_narrow_convolutions_have_the_slopes_and_second_derivatives_of_torchs(
    stride: int, padding: int | tuple[int, int], kernel: int | tuple[int, int], bias: bool
) -> None:
    with torch.random.fork_rng():
        conv = nn.Conv2d(2, 13, kernel, stride, padding, bias=bias).double().requires_grad_(False)
    twin = brisk(nn.Sequential(conv, nn.Tanh()))
    assert isinstance(twin[0], _Narrow)  # type: ignore[index]
    x = torch.rand(2, 2, 6, 5, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(_slopes(twin, x), _slopes(nn.Sequential(conv, nn.Tanh()), x))
    assert torch.autograd.gradcheck(twin, x, fast_mode=True)
    assert torch.autograd.gradgradcheck(twin, x, fast_mode=True)


def test_what_it_has_no_form_for_stays_as_it_is() -> None:
    for conv in (
        nn.Conv2d(3, 32, 3, dilation=2),
        nn.Conv2d(3, 33, 3, groups=3),
        nn.Conv2d(3, 32, 3, padding=1, padding_mode="circular"),
        nn.Conv2d(3, 32, 3, padding="same"),
        nn.Conv2d(3, 4, 5),
        nn.Conv2d(8, 32, 3),
    ):
        assert type(brisk(nn.Sequential(conv))[0]) is nn.Conv2d  # type: ignore[index]
    assert type(brisk(nn.Sequential(nn.Flatten(2)))[0]) is nn.Flatten  # type: ignore[index]
    assert type(brisk(nn.Flatten())) is nn.Flatten


def test_weights_that_want_slopes_still_get_them() -> None:
    net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.Flatten())
    twin = brisk(net)
    twin(torch.rand(2, 1, 5, 5)).sum().backward()
    assert twin[0].weight.grad is not None  # type: ignore[index]
    assert float(twin[0].weight.grad.abs().sum()) > 0  # type: ignore[index]
