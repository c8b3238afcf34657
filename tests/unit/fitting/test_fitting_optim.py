"""Schedules end where they should; weight decay spares biases; bad settings are named."""

import itertools
import math

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from stages.fitting.optim import Fit, optimiser


def test_cosine_rises_over_the_warm_up_and_ends_near_zero() -> None:
    fit = Fit(lr=0.4, warmup=0.1)
    rates = [fit.rate(step, 100) for step in range(100)]
    assert rates[:10] == pytest.approx([0.04 * (i + 1) for i in range(10)])
    assert rates[10] == pytest.approx(0.4)
    assert rates[55] == pytest.approx(0.2)
    assert rates[99] == pytest.approx(0.2 * (1 + math.cos(math.pi * 89 / 90)))
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))


def test_piecewise_drops_at_its_milestones() -> None:
    fit = Fit(lr=1.0, schedule="piecewise", warmup=0.0, milestones=(0.5, 0.75), factor=0.1)
    assert [fit.rate(step, 8) for step in range(8)] == pytest.approx([1, 1, 1, 1, 0.1, 0.1, 0.01, 0.01])


def test_onecycle_is_a_triangle_of_the_same_mean() -> None:
    fit = Fit(lr=0.2, schedule="onecycle", peak=0.5)
    rates = [fit.rate(step, 10) for step in range(10)]
    assert rates == pytest.approx(rates[::-1])
    assert rates[0] == pytest.approx(0.02)
    assert sum(rates) / 10 == pytest.approx(0.1)


@pytest.mark.parametrize("schedule", ["cosine", "piecewise", "onecycle"])
@pytest.mark.parametrize("total", [1, 2, 7])
def test_every_rate_is_positive_and_at_most_lr(schedule: str, total: int) -> None:
    fit = Fit.load({"schedule": schedule, "lr": 0.3})
    assert all(0 < fit.rate(step, total) <= 0.3 + 1e-12 for step in range(total))


@pytest.mark.parametrize("kind", ["sgd", "adam", "adamw"])
def test_weight_decay_spares_vectors(kind: str) -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Linear(2, 2))
    net[2].weight.requires_grad_(False)
    groups = optimiser(net, Fit.load({"optimiser": kind, "weight_decay": 0.01})).param_groups
    assert [(group["weight_decay"], len(group["params"])) for group in groups] == [(0.01, 1), (0.0, 4)]
    assert all(p.dim() > 1 for p in groups[0]["params"])


def test_sgd_step_is_the_formula() -> None:
    net = nn.Linear(1, 1)
    with torch.no_grad():
        net.weight.fill_(2.0)
        net.bias.fill_(1.0)
    made = optimiser(net, Fit(lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.5))
    net.weight.grad, net.bias.grad = torch.tensor([[3.0]]), torch.tensor([3.0])
    made.step()
    # v = g + wd w; first step: w - lr (g + wd w) (1 + momentum)
    assert net.weight.item() == pytest.approx(2 - 0.1 * 4.0 * 1.9)
    assert net.bias.item() == pytest.approx(1 - 0.1 * 3.0 * 1.9)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"momentum": 0.0}, "set nesterov = false"),
        ({"milestones": [0.5, 1.5]}, "shares between 0 and 1"),
        ({"ema": 1.0}, "less than 1"),
        ({"lr": 0}, "greater than 0"),
        ({"lr": math.nan}, "finite"),
    ],
)
def test_bad_settings_are_refused(data: dict[str, object], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        Fit.load(data)
