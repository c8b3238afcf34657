"""FAB: projections against slower oracles, exact distances on linear nets, what a step costs, and who leaves when."""

from itertools import product

import pytest
import torch
from torch import Tensor, nn

from stages.attacks._hyperplane import step_onto
from stages.attacks.fab import FAB
from stages.evaluate import frozen
from stages.oracle import Oracle, Spent
from stages.seeding import generator
from stages.threat import Threat
from tests.linear_nets import DUAL, NORMS, Norm, with_leads

ORDER = {"linf": float("inf"), "l2": 2.0, "l1": 1.0}
HOW = [FAB(), FAB(targets=9), FAB(targets=9, reference=True)]


def planes(size: int, count: int = 200) -> tuple[Tensor, Tensor, Tensor]:
    """Points in the unit box, some on its faces; weights, some of them zero; and gaps, some out of reach."""
    rng = generator(2, "planes", size)
    points = torch.rand(count, size, generator=rng, dtype=torch.float64)
    points[:40] = points[:40].round()
    w = torch.randn(count, size, generator=rng, dtype=torch.float64) ** 3
    w[::7, ::3] = 0
    gap = 4 * torch.randn(count, generator=rng, dtype=torch.float64) * torch.rand(count, generator=rng)
    gap[5] = 0
    return points, w, gap


def room_and_reach(points: Tensor, w: Tensor, gap: Tensor) -> tuple[Tensor, Tensor]:
    room = torch.where(-gap.sign()[:, None] * w.sign() > 0, 1 - points, points)
    return room, (w.abs() * room).sum(1)


def bisected(points: Tensor, w: Tensor, gap: Tensor, norm: str) -> Tensor:
    """The least norm by halving an interval of t a hundred times, for linf and l2."""
    room, _ = room_and_reach(points, w, gap)
    pull = torch.ones_like(w) if norm == "linf" else w.abs()

    def moved(t: Tensor) -> Tensor:
        return torch.minimum(t[:, None] * pull, room) * (w != 0)

    low, high = torch.zeros_like(gap), torch.full_like(gap, 1e9)
    for _ in range(100):
        middle = (low + high) / 2
        short = (w.abs() * moved(middle)).sum(1) < gap.abs()
        low, high = torch.where(short, middle, low), torch.where(short, high, middle)
    length: Tensor = torch.linalg.vector_norm(moved(high), ord=ORDER[norm], dim=1)
    return length


def enumerated(points: Tensor, w: Tensor, gap: Tensor) -> Tensor:
    """The least l1 norm among all vertices: one coordinate pays the rest, every other is at nothing or at its room."""
    room, _ = room_and_reach(points, w, gap)
    best = torch.full_like(gap, float("inf"))
    size = points.shape[1]
    for payer in range(size):
        for full in product((0.0, 1.0), repeat=size):
            share = torch.tensor(full, dtype=room.dtype)
            share[payer] = 0
            rest = (gap.abs() - (w.abs() * room * share).sum(1)) / w[:, payer].abs()
            fits = (rest >= -1e-12) & (rest <= room[:, payer] + 1e-12)
            total = (room * share * (w != 0)).sum(1) + rest
            best = torch.where(fits & (total < best), total, best)
    return best


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("size", [1, 2, 5, 60])
def test_a_step_lands_on_the_plane_within_the_range_or_in_the_corner_nearest_to_it(norm: Norm, size: int) -> None:
    points, w, gap = planes(size)
    step = step_onto(points, w, gap, norm, 0.0, 1.0)
    room, reach = room_and_reach(points, w, gap)
    left = (gap + (w * step).sum(1)).abs()
    assert torch.allclose(left, (gap.abs() - reach).clamp(min=0), atol=1e-12)
    assert float((points + step).min()) >= -1e-15
    assert float((points + step).max()) <= 1 + 1e-15
    assert bool((step[w == 0] == 0).all())
    beyond = reach < gap.abs()
    assert size == 60 or bool(beyond.any())
    assert torch.allclose(step[beyond].abs(), (room * (w != 0))[beyond], atol=1e-12)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("size", [1, 2, 5, 60])
def test_a_step_is_as_short_as_bisection_finds(norm: Norm, size: int) -> None:
    points, w, gap = planes(size)
    _, reach = room_and_reach(points, w, gap)
    within = reach > gap.abs()
    length = torch.linalg.vector_norm(step_onto(points, w, gap, norm, 0.0, 1.0), ord=ORDER[norm], dim=1)
    assert torch.allclose(length[within], bisected(points, w, gap, norm)[within], atol=1e-9)


