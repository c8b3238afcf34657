"""Complete answers against exhaustive ones: with one hidden layer the least value lies where pieces meet."""

import itertools
from typing import Literal

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stages.bounds._decide import _Search, decide
from stages.bounds.base import Ball, Box, Contradiction, TooLittleMemory
from stages.bounds.branch_and_bound import BranchAndBound
from stages.bounds.crown import Crown
from stages.method import InputError
from stages.seeding import generator
from stages.threat import Threat
from tests.networks import Single


def mlp(seed: int, *widths: int) -> nn.Sequential:
    rng = generator(seed, "branch")
    layers: list[nn.Module] = []
    for i, (a, b) in enumerate(itertools.pairwise(widths)):
        layers += [nn.Linear(a, b), *((nn.ReLU(),) if i < len(widths) - 2 else ())]
    net = nn.Sequential(*layers).eval()
    with torch.no_grad():
        for value in net.parameters():
            value.copy_(torch.randn(value.shape, generator=rng) / value.shape[-1] ** 0.5)
    return net


def least(net: nn.Sequential, low: Tensor, high: Tensor, rows: Tensor) -> Tensor:
    """[R]: exact minima over a rectangle, by every activation pattern's corners: two boundaries meet at each."""
    weight, bias = net.get_parameter("0.weight"), net.get_parameter("0.bias")
    lines = [(*w.tolist(), b.item()) for w, b in zip(weight, bias, strict=True)]
    lines += [
        (1.0, 0.0, -low[0].item()),
        (1.0, 0.0, -high[0].item()),
        (0.0, 1.0, -low[1].item()),
        (0.0, 1.0, -high[1].item()),
    ]
    points = []
    for (a, b, c), (d, e, f) in itertools.combinations(lines, 2):
        det = a * e - b * d
        if abs(det) > 1e-12:
            points.append([(b * f - c * e) / det, (c * d - a * f) / det])
    found = torch.tensor(points, dtype=torch.float64)
    found = found[((found >= low - 1e-12) & (found <= high + 1e-12)).all(1)]
    values: Tensor = net(found) @ rows.T
    return values.amin(0)


@pytest.mark.parametrize("seed", range(4))
def test_answers_equal_exhaustive_enumeration(seed: int) -> None:
    net = mlp(seed, 2, 8, 3).double()
    rng = generator(seed, "box")
    centre, rows = torch.randn(3, 2, generator=rng, dtype=torch.float64), torch.randn(3, 2, 3, generator=rng).double()
    box = Box(centre - 1, centre + 1)
    with torch.no_grad():
        exact = torch.stack([least(net, box.low[i], box.high[i], rows[i]) for i in range(3)])
        loose = Crown(arithmetic="real").lower(net, box, rows)
    assert float((exact - loose).max()) > 0.05
    # One goal for all rows: shift each row's value by a logit that is constant.
    for side in (-0.02, 0.02):
        shifted = nn.Sequential(net, _Constant()).eval()
        wide = torch.cat([rows, -(exact + side).unsqueeze(2)], 2)
        found = decide(shifted, box, wide, 60.0, arithmetic="real")
        if side < 0:
            assert bool((found.lower > 0).all())
            assert not bool(found.broken.any())
            assert bool((found.lower <= 0.02 + 1e-9).all())
        else:
            assert bool(found.broken.all())
            with torch.no_grad():
                values = torch.einsum("brk,brk->br", wide, shifted(found.points.flatten(0, 1)).view(3, 2, 4))
            assert bool((values <= 0).all())
            assert bool((found.points >= box.low.unsqueeze(1)).all())
            assert bool((found.points <= box.high.unsqueeze(1)).all())


class _Constant(nn.Module):
    """Appends a logit that is 1."""

    def forward(self, z: Tensor) -> Tensor:
        return torch.cat([z, z[:, :1] * 0 + 1], 1)


def deeper() -> tuple[nn.Module, Box, Tensor, torch.Generator]:
    """A network of two hidden layers, four boxes, two rows for each, and what draws points."""
    rng = generator(5, "box")
    x, rows = torch.randn(4, 4, generator=rng), torch.randn(4, 2, 3, generator=rng)
    return mlp(5, 4, 10, 10, 3), Box(x - 0.8, x + 0.8), rows, rng


