"""Passes are charged to the examples that were in them, through any depth of narrowing."""

import pytest
import torch
from torch import Tensor

from stages.evaluate import under_attack
from stages.method import InputError
from stages.oracle import Oracle, narrow, reachable
from stages.threat import Threat


def bright(x: Tensor) -> Tensor:
    level = x.flatten(1).mean(1)
    return torch.stack([level, 0.5 - level, torch.zeros_like(level)], 1)


def test_narrowing_twice_charges_the_outermost_rows() -> None:
    oracle = Oracle.of(bright, 5)
    inner = oracle[torch.tensor([4, 1, 3])][torch.tensor([True, False, True])]
    inner(torch.rand(2, 1, 2, 2))
    inner(torch.rand(2, 1, 2, 2, requires_grad=True))
    assert oracle.spent.queries.tolist() == [0, 0, 0, 2, 2]
    assert oracle.spent.gradients.tolist() == [0, 0, 0, 1, 1]


def test_a_row_asked_three_times_in_one_pass_pays_three_times() -> None:
    oracle = Oracle.of(bright, 2)
    oracle[torch.tensor([1, 1, 1])](torch.rand(3, 1, 2, 2))
    assert oracle.spent.queries.tolist() == [0, 3]


def test_a_batch_of_another_size_is_refused() -> None:
    with pytest.raises(InputError, match="expected 3 examples, got 2"):
        Oracle.of(bright, 3)(torch.rand(2, 1, 2, 2))


def test_a_plain_network_is_narrowed_to_itself() -> None:
    assert narrow(bright, torch.tensor([0])) is bright


def test_proved_classes_are_no_targets_and_neither_is_the_true_one() -> None:
    unproved = torch.tensor([[True, True, False], [True, True, True]])
    y = torch.tensor([0])
    assert reachable(bright, 3, y).tolist() == [[False, True, True]]
    oracle = Oracle.of(bright, 2, unproved=unproved)
    assert reachable(oracle[torch.tensor([0])], 3, y).tolist() == [[False, True, False]]


def test_under_attack_charges_by_the_place_in_the_whole_set_and_not_for_its_own_checks() -> None:
    def strike(logits: object, x: Tensor, y: Tensor, threat: Threat, rng: torch.Generator) -> Tensor:
        del y, threat, rng
        assert callable(logits)
        logits(x)
        return x

    x = torch.tensor([0.9, 0.1, 0.8, 0.7, 0.2]).view(5, 1, 1, 1)
    y = torch.zeros(5, dtype=torch.int64)
    oracle = Oracle.of(bright, 5)
    under_attack(oracle, strike, x, y, Threat(norm="linf", eps=0.1), 0, batch=2)
    assert oracle.spent.queries.tolist() == [1, 0, 1, 1, 0]