@pytest.mark.parametrize("size", [1, 2, 5])
def test_an_l1_step_is_as_short_as_the_best_vertex(size: int) -> None:
    points, w, gap = planes(size)
    _, reach = room_and_reach(points, w, gap)
    within = reach > gap.abs()
    length = step_onto(points, w, gap, "l1", 0.0, 1.0).abs().sum(1)
    assert torch.allclose(length[within], enumerated(points, w, gap)[within], atol=1e-9)


@pytest.mark.parametrize("norm", NORMS)
def test_one_plane_may_serve_several_points(norm: Norm) -> None:
    points, w, gap = planes(12)
    both = step_onto(torch.stack([points, 1 - points]), w, torch.stack([gap, 2 * gap]), norm, 0.0, 1.0)
    assert torch.equal(both[0], step_onto(points, w, gap, norm, 0.0, 1.0))
    assert torch.equal(both[1], step_onto(1 - points, w, 2 * gap, norm, 0.0, 1.0))


@pytest.mark.parametrize("norm", NORMS)
def test_weights_of_any_scale_are_taken(norm: Norm) -> None:
    points, w, gap = (part.float() for part in planes(12))
    plain = step_onto(points, w, gap, norm, 0.0, 1.0)
    for scale in (1e-30, 1e20):
        assert torch.allclose(step_onto(points, w * scale, gap * scale, norm, 0.0, 1.0), plain, atol=1e-5)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("attack", HOW, ids=repr)
def test_just_breakable_breaks_and_just_unbreakable_does_not(attack: FAB, norm: Norm) -> None:
    for share, broken in ((0.99, True), (1.01, False)):
        net, x, y, threat = with_leads(norm, share)
        found = attack(net, x, y, threat, generator(0))
        assert bool(((found != x).flatten(1).any(1) == broken).all())


@pytest.mark.parametrize("norm", NORMS)
def test_at_the_edge_of_the_range_the_distance_is_that_of_the_box(norm: Norm) -> None:
    """Black and white pixels move one way only; eps just above the exact distance breaks, just below does not."""
    net, x, y, threat = with_leads(norm, 3.0, count=6)
    x = (torch.rand(x.shape, generator=generator(9)) > 0.5).to(x.dtype)
    net.b = 0.2 * net.w.detach().abs().sum() - net.lead(x).detach()
    w, lead = net.w.detach().flatten(), net.lead(x).detach()
    step = step_onto(x.flatten(1), w.expand(len(x), -1), lead, norm, 0.0, 1.0)
    least = torch.linalg.vector_norm(step, ord=ORDER[norm], dim=1)
    assert bool((least > 1.1 * lead / torch.linalg.vector_norm(w, ord=DUAL[norm])).any())
    every = net.b
    for row in range(6):
        one, net.b = slice(row, row + 1), every[row]
        for share, gives in ((1.02, True), (0.98, False)):
            near = threat.model_copy(update={"eps": share * float(least[row])})
            found = FAB(targets=9)(net, x[one], y[one], near, generator(0))
            assert bool((found != x[one]).any()) == gives


def rough_net(seed: int = 0, classes: int = 5) -> tuple[nn.Module, Tensor, Tensor]:
    rng = generator(seed, "rough")
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, classes))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=rng))
    x = torch.rand(24, 1, 4, 4, generator=rng)
    with torch.no_grad():
        return net, x, net(x).argmax(1)


def broken(found: Tensor, x: Tensor) -> Tensor:
    return (found != x).flatten(1).any(1)


@pytest.mark.parametrize("norm", NORMS)
def test_one_pass_a_step_breaks_what_the_released_scheme_breaks(norm: Norm) -> None:
    net, x, y = rough_net()
    threat = Threat(norm=norm, eps={"linf": 0.04, "l2": 0.12, "l1": 0.3}[norm])
    one, two, untargeted = (broken(how(net, x, y, threat, generator(0)), x) for how in (HOW[1], HOW[2], HOW[0]))
    assert 3 < int(two.sum()) < 21
    assert int((one != two).sum()) <= 1
    assert int((untargeted & ~two).sum()) <= 1