def test_a_deeper_network_is_decided_and_never_looser_than_crown() -> None:
    net, box, rows, rng = deeper()
    with torch.no_grad():
        plain = Crown().lower(net, box, rows)
        found = BranchAndBound(seconds=300, limit=64).lower(net, box, rows)
        share = torch.rand(4000, 1, 4, generator=rng)
        points = box.low + share * (box.high - box.low)
        seen = torch.einsum("brk,nbk->nbr", rows, net(points)).amin(0)
    assert bool((found >= plain).all())
    assert bool((found <= seen + 1e-6).all())
    answers = decide(net, box, rows, 60.0)
    assert bool(((answers.lower > 0) ^ answers.broken).all())
    assert bool((seen[answers.lower > 0] > 0).all())
    assert bool((answers.lower >= plain).all())


def test_what_branching_proves_is_above_zero_in_float32_too() -> None:
    """Bounds on the points that refute a row say that there is none, and not by how much it is above."""
    net, box, rows, rng = deeper()
    with torch.no_grad():
        points = box.low + torch.rand(4000, 1, 4, generator=rng) * (box.high - box.low)
        least = torch.einsum("brk,nbk->nbr", rows, net(points)).amin(0) - 0.2
        shifted, near = nn.Sequential(net, _Constant()).eval(), torch.cat([rows, -least.unsqueeze(2)], 2)
        plain = Crown().lower(shifted, box, near)
        proved = decide(shifted, box, near, 60.0).lower > 0
        found = BranchAndBound(seconds=60).lower(shifted, box, near)
        ahead = BranchAndBound(seconds=60, lead=0.01).lower(shifted, box, near)
    assert bool((proved & (plain <= 0)).any())
    assert bool(((found > 0) == proved).all())
    assert bool(((ahead > 0.01) & (plain <= 0.01)).any())  # though bounds that stop at 0 would not get there
    assert bool((ahead <= 0.2).all())


def test_points_that_refute_lie_in_the_ball() -> None:
    net = mlp(6, 4, 10, 3)
    x = torch.zeros(1, 4)
    rows = torch.tensor([[[1.0, -1.0, 0.0], [0.0, 1.0, -1.0], [-1.0, 0.0, 1.0]]])
    for norm in ("l2", "l1"):
        ball = Ball(x, "l2" if norm == "l2" else "l1", 1.0)
        found = decide(net, Box(x - 1, x + 1, ball), rows, 20.0)
        assert bool(found.broken.any())
        away = torch.linalg.vector_norm(found.points, 2.0 if norm == "l2" else 1.0, 2)
        assert bool((away <= 1 + 1e-6).all())


@pytest.mark.parametrize(("norm", "eps"), [("l2", 0.3), ("l1", 0.8)])
def test_a_box_cut_by_the_data_range_has_its_centre_outside_of_the_ball(norm: Literal["l2", "l1"], eps: float) -> None:
    """Black images: the box's centre is no point of the ball, so what it refutes is not refuted."""
    net = Single(lambda x: torch.cat([3 - x.flatten(1).sum(1, keepdim=True), F.relu(x[:, 0, 0, :1] - 9)], 1)).eval()
    x, y, threat = torch.zeros(2, 1, 8, 8), torch.zeros(2, dtype=torch.int64), Threat(norm=norm, eps=eps)
    assert float(net(Box.around(x, threat).high / 2)[0, 0]) < 0
    found = BranchAndBound(seconds=60, limit=4).margins(net, x, y, threat)
    torch.testing.assert_close(found, torch.full((2,), 3 - eps * (8 if norm == "l2" else 1)), rtol=0, atol=1e-3)


class Tokens(nn.Module):
    """[B, 3, 4] -> [B, 3], with ReLUs on values that have the images second, or each image's tokens as rows."""

    def __init__(self, second: bool) -> None:
        super().__init__()
        self.second, self.inner, self.head = second, mlp(5, 4, 5, 5), mlp(6, 15, 3)

    def forward(self, x: Tensor) -> Tensor:
        laid = x.transpose(0, 1) if self.second else x.reshape(-1, 4)
        bent = self.inner(laid).relu()
        laid = bent.transpose(0, 1) if self.second else bent.reshape(len(x), 3, 5)
        out: Tensor = self.head(laid.flatten(1))
        return out


