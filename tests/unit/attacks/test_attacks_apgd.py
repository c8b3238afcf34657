"""APGD: targets, the l1 version, and the exact projection onto an l1 ball cut with the range."""

import itertools
from typing import cast

import pytest
import torch
from torch import Tensor, nn

from stages.attacks import _l1, _sparse
from stages.attacks._losses import targeted_dlr
from stages.attacks.apgd import APGD
from stages.attacks.base import FOLDER, Attack
from stages.method import load
from stages.oracle import Oracle
from stages.seeding import generator
from stages.threat import Threat
from tests.linear_nets import NORMS, Norm


def linear(classes: int, seed: int = 0) -> nn.Sequential:
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, classes))
    rng = generator(seed, "linear", classes)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=rng))
    net.eval().requires_grad_(False)
    return net


def by_faces(a: Tensor, x: Tensor, eps: float) -> Tensor:
    """The nearest point by brute force over the faces: each coordinate free, at x, or at a bound; [n] float64."""
    low, high = -x, 1 - x
    best, found = float("inf"), torch.zeros_like(a)
    for face in itertools.product(("free", "still", "low", "high"), repeat=len(a)):
        for tight in (False, True):
            d = torch.zeros_like(a)
            free = torch.tensor([one == "free" for one in face])
            for i, one in enumerate(face):
                d[i] = {"free": a, "still": torch.zeros_like(a), "low": low, "high": high}[one][i]
            if tight and bool(free.any()):
                over = d.abs().sum() - eps
                d = torch.where(free, d - d.sign() * over / free.sum(), d)
            legal = (d.abs().sum() <= eps + 1e-9) & (d >= low - 1e-9).all() & (d <= high + 1e-9).all()
            if bool(legal) and float((d - a).square().sum()) < best:
                best, found = float((d - a).square().sum()), d
    return found


@pytest.mark.parametrize("eps", [0.05, 0.4, 1.0, 5.0])
def test_the_projection_is_the_nearest_point_of_ball_and_range(eps: float) -> None:
    rng = generator(1, "faces")
    x = torch.rand(10, 3, generator=rng, dtype=torch.float64)
    x[0], x[1], x[2, :2] = 0.0, 1.0, 0.0
    a = torch.randn(10, 3, generator=rng, dtype=torch.float64)
    a[3], a[4] = 0.3, 0.0
    got = _l1.project(x + a, x, Threat(norm="l1", eps=eps)) - x
    for i in range(10):
        want = by_faces(a[i], x[i], eps)
        assert float((got[i] - a[i]).square().sum()) == pytest.approx(float((want - a[i]).square().sum()), abs=1e-9)
        assert torch.allclose(got[i], want, atol=1e-7)


def test_the_projection_satisfies_the_conditions_of_optimality_on_images() -> None:
    """<a - p, v - p> <= 0 for every point v of the set is what makes p the nearest one."""
    rng, threat = generator(2, "images"), Threat(norm="l1", eps=3.0)
    x = torch.rand(6, 3, 16, 16, generator=rng)
    a = x + torch.randn(x.shape, generator=rng)
    p = _l1.project(a, x, threat)
    assert float(threat.distance(p, x).max()) <= 3.0 + 1e-5
    assert 0 <= float(p.min()) <= float(p.max()) <= 1
    assert torch.allclose(_l1.project(p, x, threat), p, atol=1e-6)
    for _ in range(50):
        v = threat.random(x, rng)
        assert float(((a - p) * (v - p)).flatten(1).sum(1).max()) <= 1e-3


def test_targeted_dlr_is_its_formula_and_ignores_scale_and_shift() -> None:
    z = torch.tensor([[4.0, 1.0, 3.0, -1.0, 0.5]])
    y, target = torch.tensor([0]), torch.tensor([3])
    assert float(targeted_dlr(z, y, target)) == pytest.approx(-(4 - -1) / (4 - (1 + 0.5) / 2))
    assert float(targeted_dlr(7 * z + 2, y, target)) == pytest.approx(float(targeted_dlr(z, y, target)), rel=1e-5)
    assert float(targeted_dlr(z[:, :3], y, torch.tensor([1]))) == -3.0


