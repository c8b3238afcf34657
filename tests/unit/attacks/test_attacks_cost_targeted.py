"""Cost-targeted: the costliest answer within reach, on nets where it is known; what costs nothing is left alone."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stages.attacks.cost_targeted import CostTargeted, _costliest_first
from stages.method import InputError
from stages.oracle import Oracle
from stages.seeding import generator
from stages.threat import Threat
from tests.linear_nets import with_leads

LINF = Threat(norm="linf", eps=0.1)


class Three(nn.Module):
    """Two pixels u, v: class 0 until u >= 0.55 gives class 1 or v >= `far` gives class 2, whichever leads more."""

    def __init__(self, far: float) -> None:
        super().__init__()
        self.far = far

    def forward(self, x: Tensor) -> Tensor:
        u, v = x.flatten(1).unbind(1)
        return torch.stack([torch.zeros_like(u), u - 0.55, v - self.far], 1)


GREY = torch.full((6, 1, 1, 2), 0.5)
ZEROS = torch.zeros(6, dtype=torch.int64)


def answers(net: nn.Module, x: Tensor) -> list[int]:
    with torch.no_grad():
        found: list[int] = net(x).argmax(1).tolist()
    return found


def costs(one: float, two: float) -> CostTargeted:
    return CostTargeted(cost=((0, one, two), (1, 0, 1), (1, 1, 0)))


@pytest.mark.parametrize(
    ("one", "two", "far", "expected"),
    [
        (1, 5, 0.58, 2),  # farther, and worth it
        (5, 1, 0.58, 1),
        (1, 5, 0.7, 1),  # out of reach: the cheaper answer is still an answer
        (0, 5, 0.58, 2),
    ],
)
def test_the_costliest_answer_within_reach_is_found(one: float, two: float, far: float, expected: int) -> None:
    net = Three(far)
    found = costs(one, two)(net, GREY, ZEROS, LINF, generator(0))
    assert answers(net, found) == [expected] * 6


def test_a_harmless_wrong_answer_met_on_the_way_is_kept_until_a_dearer_one_comes() -> None:
    net = Three(0.7)
    found = costs(0, 5).model_copy(update={"restarts": 5})(net, GREY, ZEROS, LINF, generator(0))
    assert set(answers(net, found)) <= {0, 1}
    assert 1 in answers(net, found)


def test_a_class_whose_errors_cost_nothing_is_not_attacked() -> None:
    attack = CostTargeted(cost=((0, 0, 0), (1, 0, 1), (1, 1, 0)))
    oracle = Oracle.of(Three(0.58), 6)
    assert torch.equal(attack(oracle, GREY, ZEROS, LINF, generator(0)), GREY)
    assert oracle.spent.queries.tolist() == [1] * 6
    assert not bool(oracle.spent.gradients.any())


def test_a_proved_class_is_not_targeted() -> None:
    net = Three(0.58)
    unproved = torch.tensor([[True, True, False]]).expand(6, 3).contiguous()
    found = costs(1, 5)(Oracle.of(net, 6, unproved=unproved), GREY, ZEROS, LINF, generator(0))
    assert 1 in answers(net, found)


def rough() -> tuple[nn.Module, Tensor, Tensor]:
    rng = generator(6, "rough")
    net = nn.Sequential(nn.Flatten(), nn.Linear(2, 12), nn.ReLU(), nn.Linear(12, 4))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=rng))
    x = torch.rand(80, 1, 1, 2, generator=rng)
    with torch.no_grad():
        return net, x, net(x).argmax(1)


COST = ((0.0, 3.0, 0.0, 7.0), (1.0, 0.0, 4.0, 2.0), (5.0, 1.0, 0.0, 1.0), (2.0, 9.0, 1.0, 0.0))


def test_it_agrees_with_brute_force_on_the_highest_cost() -> None:
    net, x, y = rough()
    threat = Threat(norm="linf", eps=0.3)
    price = torch.tensor(COST)
    side = torch.linspace(-0.3, 0.3, 101)
    grid = torch.cartesian_prod(side, side).view(-1, 1, 1, 2)
    with torch.no_grad():
        seen = torch.stack([price[c, net((i + grid).clamp(0, 1)).argmax(1)].amax() for i, c in zip(x, y, strict=True)])
        found = CostTargeted(cost=COST, restarts=3)(net, x, y, threat, generator(0))
        paid = price[y, net(found).argmax(1)]
    assert int((seen > 1).sum()) > 8
    assert int((paid < seen).sum()) <= 2


def test_scaling_the_costs_changes_nothing_and_neither_does_renaming_the_classes() -> None:
    net, x, y = rough()
    threat = Threat(norm="l2", eps=0.15)
    plain = CostTargeted(cost=COST)(net, x, y, threat, generator(0))
    double = CostTargeted(cost=tuple(tuple(2 * c for c in row) for row in COST))
    assert torch.equal(double(net, x, y, threat, generator(0)), plain)
    order = torch.tensor([2, 0, 3, 1])
    cost: Any = torch.tensor(COST)[order][:, order].tolist()
    renamed = CostTargeted.load({"cost": cost})(lambda v: net(v)[:, order], x, order.argsort()[y], threat, generator(0))
    assert torch.allclose(renamed, plain, atol=1e-6)


def test_classes_come_by_falling_cost_and_then_by_falling_logit() -> None:
    z = torch.tensor([[9.0, 1.0, 3.0, 2.0]])
    assert _costliest_first(z, torch.tensor([[0.0, 1.0, 1.0, 5.0]])).tolist() == [[3, 2, 1, 0]]


def test_left_out_every_wrong_answer_costs_one_and_the_first_ends_the_search() -> None:
    net, x, y, threat = with_leads("linf", 0.3)
    oracle = Oracle.of(net, len(x))
    found = CostTargeted(steps=50)(oracle, x, y, threat, generator(0))
    assert bool((found != x).flatten(1).any(1).all())
    assert int(oracle.spent.gradients.max()) < 50
    every = CostTargeted(cost=((0, 1), (1, 0)), steps=50)(net, x, y, threat, generator(0))
    assert torch.equal(found, every)


@pytest.mark.parametrize(
    ("cost", "told"),
    [
        ([[0, 1], [1, 0, 2]], "as many columns as rows"),
        ([[0]], "at least 2"),
        ([[0, 1], [1, 2]], "row 1: expected 0 on the diagonal"),
        ([[0, -1], [1, 0]], "no negative cost"),
        ([[0, 0], [0, 0]], "at least one positive cost"),
        ([[0, float("inf")], [1, 0]], "finite"),
    ],
)
def test_a_matrix_that_is_no_cost_is_refused(cost: list[list[float]], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        CostTargeted.load({"cost": cost})


def test_a_matrix_for_other_classes_is_refused() -> None:
    with pytest.raises(InputError, match=r"expected a cost matrix of 3 x 3, one row per output.*, got 2 x 2"):
        CostTargeted(cost=((0, 1), (1, 0)))(Three(0.6), GREY, ZEROS, LINF, generator(0))