@pytest.mark.parametrize(
    ("attack", "queries", "gradients"),
    [(FAB(steps=7), 1 + 2 * 7, 7), (FAB(steps=7, targets=9), 2 + 7, 7), (HOW[2], 1 + 2 * 100, 100)],
    ids=repr,
)
def test_what_a_step_costs(attack: FAB, queries: int, gradients: int) -> None:
    """Two classes; with both logits cut off at 1e-3 no wrong point is ever met, and the books are exact."""
    net, x, y, threat = with_leads("linf", 3.0)
    oracle = Oracle.of(lambda v: torch.stack([net.lead(v).clamp(min=1e-3), torch.zeros(len(v))], 1), len(x))
    with frozen(net):
        attack.perturb(oracle, x, y, threat, generator(0))
    assert oracle.spent.queries.tolist() == [queries] * len(x)
    assert oracle.spent.gradients.tolist() == [gradients] * len(x)


def test_all_classes_cost_one_gradient_each_and_named_targets_one() -> None:
    net, x, y = rough_net()
    threat = Threat(norm="linf", eps=1e-6)
    for attack, gradients in (
        (FAB(steps=3), 3 * 4),
        (FAB(steps=3, targets=2), 3 * 2),
        (FAB(steps=3, targets=9), 3 * 4),
    ):
        oracle = Oracle.of(net, len(x))
        attack.perturb(oracle, x, y, threat, generator(0))
        assert oracle.spent.gradients.tolist() == [gradients] * len(x)


def test_a_broken_example_is_asked_no_more_in_any_of_its_walks() -> None:
    net, x, y = rough_net()
    oracle = Oracle.of(net, len(x))
    found = FAB(steps=30, targets=9)(oracle, x, y, Threat(norm="linf", eps=0.04), generator(0))
    gone = broken(found, x)
    assert int(oracle.spent.gradients[gone].max()) < 4 * 30
    assert bool((oracle.spent.gradients[~gone] == 4 * 30).all())


@pytest.mark.parametrize("attack", [FAB(steps=20), FAB(steps=20, targets=9)], ids=["all", "targets"])
def test_classes_that_are_proved_unreachable_are_not_walked_to(attack: FAB) -> None:
    net, x, y = rough_net()
    threat = Threat(norm="l2", eps=0.12)
    plain = attack(net, x, y, threat, generator(0))
    unproved = torch.zeros(len(x), 5, dtype=torch.bool)
    none = torch.zeros(len(x), dtype=torch.int64)
    closed = Oracle(net, torch.arange(len(x)), Spent(none, none.clone()), unproved)
    assert torch.equal(attack(closed, x, y, threat, generator(0)), x)
    assert closed.spent.gradients.sum() == 0
    with torch.no_grad():
        reached = net(plain).argmax(1)
    unproved = torch.ones(len(x), 5, dtype=torch.bool).scatter_(1, ((reached + 1) % 5).unsqueeze(1), False)
    fewer = Oracle.of(net, len(x), unproved=unproved)
    again = attack(fewer, x, y, threat, generator(0))
    assert int((broken(again, x) != broken(plain, x)).sum()) <= 1
    assert int(fewer.spent.gradients.sum()) <= 20 * 4 * len(x)


@pytest.mark.parametrize("targets", [0, 9])
def test_more_restarts_never_break_fewer(targets: int) -> None:
    net, x, y = rough_net(3)
    threat = Threat(norm="linf", eps=0.15)
    sets = [broken(FAB(steps=1, restarts=n, targets=targets)(net, x, y, threat, generator(0)), x) for n in (1, 2, 6)]
    assert bool((sets[0] <= sets[1]).all())
    assert bool((sets[1] <= sets[2]).all())
    assert int(sets[2].sum()) > int(sets[0].sum())


@pytest.mark.parametrize("targets", [0, 9])
def test_an_example_takes_the_same_path_whoever_else_is_left(targets: int) -> None:
    net, x, y = rough_net(4)
    threat = Threat(norm="l2", eps=0.08)
    attack = FAB(steps=5, restarts=3, targets=targets)
    wrong = torch.where(torch.arange(len(y)) % 2 == 0, y, (y + 1) % 5)
    oracle = Oracle.of(net, len(x))
    every = attack.perturb(oracle, x, y, threat, generator(0))
    some = attack.perturb(net, x, wrong, threat, generator(0))
    assert torch.allclose(every[::2], some[::2], atol=1e-5)


def test_without_a_gradient_it_stands_still() -> None:
    x, y = torch.rand(3, 1, 4, 4, generator=generator(0)), torch.zeros(3, dtype=torch.int64)

    def flat(v: Tensor) -> Tensor:
        return torch.tensor([1.0, 0.5, 0.0]).expand(len(v), 3)

    for attack in HOW:
        assert torch.allclose(attack.perturb(flat, x, y, Threat(norm="l2", eps=0.5), generator(0)), x)