@pytest.mark.parametrize("second", [True, False])
def test_images_may_lie_second_or_beside_their_tokens(second: bool) -> None:
    net, rng = Tokens(second).eval(), generator(3, "tokens")
    x, rows = torch.randn(2, 3, 4, generator=rng), torch.randn(2, 2, 3, generator=rng)
    box = Box(x - 0.5, x + 0.5)
    with torch.no_grad():
        points = box.low + torch.rand(4000, 2, 3, 4, generator=rng).round() * (box.high - box.low)
        seen = torch.einsum("brk,nbrk->nbr", rows, net(points.flatten(0, 1)).view(-1, 2, 1, 3).expand(-1, 2, 2, 3))
        seen = seen.amin(0).double()
        plain = Crown().lower(net, box, rows).double()
        found = decide(net, box, rows, 300.0, seen - 0.1 * (seen - plain), limit=60)
    assert bool((found.lower <= seen).all())
    assert bool((found.lower > plain).any())


def test_comparisons_leave_nothing_to_descend() -> None:
    net = Single(lambda x: torch.cat([(x[:, :1] > 0.5) & (x[:, 1:] > 0.5), x[:, 1:] <= 0.5], 1).float()).eval()
    box = Box(torch.zeros(1, 2), torch.ones(1, 2))
    found = decide(net, box, torch.tensor([[[1.0, 1.0], [-1.0, 1.0]]]), 60.0, -0.5, limit=8)
    assert found.lower.tolist() == [pytest.approx([0, -1], abs=1e-3)]


def test_channels_last_boxes_are_cut_too() -> None:
    net = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.SiLU(), nn.Flatten(), mlp(2, 48, 2)).eval()
    low = torch.rand(2, 2, 4, 4, generator=generator(1, "last"))
    rows = torch.tensor([[[1.0, -1.0]]]).expand(2, 1, 2)
    with torch.no_grad():
        goal = float(Crown().lower(net, Box(low, low + 0.3), rows).min()) + 1e-3
    last = low.to(memory_format=torch.channels_last)
    plain, other = (decide(net, Box(x, x + 0.3), rows, 60.0, goal, limit=8).lower for x in (low, last))
    torch.testing.assert_close(other, plain, rtol=0, atol=1e-5)


def test_a_cap_that_holds_one_image_is_enough() -> None:
    """What sigmoids keep counts as what ReLUs do."""
    net = nn.Sequential(nn.Linear(4096, 8), *(part for i in range(6) for part in (nn.Sigmoid(), mlp(i, 8, 8)))).eval()
    box, rows = Box(torch.zeros(3, 4096), torch.full((3, 4096), 0.1)), torch.eye(8)[:1].expand(3, 1, 8)
    with pytest.raises(TooLittleMemory, match="memory: 0"):
        BranchAndBound(seconds=60, limit=1, memory=0.001).lower(net, box, rows)
    found = BranchAndBound(seconds=60, limit=1, memory=0.006).lower(net, box, rows)
    assert bool(found.isfinite().all())


def test_what_float32_refutes_is_no_contradiction_in_exact_arithmetic() -> None:
    net = Single(lambda x: torch.cat([x * 1e8 + 1, x * 1e8], 1)).eval()
    box, rows = Box(torch.zeros(1, 1), torch.ones(1, 1)), torch.tensor([[[1.0, -1.0]]])
    found = BranchAndBound(seconds=60, limit=4, arithmetic="real").lower(net, box, rows)
    assert float(found) == 0
    assert float(Crown(arithmetic="real").lower(net, box, rows)) > 0.9


def test_time_is_kept_and_what_is_known_by_then_returned() -> None:
    net = mlp(7, 30, 60, 60, 3)
    x = torch.zeros(2, 30)
    found = decide(net, Box(x - 1, x + 1), torch.randn(2, 2, 3, generator=generator(7)), 1e-6)
    assert bool(torch.isfinite(found.lower).all())
    with pytest.raises(InputError, match="above 0"):
        decide(net, Box(x, x), torch.ones(2, 2, 3), 0.0)