@pytest.mark.parametrize("classes", [2, 3, 6])
@pytest.mark.parametrize("norm", NORMS)
def test_targets_find_on_a_linear_net_what_the_closed_form_says(classes: int, norm: Norm) -> None:
    """An image falls where a class k has lead_k <= eps ||w_y - w_k||_dual; here the range never binds."""
    net = linear(classes)
    layer = cast(nn.Linear, net[1])
    rng = generator(3)
    layer.bias.copy_(0.02 * torch.randn(classes, generator=rng) - layer.weight.sum(1) / 2)
    x = 0.5 + 0.1 * (torch.rand(60, 1, 4, 4, generator=rng) - 0.5)
    z = net(x)
    y = z.argmax(1)
    dual = {"linf": 1.0, "l2": 2.0, "l1": float("inf")}[norm]
    apart = torch.linalg.vector_norm(layer.weight[y].unsqueeze(1) - layer.weight.unsqueeze(0), ord=dual, dim=2)
    needed = ((z.gather(1, y.unsqueeze(1)) - z) / apart).scatter(1, y.unsqueeze(1), float("inf")).amin(1)
    threat = Threat(norm=norm, eps=float(needed.median()) * 1.01)
    assert threat.eps < 0.4
    found = APGD(steps=50, loss="dlr", targets=9)(net, x, y, threat, generator(0))
    broken = (found != x).flatten(1).any(1)
    clear = (needed / threat.eps - 1).abs() > 0.002
    assert int(clear.sum()) > 50
    assert torch.equal(broken[clear], (needed < threat.eps)[clear])


def test_the_books_hold_one_climb_per_target_and_none_for_what_is_proved() -> None:
    net, threat = linear(5), Threat(norm="linf", eps=1e-6)
    x = torch.rand(3, 1, 4, 4, generator=generator(5))
    y = net(x).argmax(1)
    for targets, climbs in ((1, 1), (3, 3), (9, 4)):
        oracle = Oracle.of(net, 3)
        APGD(steps=7, loss="dlr", targets=targets).perturb(oracle, x, y, threat, generator(0))
        assert oracle.spent.gradients.tolist() == [climbs * 8] * 3
        assert oracle.spent.queries.tolist() == [climbs * 8 + 1] * 3
    unproved = torch.ones(3, 5, dtype=torch.bool)
    unproved[0] = False
    unproved[1, net(x)[1].argsort(descending=True)[1]] = False
    oracle = Oracle.of(net, 3, unproved=unproved)
    APGD(steps=7, loss="dlr", targets=9).perturb(oracle, x, y, threat, generator(0))
    assert oracle.spent.gradients.tolist() == [0, 3 * 8, 4 * 8]


def test_what_is_proved_of_one_example_changes_no_path_of_another() -> None:
    net, threat = linear(6), Threat(norm="linf", eps=0.05)
    x = torch.rand(8, 1, 4, 4, generator=generator(6))
    y = net(x).argmax(1)
    attack = APGD(steps=10, loss="dlr", targets=5)
    unproved = torch.ones(8, 6, dtype=torch.bool)
    unproved[::2] = False
    whole = attack.perturb(Oracle.of(net, 8), x, y, threat, generator(0))
    some = attack.perturb(Oracle.of(net, 8, unproved=unproved), x, y, threat, generator(0))
    assert torch.equal(whole[1::2], some[1::2])
    assert torch.equal(some[::2], x[::2])


def test_targets_without_dlr_are_refused() -> None:
    with pytest.raises(ValueError, match='targets = 9 climbs the targeted DLR; set loss = "dlr", got "ce"'):
        load(FOLDER, Attack, {"kind": "apgd", "targets": 9})  # type: ignore[type-abstract]


def test_the_outer_balls_of_l1_are_left_behind_and_nobody_leaves_there() -> None:
    """A net that is wrong as soon as pixels sum to 2.5 more: reached at 3 eps, not at eps = 1."""

    def logits(x: Tensor) -> Tensor:
        total = x.flatten(1).sum(1)
        return torch.stack([torch.zeros_like(total), total - 2.5], 1)

    x, threat = torch.zeros(3, 1, 4, 4), Threat(norm="l1", eps=1.0)
    y = torch.zeros(3, dtype=torch.int64)
    found = APGD(steps=20).perturb(logits, x, y, threat, generator(0))
    assert torch.allclose(threat.distance(found, x), torch.ones(3), atol=1e-5)
    assert [_sparse._phases(n) for n in (1, 2, 3, 10)] == [
        [(1, 1)],
        [(1, 2)],
        [(3, 1), (2, 1), (1, 1)],
        [(3, 3), (2, 3), (1, 4)],
    ]


def test_sparse_steps_use_the_steepest_coordinates_and_have_unit_length() -> None:
    slope = torch.tensor([[3.0, -4.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0], [1.0, -1.0, 1.0, -1.0]])
    got = _sparse._direction(slope, torch.tensor([2.0, 2.0, 0.0]), 4)
    assert got.tolist() == [[0.5, -0.5, 0.0, 0.0], [0.0] * 4, [0.25, -0.25, 0.25, -0.25]]
