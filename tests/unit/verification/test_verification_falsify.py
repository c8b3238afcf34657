"""The search finds rare points: at corners between linear pieces; and gradients pass through signs."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from stages.seeding import generator
from stages.verification._straight import Straight
from stages.verification.cases import Array, Cases
from stages.verification.clock import Clock
from stages.verification.falsify import Hunt
from stages.verification.vnnlib import parse
from tests.networks import Single

N = 6


def _far_from(x: Tensor) -> Tensor:
    """A ridge: the distance, by the largest and the smallest coordinate, to a point; flat in most directions."""
    off = (x - torch.linspace(-0.9, 0.9, N)).abs()
    return off.amax(1) + 0.1 * off.amin(1) - 2e-3


def _wave(x: Tensor) -> Tensor:
    return 1 - 1e-4 - torch.cos(9 * x).mean(1)


@pytest.mark.parametrize("function", [_far_from, _wave])
def test_rare_points_are_found(function: Callable[[Tensor], Tensor]) -> None:
    text = "".join(f"(declare-const X_{i} Real)(assert (and (>= X_{i} -1) (<= X_{i} 1)))" for i in range(N))
    net = Single(lambda x: function(x).unsqueeze(1))
    cases = Cases.of(parse(f"{text}(declare-const Y_0 Real)(assert (<= Y_0 0))"), 1)

    def check(x: Array) -> bool:
        return cases.witnessed(x, net(torch.from_numpy(x).unsqueeze(0)).numpy().reshape(-1))

    hunt, clock, found = Hunt(net, cases, check, generator(0, "hunt")), Clock(60), None
    while found is None and clock.left() > 0:
        found = hunt.round(torch.tensor([0]), clock)
    assert found is not None
    assert check(found)
    assert np.abs(found).max() <= 1


def test_flat_steps_pass_gradients_and_keep_their_values() -> None:
    x = torch.tensor([-2.0, 0.0, 1.0, 0.4], requires_grad=True)
    with Straight():
        values = [torch.sign(x), torch.round(x), torch.floor(x), torch.ceil(x)]
    for value, plain in zip(values, (torch.sign, torch.round, torch.floor, torch.ceil), strict=True):
        assert torch.equal(value, plain(x))
    slopes = [torch.autograd.grad(value.sum(), x)[0] for value in values]
    torch.testing.assert_close(slopes[0], 1 / (1 + x.detach() ** 2))
    for slope in slopes[1:]:
        assert torch.equal(slope, torch.ones(4))


def test_signs_are_descended_through() -> None:
    """Without a gradient of its own a sign gives none; with one the nearest jump is known."""
    x = torch.tensor([[0.5, -0.2]], requires_grad=True)
    with Straight():
        (slope,) = torch.autograd.grad((torch.sign(x) @ torch.tensor([1.0, -3.0])).sum(), x)
    assert slope[0, 0] > 0 > slope[0, 1]


def test_outputs_of_comparisons_alone_have_no_gradient_and_are_searched_all_the_same() -> None:
    net = Single(lambda x: torch.where(x > 0.95, 1.0, 0.0).amax(1, keepdim=True))
    text = "".join(f"(declare-const X_{i} Real)(assert (and (>= X_{i} 0) (<= X_{i} 1)))" for i in range(2))
    cases = Cases.of(parse(f"{text}(declare-const Y_0 Real)(assert (>= Y_0 1))"), 1)
    hunt = Hunt(net, cases, lambda x: bool(x.max() > 0.95), generator(0, "hunt"))
    assert hunt.round(torch.tensor([0]), Clock(60)) is not None
    still = Hunt(net, cases, lambda _: False, generator(0, "hunt"))
    assert still.around(torch.zeros(3, 2), torch.ones(3, 2) * 0.5, torch.zeros(3, dtype=torch.int64), Clock(60)) is None