@pytest.mark.parametrize("seed", range(3))
def test_a_row_that_a_corner_refutes_on_the_way_is_not_proved(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is bounded last decides nothing alone: a domain with a counterexample in it stays part of the answer."""
    monkeypatch.setattr(_Search, "_descend", lambda *_: None)
    monkeypatch.setattr(_Search, "_try", lambda *_: None)
    rng = generator(seed, "refuted")
    net = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    with torch.no_grad():
        for weight in net.parameters():
            weight.copy_(torch.randn(weight.shape, generator=rng))
    x = torch.zeros(1, 2)
    grid = torch.cartesian_prod(*[torch.linspace(-1, 1, 201)] * 2)
    rows = torch.eye(3).expand(1, 3, 3)
    least = net(grid).detach().amin(0)
    goal = (least + torch.tensor([0.02, 0.2, 0.5])).unsqueeze(0)
    found = decide(net, Box(x - 1, x + 1), rows, 60.0, goal.double(), limit=200)
    assert bool(found.broken.any())
    assert bool((found.lower <= least + 1e-4).all())
    values = (found.points @ torch.eye(2)).flatten(0, 1)
    refuted = net(values).detach().diagonal()[found.broken[0]]
    assert bool((refuted <= goal[found.broken] + 1e-5).all())


def test_a_bound_above_a_known_point_stops_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    net = mlp(3, 2, 8, 3)
    x = torch.zeros(1, 2)
    monkeypatch.setattr("stages.bounds._sweep.logits", lambda *_: torch.full((1, 3), 9.0, dtype=torch.float64))
    with torch.no_grad():
        goal = net(x).double() + 0.01
    with pytest.raises(Contradiction, match="refuted by a point and proved"):
        decide(net, Box(x - 1, x + 1), torch.eye(3).expand(1, 3, 3), 60.0, goal)


def test_a_network_without_relus_has_nothing_to_split() -> None:
    pool = nn.AvgPool2d(3, 2, 1, count_include_pad=False)
    net = nn.Sequential(nn.Tanh(), pool, nn.Flatten(), mlp(0, 4, 3), nn.Tanh())
    rng = generator(1, "x")
    x, rows = torch.rand(4, 1, 3, 3, generator=rng), torch.randn(4, 3, 3, generator=rng)
    box = Box(x - 0.5, x + 0.5)
    found, plain = (c.lower(net.eval(), box, rows) for c in (BranchAndBound(seconds=300, limit=4), Crown()))
    assert bool((found >= plain - 1e-5).all())


def test_a_bound_that_no_pixel_moves_is_split_all_the_same() -> None:
    """Behind a sign every bound is a constant: there is no half-space of pixels that could refute a row."""
    net = Single(lambda x: F.relu(x.sign().sum(1, keepdim=True) + 0.3) * torch.tensor([1.0, -1.0])).eval()
    found = decide(net, Box(-torch.ones(1, 2), torch.ones(1, 2)), torch.eye(2).unsqueeze(0), 60.0, -0.5, limit=6)
    torch.testing.assert_close(found.lower, torch.tensor([[0.0, -2.3]], dtype=torch.float64), rtol=0, atol=1e-3)


@pytest.mark.parametrize("bend", [nn.Tanh(), nn.Sigmoid()], ids=str)
def test_curves_are_split_and_what_is_proved_holds(bend: nn.Module) -> None:
    first, _, second, _, last = mlp(8, 3, 6, 6, 2)
    net = nn.Sequential(first, bend, second, bend, last).eval()
    with torch.no_grad():
        for value in net.parameters():
            value.mul_(2.0)
    rng = generator(8, "curves")
    x, rows = torch.randn(2, 3, generator=rng), torch.randn(2, 2, 2, generator=rng)
    box = Box(x - 0.7, x + 0.7)
    with torch.no_grad():
        points = box.low + torch.rand(20000, 1, 3, generator=rng) * (box.high - box.low)
        seen = torch.einsum("brk,nbk->nbr", rows, net(points)).amin(0).double()
        loose = Crown().lower(net, box, rows).double()
        goal = seen - 0.5 * (seen - loose)
        found = decide(net, box, rows, 60.0, goal, limit=400)
        near = decide(net, box, rows, 60.0, seen + 1e-3, limit=400)
    assert bool((found.lower > goal).all())
    assert not bool((near.lower > seen + 1e-3).any())
