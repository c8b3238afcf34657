"""Optimised slopes: the closed form that only they reach, and order."""

import itertools

import pytest
import torch
from torch import Tensor, nn

from stages.bounds import _sweep
from stages.bounds._backward import Chain
from stages.bounds.alpha_crown import AlphaCrown
from stages.bounds.base import Box, Certifier
from stages.bounds.branch_and_bound import BranchAndBound
from stages.bounds.crown import Crown
from stages.seeding import generator


class Residual(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x) - x / 2


def test_residual_of_the_notes_is_exact_at_slope_one_half() -> None:
    x = torch.zeros(1, 1, dtype=torch.float64)
    rows = torch.tensor([[[1.0], [-1.0]]], dtype=torch.float64)
    found = AlphaCrown(arithmetic="real", steps=60).lower(Residual().eval(), Box(x - 1, x + 1), rows)
    assert found[0].tolist() == pytest.approx([0.0, -0.5], abs=2e-2)
    assert float(found[0, 0]) <= 0


class Beside(nn.Module):
    """Two ReLUs of which neither comes before the other, and one after both."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.after = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        both = [self.one(x).relu(), self.two(x.tanh()).relu()]
        found: Tensor = self.after(torch.cat(both, 1)).relu()
        return found


class Turned(nn.Module):
    """The batch comes second: [S, B, D]."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(2, 2), nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.inner(x.view(-1, 3, 2).transpose(0, 1)).relu()
        found: Tensor = self.outer(self.inner(inner).relu().mean(0))
        return found


@pytest.mark.parametrize("certifier", [AlphaCrown(steps=3, box_steps=2), BranchAndBound(seconds=0.2, limit=9)])
@pytest.mark.parametrize(("net", "width"), [(Beside(), 4), (Turned(), 6)])
def test_relus_side_by_side_and_a_batch_in_the_second_place(certifier: Certifier, net: nn.Module, width: int) -> None:
    rng = generator(0, "beside")
    with torch.no_grad():
        for value in net.parameters():
            value.copy_(torch.randn(value.shape, generator=rng))
        x, rows = torch.rand(2, width, generator=rng), torch.randn(2, 2, 3, generator=rng)
        found = certifier.lower(net.eval(), Box(x - 0.5, x + 0.5), rows)
        assert bool((found >= Crown().lower(net, Box(x - 0.5, x + 0.5), rows) - 1e-5).all())
        for _ in range(50):
            point = x - 0.5 + torch.rand(x.shape, generator=rng)
            assert bool((found <= torch.einsum("brk,bk->br", rows, net(point)) + 1e-5).all())


def test_what_a_free_slope_adds_to_a_sum_is_covered_too() -> None:
    linear = nn.Linear(1, 200)
    net = nn.Sequential(linear, nn.ReLU()).eval()
    with torch.no_grad():
        linear.weight.fill_(2.0)
        linear.bias.fill_(-1.0)
        chain = Chain(net, Box(torch.zeros(1, 1), torch.full((1, 1), 0.75)), 0.0, False)
        _sweep.follow(chain)
        ones = torch.ones(1, 1, 200)
        _, bias = chain.fronts[chain.graph.output](chain, ones, ones)
    # CROWN's slope is 0 here, and a free one of 1 adds 200 offsets of -1.
    assert float(bias) <= -200 * (1 + 2 * chain.dots)


def mlp(seed: int, *widths: int) -> nn.Sequential:
    rng = generator(seed, "alpha")
    layers: list[nn.Module] = [nn.Flatten()]
    for i, (a, b) in enumerate(itertools.pairwise(widths)):
        layers += [nn.Linear(a, b), *((nn.ReLU(),) if i < len(widths) - 2 else ())]
    net = nn.Sequential(*layers).eval()
    with torch.no_grad():
        for value in net.parameters():
            value.copy_(torch.randn(value.shape, generator=rng) / value.shape[-1] ** 0.5)
    return net


@pytest.mark.parametrize("arithmetic", ["real", "float32"])
def test_never_looser_than_crown_mostly_tighter_and_below_every_sample(arithmetic: str) -> None:
    net = mlp(0, 6, 16, 16, 16, 4)
    rng = generator(0, "points")
    rows = torch.randn(5, 3, 4, generator=rng)
    certifiers = [AlphaCrown.load({"arithmetic": arithmetic}), Crown.load({"arithmetic": arithmetic})]
    for eps in (0.05, 0.3, 1.0):
        x = torch.rand(5, 6, generator=rng)
        with torch.no_grad():
            alpha, plain = (c.lower(net, Box(x - eps, x + eps), rows) for c in certifiers)
            least = torch.full((5, 3), torch.inf)
            for i in range(300):
                share = torch.rand(x.shape, generator=rng)
                point = x - eps + (share.round() if i % 2 else share) * 2 * eps
                least = torch.minimum(least, torch.einsum("brk,bk->br", rows, net(point)))
        assert bool((alpha >= plain).all())
        assert bool((alpha <= least + 1e-5).all())
    assert float((alpha - plain).mean()) > 0.05


def test_more_steps_never_loosen_the_last_rows_and_boxes_matter() -> None:
    net = mlp(1, 6, 16, 16, 16, 4)
    rng = generator(1, "points")
    rows, x = torch.randn(4, 3, 4, generator=rng), torch.rand(4, 6, generator=rng)
    box = Box(x - 0.5, x + 0.5)
    few, many = (AlphaCrown(steps=steps, box_steps=0).lower(net, box, rows) for steps in (2, 20))
    assert bool((many >= few - 1e-6).all())
    whole = AlphaCrown().lower(net, box, rows)
    assert float((whole - many).mean()) > 0
