"""Folding changes nothing but the number of operations."""

import torch
from torch import Tensor, nn

from stages import seeding
from stages.nn.fold import dense, fold
from stages.nn.layers.gdws_conv import GDWSConv, like
from tests.networks import arch, built, images, lived_in


def _norms(net: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) for module in net.modules())


def _seeded(net: nn.Module) -> nn.Module:
    for name, parameter in net.named_parameters():
        parameter.data = torch.randn(parameter.shape, generator=seeding.generator(0, name)) / 4
    return lived_in(net)


def test_every_batch_norm_of_a_resnet_goes_and_names_stay() -> None:
    net = built(arch("resnet", blocks=(1, 1)))
    small = fold(net)
    assert _norms(net) == 6
    assert _norms(small) == 0
    assert [name for name, _ in small.named_modules()] == [name for name, _ in net.named_modules()]
    x = images(4, (3, 32, 32))
    torch.testing.assert_close(small(x), net(x), rtol=1e-5, atol=1e-5)


def test_only_the_inner_norms_of_a_pre_activation_network_go() -> None:
    net = built(arch("wrn"))
    small = fold(net)
    assert (_norms(net), _norms(small)) == (7, 4)
    x = images(4, (3, 32, 32))
    torch.testing.assert_close(small(x), net(x), rtol=1e-5, atol=1e-5)


def test_linear_and_gdws_layers_absorb_too() -> None:
    net = _seeded(
        nn.Sequential(
            like(nn.Conv2d(3, 5, 3, bias=False), [0, 0, 2]), nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten(),
            nn.Linear(5 * 6 * 6, 7, bias=False), nn.BatchNorm1d(7, affine=False),
        )
    )  # fmt: skip
    x = images(4, (3, 8, 8))
    assert _norms(fold(net)) == 0
    torch.testing.assert_close(fold(net)(x), net(x), rtol=1e-5, atol=1e-5)
    assert not any(isinstance(module, GDWSConv) for module in dense(net).modules())
    torch.testing.assert_close(dense(net)(x), net(x), rtol=1e-5, atol=1e-5)


class _Shared(nn.Module):
    """One convolution whose output two readers want, one normalisation that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.bn = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv1(x)
        z: Tensor = self.bn(self.conv2(self.bn(y)))
        return y + z


def test_shared_layers_stay_as_they_are() -> None:
    net = _seeded(_Shared())
    x = images(2, (3, 4, 4))
    assert _norms(fold(net)) == 1
    assert torch.equal(fold(net)(x), net(x))


class _Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.bn(self.conv(x))
        return y if y.sum() > 0 else -y


def test_a_network_that_branches_on_values_comes_back_unfolded() -> None:
    net = _seeded(_Branching())
    x = images(2, (3, 4, 4))
    assert torch.equal(fold(net)(x), net(x))


def test_the_original_is_not_touched() -> None:
    net = built(arch("resnet", blocks=(1, 1)))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    fold(net)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
