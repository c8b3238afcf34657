"""Whatever a convolution is like, it is affine, and bounds are the least value of an affine function of the image."""

from collections.abc import Callable
from itertools import product
from typing import Literal

import pytest
import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from stages.bounds.base import Ball, Box, Certifier
from stages.bounds.crown import Crown
from stages.bounds.crown_forward import CrownForward
from stages.bounds.crown_ibp import CrownIBP
from stages.bounds.ibp import IBP
from stages.seeding import generator

SIDE, CHANNELS, K = 7, 4, 3


class Padded(nn.Module):
    def __init__(self, mode: str, value: float = 0.0) -> None:
        super().__init__()
        self.mode, self.value = mode, value

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x, (2, 1, 0, 3), self.mode, self.value if self.mode == "constant" else None)


def convolution(rng: Generator, transposed: bool, size: int) -> nn.Module:
    def pick(*choices: int) -> int:
        return choices[int(torch.randint(len(choices), (1,), generator=rng))]

    groups, stride, dilation, kernel = pick(1, 2, 4), pick(1, 2, 3), pick(1, 2), (pick(1, 2, 3), pick(1, 2, 3))
    pad, bias = pick(0, 1), bool(pick(0, 1))
    if size == 1:
        one = nn.Conv1d(CHANNELS, CHANNELS, kernel[0], stride, pad, dilation, groups, bias)
        return nn.Sequential(nn.Flatten(2), one, nn.Unflatten(2, (1, -1)))
    if transposed:
        more = pick(0, 1) if stride > 1 or dilation > 1 else 0
        more = min(more, max(stride, dilation) - 1)
        return nn.ConvTranspose2d(CHANNELS, CHANNELS, kernel, stride, 0, more, groups, bias, dilation)
    return nn.Conv2d(CHANNELS, CHANNELS, kernel, stride, pad, dilation, groups, bias)


def network(seed: int) -> nn.Sequential:
    """Two random layers between what pads, averages and adds; every one of the kinds within a few seeds."""
    rng = generator(seed, "affine")
    layers: list[nn.Module] = [convolution(rng, seed % 3 == 1, 1 if seed % 5 == 4 else 2)]
    modes: list[Literal["reflect", "replicate", "circular"]] = ["reflect", "replicate", "circular"]
    pads: list[Callable[[], nn.Module]] = [
        lambda: Padded(modes[seed % 3]),
        lambda: Padded("constant", 0.7),
        lambda: nn.AvgPool2d(2, 1, 1, ceil_mode=True, count_include_pad=False),
        lambda: nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, padding_mode=modes[seed % 3], groups=2),
        lambda: nn.Conv2d(CHANNELS, CHANNELS, 3, padding="same", dilation=2),
        lambda: nn.Upsample(scale_factor=2),
        lambda: nn.BatchNorm2d(CHANNELS),
    ]
    around = pads[seed % len(pads)]()
    layers = [around, *layers] if seed % 5 != 4 else layers
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d((2, 3)), nn.Flatten(), nn.LazyLinear(K)).eval()
    with torch.no_grad():
        net(torch.zeros(2, CHANNELS, SIDE, SIDE))
        for value in net.state_dict().values():
            if value.is_floating_point():
                value.copy_(torch.rand(value.shape, generator=rng) + 0.1 if value.dim() < 2 else value * 2)
    return net


def least(net: nn.Module, box: Box, rows: Tensor) -> Tensor:
    """Exact but for float64: the value at the centre and the slope of an affine function say everything."""
    centre = ((box.low + box.high) / 2).requires_grad_()
    value = torch.einsum("brk,bk->br", rows, net(centre))
    found = []
    for r in range(rows.shape[1]):
        (slope,) = torch.autograd.grad(value[:, r].sum(), centre, retain_graph=True)
        flat = slope.flatten(1)
        if box.ball is None:
            reach = (flat.abs() * ((box.high - box.low) / 2).flatten(1)).sum(1)
        else:
            reach = box.ball.eps * (flat.norm(dim=1) if box.ball.norm == "l2" else flat.abs().amax(1))
        found.append(value[:, r] - reach)
    return torch.stack(found, 1).detach()


def box(seed: int, kind: str) -> tuple[Box, Tensor]:
    rng = generator(seed, "box")
    x = torch.rand(2, CHANNELS, SIDE, SIDE, generator=rng, dtype=torch.float64)
    rows = torch.randn(2, 2, K, generator=rng, dtype=torch.float64)
    if kind == "linf":
        reach = torch.rand(x.shape, generator=rng, dtype=torch.float64)
        return Box(x - reach, x + reach), rows
    # So wide a box that it cuts nothing off the ball.
    return Box(x - 1, x + 1, Ball(x, "l2" if kind == "l2" else "l1", 0.9)), rows


@pytest.mark.parametrize("seed", range(14))
def test_affine_networks_are_bounded_exactly(seed: int) -> None:
    net = network(seed).double()
    backward: list[Certifier] = [CrownIBP(arithmetic="real"), Crown(arithmetic="real")]
    whole: list[Certifier] = [IBP(arithmetic="real"), CrownForward(arithmetic="real"), *backward]
    for kind, certifiers in (("linf", whole), ("l2", backward), ("l1", backward)):
        inside, rows = box(seed, kind)
        exact = least(net, inside, rows)
        for certifier in certifiers:
            with torch.no_grad():
                bound = certifier.lower(net, inside, rows)
            assert bool((bound <= exact + 1e-12).all())
            # Points in a ball are given in float32: it is taken a millionth wider.
            assert torch.allclose(bound, exact, rtol=0, atol=1e-9 if kind == "linf" else 1e-4)


def test_every_kind_occurs() -> None:
    seen = {type(layer).__name__ for seed in range(14) for layer in network(seed).modules()}
    assert {"Conv1d", "Conv2d", "ConvTranspose2d", "Padded", "AvgPool2d", "Upsample", "BatchNorm2d"} <= seen
    convs = [m for seed in range(14) for m in network(seed).modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)]
    for groups, stride in product((1, 4), (1, 2)):
        assert any(m.groups == groups and m.stride[0] == stride for m in convs)
    assert {m.dilation[0] for m in convs} >= {1, 2}
    assert {getattr(m, "padding_mode", "") for m in convs} >= {"zeros", "reflect", "replicate"}
