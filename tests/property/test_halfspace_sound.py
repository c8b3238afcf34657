"""Boxes of the points that refute a row: no such point, in float32 as executed, has a value outside."""

from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stages.bounds import _neurons, _slopes, _sweep
from stages.bounds._backward import Chain
from stages.bounds._halfspace import Halfspace
from stages.bounds._interval import SINGLE
from stages.bounds._joint import _best, narrowed
from stages.bounds._roots import Boxes, tightened
from stages.bounds._trace import Op
from stages.bounds.base import Box
from stages.seeding import generator

_BOXES, _POINTS, _INPUTS = 4, 200, 5


class Net(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        rng = generator(seed, "halfspace")
        self.first, self.second, self.last = nn.Linear(_INPUTS, 10), nn.Linear(10, 10), nn.Linear(10, 3)
        with torch.no_grad():
            for value in self.parameters():
                value.copy_(
                    torch.randn(value.shape, generator=rng)
                    * (2 / value.shape[-1]) ** 0.5
                    * (0.3 if value.dim() == 1 else 1.0)
                )

    def inputs(self, x: Tensor) -> Tensor:
        """What both ReLUs read, [..., 20]."""
        first = self.first(x)
        return torch.cat([first, self.second(first.relu())], -1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.second(self.first(x).relu()).relu())
        return out


@pytest.mark.parametrize("how", ["rows", "neurons", "joint"])
@pytest.mark.parametrize("seed", range(4))
def test_values_of_points_that_refute_stay_inside(seed: int, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if how == "rows":
        monkeypatch.setattr(_neurons, "way", lambda *_: None)
    net, rng = Net(seed).eval(), generator(seed, "points")
    low = 0.3 * torch.randn(_BOXES, _INPUTS, generator=rng) - 0.5
    high = low + 0.5 + 0.5 * torch.rand(_BOXES, _INPUTS, generator=rng)
    x = low + torch.rand(_POINTS, _BOXES, _INPUTS, generator=rng) * (high - low)
    row = torch.randn(_BOXES, 3, generator=rng)
    with torch.no_grad():
        values = (net(x).double() * row.double()).sum(2)
        goal = values.quantile(0.05, 0)
        loose = Chain(net, Box(low, high), SINGLE, False)
        before = tightened(loose, 2.0, _sweep.plain, torch.inf, {})
        watch: dict[str, Tensor] = {}
        found = loose.bound(loose.graph.output, row.unsqueeze(0), watch=watch)[0]
        space = Halfspace.of(loose, found, watch[loose.graph.input][0], goal)
        chain = Chain(net, Box(low, high), SINGLE, False)
        after = tightened(chain, 2.0, _slopes.optimised(3, 0.5, space), torch.inf, before, sharp=False)
        empty, relus = chain.empty, [op for op in chain.done if op.kind == "relu"]
        if how == "joint":
            slopes, summed = _slopes.drawn(loose, loose.graph.output, 1), width(relus, after)
            begin = partial(Chain, net, Box(low, high), SINGLE, False)
            after, empty = narrowed(begin, relus, row, goal, slopes, before, 2.0, 5, torch.inf)
            assert width(relus, after) < 0.97 * summed
    assert not bool(empty.any())
    ends = [torch.cat([boxes[op.reads()[0]][side] for op in relus], 1) for boxes in (before, after) for side in (0, 1)]
    assert float(((ends[3] - ends[2]) / (ends[1] - ends[0]).clamp(min=1e-6)).mean()) < 0.98
    for points in (x, *driven(net, x, low, high, row, goal)):
        with torch.no_grad():
            refutes = (net(points).double() * row.double()).sum(2) <= goal
            there = net.inputs(points)
        assert bool(refutes.any(0).all())
        inside = (there >= ends[2]) & (there <= ends[3])
        assert bool((inside.all(2) | ~refutes).all())


def width(relus: list[Op], boxes: Boxes) -> float:
    return float(sum((high - low).sum() for low, high in (boxes[op.reads()[0]] for op in relus)))


def driven(net: Net, x: Tensor, low: Tensor, high: Tensor, row: Tensor, goal: Tensor) -> list[Tensor]:
    """Points that refute their rows, moved up and down each value's gradient as far as they still do."""
    found = []
    for value in range(20):
        point = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(net.inputs(point)[..., value].sum(), point)
        for sign in (-1, 1):
            stays, goes = x, torch.where(sign * slope > 0, high, low)
            with torch.no_grad():
                for _ in range(12):
                    middle = (stays + goes) / 2
                    met = ((net(middle).double() * row.double()).sum(2) <= goal).unsqueeze(2)
                    stays, goes = torch.where(met, middle, stays), torch.where(met, goes, middle)
            found.append(stays)
    return found


@pytest.mark.parametrize("seed", range(3))
def test_exact_where_the_network_is_affine(seed: int) -> None:
    """Over a rectangle cut by a line, a linear function is least in a corner of it or where the line meets a side."""
    net, rng = nn.Linear(2, 3).eval(), generator(seed, "affine")
    with torch.no_grad():
        chain, rim, row, goal = cut(net, rng)
        values = net(rim).double()
        watch: dict[str, Tensor] = {}
        found = chain.bound(chain.graph.output, row.unsqueeze(0), watch=watch)[0]
        space = Halfspace.of(chain, found, watch[chain.graph.input][0], goal)
        asked = torch.cat([torch.eye(3), -torch.eye(3)]).unsqueeze(1)
        found = chain.bound(chain.graph.output, asked, watch=watch)
        better = space.better(chain, found, watch[chain.graph.input])[:, 0]
        there = values[values @ row[0].double() <= goal]
        least = torch.cat([there.amin(0), -there.amax(0)])
    assert bool((better <= least).all())
    torch.testing.assert_close(better, least, rtol=0, atol=0.05)
    assert float((better - found[:, 0]).max()) > 0.1


@pytest.mark.parametrize("seed", range(3))
def test_joint_bounds_are_exact_where_no_relu_bends(seed: int) -> None:
    net, rng = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 3)).eval(), generator(seed, "stable")
    with torch.no_grad():
        chain, rim, row, goal = cut(net, rng)
        [bend] = [op for op in chain.done if op.kind == "relu"]
        units = torch.cat([torch.eye(3), -torch.eye(3)]).unsqueeze(1)
        found = _best(chain, bend, units, row, goal, {}, 30)[:, 0]
        there = net[0](rim).double()[net(rim).double() @ row[0].double() <= goal]
    least = torch.cat([there.amin(0), -there.amax(0)])
    assert bool((found <= least).all())
    torch.testing.assert_close(found, least, rtol=0, atol=0.05)


