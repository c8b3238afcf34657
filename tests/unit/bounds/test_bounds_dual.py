"""Bounds of domains with known signs: sound where the signs hold, and climbed along their true derivatives."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from stages.bounds import _slopes, _sweep
from stages.bounds._backward import Chain
from stages.bounds._dual import Known, _gradients, _reached, ascend
from stages.bounds._interval import SINGLE
from stages.bounds.base import Box
from stages.seeding import generator
from tests.networks import Single


class Net(nn.Module):
    """Two hidden layers, beside which the first skips, and a third of another kind."""

    def __init__(self, seed: int, bend: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise((4, 12, 12, 8, 3)))
        self.bend = bend
        rng = generator(seed, "dual")
        with torch.no_grad():
            for value in self.parameters():
                value.copy_(torch.randn(value.shape, generator=rng) / value.shape[-1] ** 0.5)

    def forward(self, x: Tensor) -> Tensor:
        first, second, third, last = self.layers
        x = first(x).relu()
        x = (second(x).relu() + x).relu()
        out: Tensor = last(self.bend(third(x)))
        return out


def chain_of(net: nn.Module, points: Tensor, seed: int) -> tuple[Chain, Known, Tensor]:
    """A chain for boxes round points [B, 4], signs of some values that hold at the points, and those that do [B, P]."""
    rng = generator(seed, "known")
    box = Box(points - 0.5, points + 0.5)
    chain = Chain(net, box, SINGLE, False)
    _sweep.follow(chain)
    bends = tuple(op for op in chain.done if op.kind == "relu")
    widths = tuple(chain.flat(op.reads()[0], chain.values[op.reads()[0]].low).shape[1] for op in bends)
    at = torch.stack([torch.randperm(sum(widths), generator=rng)[:4] for _ in points])
    x = box.low + torch.rand(400, *points.shape, generator=rng) * (box.high - box.low)

    def inputs(x: Tensor) -> Tensor:
        values = {chain.graph.input: x}
        for op in chain.graph.ops:
            if op.result in chain.graph.moving and not op.counts:
                held = {**chain.values, **values}
                args = [held[arg.name] if hasattr(arg, "name") else arg for arg in op.args]
                values[op.result] = op.target(*args, **op.kwargs)
        return torch.cat([values[op.reads()[0]] for op in bends], 1)

    with torch.no_grad():
        there = torch.stack([inputs(some) for some in x])  # [P, B, F]
        mine = there.gather(2, at.expand(len(x), -1, -1))
        point = mine.median(0).values
        side = torch.where(mine[0] > point, 1.0, -1.0)
        side[:, 3] = 0.0
        holds = ((mine - point) * side >= 0).all(2)
    known = Known(bends, widths, at, side, point, torch.rand(at.shape, generator=rng))
    assert bool(holds.any(0).all())
    return chain, known, torch.where(holds.unsqueeze(2), x, x[0])


def redrawn(net: nn.Module, chain: Chain, known: Known) -> Chain:
    """The chain with the boxes cut by what is known."""
    low, high = known.ends()
    again = Chain(net, Box(chain.ends.inside.low, chain.ends.inside.high), SINGLE, False)

    def cut(op: object) -> None:
        for bend in known.bends:
            if bend is op:
                again.tighten(bend.reads()[0], low[bend.result], high[bend.result])

    _sweep.follow(again, cut)
    return again


@pytest.mark.parametrize("bend", [nn.ReLU(), nn.Tanh(), nn.Softmax(1)], ids=str)
@pytest.mark.parametrize("seed", range(2))
def test_bounds_hold_where_the_signs_do_and_climb(seed: int, bend: nn.Module) -> None:
    net = Net(seed, bend).eval()
    rng = generator(seed, "points")
    points, row = torch.randn(5, 4, generator=rng), torch.randn(5, 3, generator=rng)
    with torch.no_grad():
        loose, known, x = chain_of(net, points, seed)
        chain = redrawn(net, loose, known)
        start = _slopes.drawn(chain, chain.graph.output, 1)
        known.push.zero_()
        goal = torch.full((5,), torch.inf, dtype=torch.float64)
        first, last = (ascend(chain, row, start, known, steps, 0.1, goal).best for steps in (0, 20))
        seen = (net(x.flatten(0, 1)).view(len(x), 5, 3) * row).sum(2).amin(0)
    assert bool((last >= first).all())
    assert float((last - first).max()) > 1e-4
    assert bool((last <= seen).all())


@pytest.mark.parametrize("bend", [nn.ReLU(), nn.Tanh()], ids=str)
def test_derivatives_are_those_of_the_bound(bend: nn.Module) -> None:
    net = Net(1, bend).eval()
    rng = generator(1, "points")
    points, row = torch.randn(5, 4, generator=rng), torch.randn(5, 3, generator=rng)
    with torch.no_grad():
        loose, known, _ = chain_of(net, points, 1)
        chain = redrawn(net, loose, known)
        start = _slopes.drawn(chain, chain.graph.output, 1)
        alphas = {key: torch.rand(value.shape, generator=rng) for key, value in start.items()}
    free = [value.requires_grad_() for value in (*alphas.values(), known.push)]
    pushed = known.dense(-known.side * known.push, 0.0, "sum")
    more = {op.result: chain.unflat(op.reads()[0], pushed[op.result]).unsqueeze(0) for op in known.used()}
    watch: dict[str, Tensor] = {}
    found = chain.bound(chain.graph.output, row.unsqueeze(0), lower=alphas, push=more, watch=watch)
    total = found.sum() + (known.push * known.side * known.point).sum()
    expected = torch.autograd.grad(total, free, materialize_grads=True, allow_unused=True)
    with torch.no_grad():
        lowest = chain.ends.lowest(watch[chain.graph.input][0])
        reached = _reached(chain, alphas, watch, lowest)
        grads = _gradients(chain, alphas, known, watch, reached)
    assert max(float(grad.abs().max()) for grad in expected) > 0.1
    for grad, exact in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, exact, rtol=1e-3, atol=1e-4)


def alone(net: nn.Module, reach: float, points: Tensor, sides: Tensor, push: Tensor) -> float:
    """The bound on the first output over [-reach, reach]^2 with constraints [D] on the first input of a tanh."""
    chain = Chain(net, Box(torch.full((1, 2), -reach), torch.full((1, 2), reach)), SINGLE, False)
    _sweep.follow(chain)
    bends = tuple(op for op in chain.done if op.kind == "tanh")
    at = torch.zeros(1, len(points), dtype=torch.int64)
    known = Known(bends, (2,), at, sides.unsqueeze(0), points.unsqueeze(0), push.unsqueeze(0))
    goal = torch.full((1,), torch.inf, dtype=torch.float64)
    return float(ascend(chain, torch.tensor([[1.0, 0.0]]), {}, known, 0, 0.1, goal).best)


def test_a_multiplier_that_no_coefficient_takes_moves_no_bound() -> None:
    # Lines of sign are constants, so nothing asks for the tanh; where its input is 0.4 or more, the least value is 1.4.
    net = Single(lambda x: torch.sign(torch.tanh(x)) + x)
    assert alone(net, 1.0, torch.tensor([0.4]), torch.tensor([1.0]), torch.tensor([50.0])) <= 1.4


def test_multipliers_of_one_value_lose_what_their_float32_sum_does() -> None:
    # They say z = p; -2^26 - 1 + 2^26 is summed to 0.
    point = 3.0
    net = Single(lambda x: torch.tanh(x) - x)
    points, sides = torch.tensor([point, point, point]), torch.tensor([1.0, 1.0, -1.0])
    push = torch.tensor([2.0**26, 1.0, 2.0**26])
    with torch.no_grad():
        value = float(net(torch.tensor([[point, 0.0]]))[0, 0])
    assert alone(net, point, points, sides, push) <= value
