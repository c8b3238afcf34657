"""Channels that are off in every image are left out, and nothing else changes.

More of the same: python -m tests.property.test_dead_channels FIRST SECONDS
"""

import sys
import time

import pytest
import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from stages.bounds import _sweep
from stages.bounds._backward import Chain
from stages.bounds._channels import Channelwise
from stages.bounds._interval import SINGLE
from stages.bounds.base import Box
from stages.seeding import generator
from tests.networks import draw_weights

_K = 3


class _Block(nn.Module):
    """Convolutions, sums, shortcuts and normalisations as drawn; biases that put some channels out."""

    def __init__(self, rng: Generator, channels: int) -> None:
        super().__init__()

        def draw(most: int) -> int:
            return int(torch.randint(most, (), generator=rng))

        self.way, self.stride = draw(6), 1 + draw(2)
        made, groups = 8, 2 if channels % 2 == 0 and draw(6) == 0 else 1
        kernel = (1, 3, 3, 2)[draw(4)]
        self.body = nn.Conv2d(channels, made, kernel, self.stride, draw(kernel // 2 + 1), groups=groups)
        self.short = nn.Conv2d(channels, made, 1, self.stride)
        self.inner = nn.Conv2d(made, made, 3, 1, 1)
        self.norm: nn.Module = nn.BatchNorm2d(made) if draw(4) == 0 else nn.Identity()
        draw_weights(self, rng)
        with torch.no_grad():
            for bias in (self.body.bias, self.inner.bias):
                assert bias is not None
                bias[torch.rand(made, generator=rng) < (0.0, 0.4, 0.7, 1.0)[draw(4)]] = -50

    def forward(self, x: Tensor) -> Tensor:
        both: Tensor
        y: Tensor = self.norm(self.body(x))
        if self.way == 0:
            return F.relu(y)
        if self.way == 1:
            return F.relu(self.inner(F.relu(y)))
        if self.way == 2:
            both = F.relu(y) + self.inner(F.relu(y))
            return both
        short = F.adaptive_avg_pool2d(self.short(x), (y.shape[2], y.shape[3]))
        if y.shape == self.short(x).shape:
            short = self.short(x)
        if self.way == 3:
            return F.relu(self.inner(F.relu(y)) + short)
        if self.way == 4:
            return F.relu(short + self.inner(y.mean((2, 3), keepdim=True)))
        both = y + short
        return F.relu(both) if float(self.short.weight.sum()) > 0 else both + F.relu(both)


def _net(rng: Generator) -> nn.Module:
    blocks = [_Block(rng, channels) for channels in (2, 8, 8)[: 2 + int(torch.randint(2, (), generator=rng))]]
    last = nn.Linear(8, _K)
    nn.init.normal_(last.weight, generator=rng)
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), last).eval().requires_grad_(False)


def _asked(rng: Generator) -> tuple[Box, Tensor]:
    x = torch.rand(3, 2, 16, 16, generator=rng, dtype=torch.float64)
    width = float(10.0 ** (-3 * torch.rand((), generator=rng)))
    return Box(x - width, x + width), torch.randn(3, 4, _K, generator=rng, dtype=torch.float64)


@torch.no_grad()
def _check(seed: int) -> int:
    """How many values are left with fewer channels."""
    rng = generator(seed, "dead channels")
    net, (box, rows) = _net(rng).double(), _asked(rng)
    chains = Chain(net, box, 0.0, True), Channelwise(net, box, 0.0, True)
    for chain in chains:
        _sweep.follow(chain)
    whole, left = (_sweep.logits(chain, rows, 2.0) for chain in chains)
    torch.testing.assert_close(left, whole, rtol=1e-6, atol=1e-6 * float(whole.abs().max()))
    single, low, high = net.float(), box.low.float(), box.high.float()
    chain = Channelwise(single, Box(low, high), SINGLE, False)
    _sweep.follow(chain)
    least = _sweep.logits(chain, rows.float(), 2.0)
    for _ in range(4):
        for share in (torch.rand(low.shape, generator=rng), torch.randint(2, low.shape, generator=rng)):
            point = torch.minimum(low + share * (high - low), high)
            found = torch.einsum("brk,bk->br", rows.float().double(), single(point).double())
            assert bool((found >= least).all())
    return len(chains[1].alive)


@pytest.mark.parametrize("seed", range(24))
def test_bounds_are_those_of_all_channels(seed: int) -> None:
    _check(seed)


def test_channels_are_left_out() -> None:
    assert sum(_check(seed) > 0 for seed in range(24)) >= 6


if __name__ == "__main__":
    seed, left, used = int(sys.argv[1]), time.monotonic() + float(sys.argv[2]), 0
    first = seed
    while time.monotonic() < left:
        used += _check(seed) > 0
        seed += 1
    print(f"{seed - first} networks, {used} with channels left out: no difference, no escape")