class Signed(nn.Module):
    """Lines of sign are constants, so no coefficient of a row ever comes by the ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sign(self.first(x).relu() - 0.2) + F.pad(x, (0, 1))


@pytest.mark.parametrize("seed", range(3))
def test_values_that_no_line_of_the_row_reads_are_bounded_all_the_same(seed: int) -> None:
    net, rng = Signed().eval(), generator(seed, "signed")
    with torch.no_grad():
        chain, rim, row, goal = cut(net, rng)
        [bend] = [op for op in chain.done if op.kind == "relu"]
        units = torch.cat([torch.eye(3), -torch.eye(3)]).unsqueeze(1)
        found = _best(chain, bend, units, row, goal, {}, 5)[:, 0]
        there = net.first(rim).double()[net(rim).double() @ row[0].double() <= goal]
        least = torch.cat([there.amin(0), -there.amax(0)])
    assert bool((found <= least).all())
    plain = torch.cat([chain.values[bend.reads()[0]].low, -chain.values[bend.reads()[0]].high], 1)[0]
    assert bool((found >= plain - 1e-3).all())


def cut(net: nn.Module, rng: torch.Generator) -> tuple[Chain, Tensor, Tensor, Tensor]:
    """A network with random weights, followed over a rectangle; its rim; a row, and a goal that cuts the rim."""
    for name, value in net.named_parameters():
        value.copy_(torch.randn(value.shape, generator=rng) + (8 if name == "0.bias" else 0))
    low = torch.randn(1, 2, generator=rng)
    high = low + torch.rand(1, 2, generator=rng)
    share = torch.linspace(0, 1, 2001).unsqueeze(1)
    ends = [(low, low + (high - low) * side) for side in torch.eye(2)] + [
        (high, high - (high - low) * side) for side in torch.eye(2)
    ]
    rim = torch.cat([a + share * (b - a) for a, b in ends])
    row = torch.randn(1, 3, generator=rng)
    chain = Chain(net, Box(low, high), SINGLE, False)
    _sweep.follow(chain)
    return chain, rim, row, (net(rim).double() @ row[0].double()).quantile(0.3).reshape(1)
