"""Verdicts before the end: against the verdict that all attacks on all images give, over many random sets."""

import pytest
import torch
from torch import Tensor

from pipeline.core.measurement import wilson
from stages.early import Demand, Early, early
from stages.seeding import generator


class Fate:
    """Images whose end is known: those that the opening breaks, those that the rest breaks; counts who was asked."""

    def __init__(self, rows: Tensor, opening: Tensor, rest: Tensor) -> None:
        self.rows, self.held_opening, self.held_rest = rows, opening, rest
        self.opened, self.drawn = torch.zeros_like(rows), torch.zeros_like(rows)

    def opening(self, chunk: Tensor, number: int) -> Tensor:
        del number
        assert not bool((chunk & (self.opened | ~self.rows)).any())  # nobody twice, nobody who needs no attack
        self.opened |= chunk
        return ~chunk | self.held_opening

    def rest(self, chunk: Tensor, number: int) -> Tensor:
        del number
        assert bool((chunk & ~self.drawn & self.opened & self.held_opening).eq(chunk).all())
        self.drawn |= chunk
        return chunk & self.held_rest

    @property
    def standing(self) -> int:
        return int((self.rows & self.held_opening & self.held_rest).sum())

    def ask(self, sure: int, demand: Demand, seed: int) -> Early:
        steps: list[tuple[int, int]] = []
        told = early(
            self.rows, sure, demand, self.opening, self.rest, generator(seed), lambda *step: steps.append(step)
        )
        assert all(0 < done <= total for done, total in steps)
        return told


def drawn(total: int, opening: float, rest: float, seed: int) -> Fate:
    rng = generator(seed, "fate")
    held = [torch.rand(total, generator=rng) < share for share in (opening, rest)]
    return Fate(torch.rand(total, generator=rng) < 0.9, *held)


@pytest.mark.parametrize("confidence", [0.8, 0.99])
def test_the_verdict_is_that_of_all_attacks_on_all_images_but_for_the_error(confidence: float) -> None:
    wrong, tries = 0, 300
    for seed in range(tries):
        fate = drawn(120, 0.8, 0.85, seed)
        demand = Demand(70 + seed % 8, confidence)  # around what stands: the hardest demands
        told = fate.ask(5, demand, seed)
        wrong += told.met != (5 + fate.standing >= demand.needed)
        assert told.low <= told.value <= told.high
        assert told.met == (told.low >= demand.needed)
        assert told.met != (told.high < demand.needed)
        assert bool((told.open <= (fate.rows & fate.held_opening & ~fate.drawn) | (fate.rows & ~fate.opened)).all())
    # 300 tries at 1 - confidence: more than the mean and four deviations would not be chance.
    error = 1 - confidence
    assert wrong <= tries * error + 4 * (tries * error * confidence) ** 0.5


def test_a_demand_that_is_far_away_costs_few_draws_either_way() -> None:
    fate = drawn(2000, 0.8, 0.97, 1)
    assert fate.ask(0, Demand(1100, 0.99), 1).met
    assert int(fate.drawn.sum()) < 100
    fate = drawn(2000, 0.95, 0.3, 1)
    assert not fate.ask(0, Demand(1500, 0.99), 1).met
    assert int(fate.drawn.sum()) < 40


def test_enough_proofs_need_no_attack_and_enough_broken_images_no_more() -> None:
    fate = drawn(600, 0.9, 0.9, 2)
    told = fate.ask(500, Demand(480, 0.99), 2)
    assert told.met
    assert not bool(fate.opened.any())
    assert (told.low, told.value) == (500, 500)
    fate = drawn(600, 0.1, 0.9, 2)
    told = fate.ask(0, Demand(500, 0.99), 2)
    assert not told.met
    assert int(fate.opened.sum()) == 256  # one piece of the opening was enough
    assert not bool(fate.drawn.any())
    assert told.value == told.low == 0  # nothing was judged by all attacks, and nothing is claimed


def test_a_demand_at_what_stands_is_counted_to_the_end_and_exact() -> None:
    for seed in range(20):
        fate = drawn(80, 0.9, 0.9, seed)
        for needed, met in ((fate.standing, True), (fate.standing + 1, False)):
            again = Fate(fate.rows, fate.held_opening, fate.held_rest)
            told = again.ask(0, Demand(needed, 0.999999), seed)
            assert told.met is met


def test_a_demand_is_the_least_count_whose_interval_lies_above_the_bound() -> None:
    demand = Demand.of(0.6, 1000, 0.99)
    assert wilson(demand.needed, 1000)[0] >= 0.6 > wilson(demand.needed - 1, 1000)[0]
    assert Demand.of(0.0, 10, 0.99).needed == 0
    assert Demand.of(1.0, 10, 0.99).needed == 11  # ten of ten have an interval that reaches below 1


def test_no_images_to_attack() -> None:
    none = torch.zeros(10, dtype=torch.bool)
    fate = Fate(none, none, none)
    assert fate.ask(10, Demand(10, 0.99), 0).met
    assert not fate.ask(9, Demand(10, 0.99), 0).met
