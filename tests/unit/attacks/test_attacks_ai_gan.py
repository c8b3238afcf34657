"""AI-GAN: every loss reaches the generator, targets and radii are heard, and what a strike costs."""

import math
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stages.attacks.ai_gan import AIGAN, _discriminator, _Generator, _targeted
from stages.attacks.pgd import PGD
from stages.evaluate import under_attack
from stages.method import InputError
from stages.oracle import Oracle
from stages.seeding import generator
from stages.threat import Threat
from tests.digits_net import batches, digits_net

WIDE = Threat(norm="linf", eps=0.25)


def taught(**settings: Any) -> AIGAN:
    net, x, y, _, _ = digits_net()
    return AIGAN.load({"width": 8, **settings}).prepare(net, batches(x, y), generator(0))


@cache
def trained() -> AIGAN:
    return taught(epochs=15, radii=(0.25, 0.25), lr=0.003)


def test_the_generator_learns_from_the_discriminator() -> None:
    """A constant network leaves the realness of the fake alone; a detached fake would give no gradient at all."""
    net, judge = _Generator((1, 8, 8), 10, 4), _discriminator(1, 4)
    x, target, eps = torch.rand(6, 1, 8, 8), torch.arange(6), torch.full((6,), 0.1)
    delta = net(x, target, eps)

    def constant(x: Tensor) -> Tensor:
        return torch.zeros(len(x), 10) + 0 * x.sum()

    loss = AIGAN()._loss(constant, judge, x + delta, delta, target, eps)
    slopes = torch.autograd.grad(loss, [*net.parameters()])
    assert all(bool(slope.any()) for slope in slopes)


def test_the_hinge_starts_at_half_of_the_largest_norm() -> None:
    judge, target, eps = _discriminator(1, 4), torch.zeros(2, dtype=torch.int64), torch.tensor([0.1, 0.3])
    x = torch.rand(2, 1, 8, 8)

    def loss(share: float, hinge: float) -> float:
        delta = share * eps.view(-1, 1, 1, 1) * torch.ones_like(x)
        value = AIGAN(hinge=hinge, gan=0)._loss(lambda x: torch.zeros(len(x), 3), judge, x, delta, target, eps)
        return float(value.detach())

    assert loss(0.4, 1.0) == loss(0.4, 0.0)
    assert loss(0.8, 2.0) - loss(0.8, 0.0) == pytest.approx(2 * 0.3, abs=1e-5)


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 1, 2), (3, 7, 9), (1, 28, 28), (2, 5, 33)])
def test_images_of_any_size_stay_within_their_own_radius(shape: tuple[int, int, int]) -> None:
    net = _Generator(shape, 4, 4)
    x, eps = torch.rand(3, *shape), torch.tensor([1e-3, 0.1, 2.0])
    delta = net(100 * x, torch.tensor([0, 1, 3]), eps)
    assert delta.shape == x.shape
    assert bool((delta.flatten(1).abs().amax(1) <= eps + 1e-7).all())


def test_a_generator_of_zeros_changes_no_answer() -> None:
    net, _, _, x, y = digits_net()
    attack = taught(epochs=0)
    assert attack._generator is not None
    for parameter in attack._generator.parameters():
        parameter.zero_()
    assert torch.equal(attack.perturb(net, x, y, WIDE, generator(0)), x)
    survived, _ = under_attack(net, attack, x, y, WIDE, 0)
    assert bool(survived.all())


def test_the_target_is_heard_and_reached() -> None:
    net, _, _, x, y = digits_net()
    attack = trained()
    assert attack._generator is not None
    eps = torch.full((len(x),), 0.25)
    first, second = (attack._generator(x, (y + shift) % 10, eps) for shift in (1, 5))
    size = 0.25 * math.sqrt(x[0].numel())
    assert float((first - second).flatten(1).norm(dim=1).mean()) > 0.1 * size
    reached = [
        (net((x + attack._generator(x, (y + shift) % 10, eps)).clamp(0, 1)).argmax(1) == (y + shift) % 10)
        for shift in range(1, 10)
    ]
    chance = 0.1
    assert float(torch.cat(reached).float().mean()) > 4 * chance


def test_it_breaks_many_of_an_undefended_network_and_pgd_breaks_no_fewer() -> None:
    net, _, _, x, y = digits_net()
    mine, _ = under_attack(net, trained(), x, y, WIDE, 0)
    pgd, _ = under_attack(net, PGD(steps=20, loss="margin"), x, y, WIDE, 0)
    assert 30 < int((~mine).sum()) <= int((~pgd).sum())


def test_more_targets_never_break_fewer_and_each_costs_one_query_and_no_gradient() -> None:
    net, _, _, x, y = digits_net()
    one, broken = trained(), []
    for targets in (1, 3, 9):
        more = one.model_copy(update={"targets": targets})
        oracle = Oracle.of(net, len(x))
        found = more.perturb(oracle, x, y, WIDE.model_copy(update={"eps": 0.1}), generator(0))
        gone = net(found).argmax(1) != y
        broken.append(gone)
        assert oracle.spent.queries[~gone].tolist() == [1 + targets] * int((~gone).sum())
        assert not bool(oracle.spent.gradients.any())
    assert bool((broken[0] <= broken[1]).all())
    assert bool((broken[1] <= broken[2]).all())


def test_proved_classes_are_not_targets() -> None:
    net, _, _, x, y = digits_net()
    oracle = Oracle.of(net, len(x), unproved=torch.zeros(len(x), 10, dtype=torch.bool))
    assert torch.equal(trained().perturb(oracle, x, y, WIDE, generator(0)), x)
    assert oracle.spent.queries.tolist() == [1] * len(x)


@pytest.mark.parametrize(("stage", "passes"), [(0.0, 1), (0.5, 1 + 5), (1.0, 1 + 10)])
def test_only_the_first_stage_asks_the_attacker(stage: float, passes: int) -> None:
    """Ten gradients a batch by PGD in the first stage, one pass a batch throughout, one to count the classes."""
    net, x, y, _, _ = digits_net()
    asked = 0

    def logits(x: Tensor) -> Tensor:
        nonlocal asked
        asked += 1
        z: Tensor = net(x)
        return z

    AIGAN(epochs=2, width=4, batch=100, stage=stage).prepare(logits, [(x[:200], y[:200])], generator(0))
    assert asked == 1 + 2 * 2 * passes


def test_the_attacker_moves_towards_the_target_within_each_radius() -> None:
    net, x, y, _, _ = digits_net()
    target, eps = (y[:50] + 3) % 10, torch.linspace(0.01, 0.3, 50)
    found = _targeted(net, x[:50], target, eps)
    assert bool(((found - x[:50]).flatten(1).abs().amax(1) <= eps + 1e-6).all())
    before, after = (nn.functional.cross_entropy(net(at), target, reduction="none") for at in (x[:50], found))
    assert bool((after < before).all())
    assert float(found.min()) >= 0
    assert float(found.max()) <= 1


def test_preparing_is_repeatable_and_moves_no_global_generator() -> None:
    before = torch.random.get_rng_state()
    first, second = taught(epochs=1), taught(epochs=1)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert first._generator is not None
    assert second._generator is not None
    for name, value in first._generator.state_dict().items():
        assert torch.equal(value, second._generator.state_dict()[name])
    assert AIGAN(epochs=1)._generator is None


def test_bad_settings_and_a_missing_preparation_are_told() -> None:
    net, x, y, _, _ = digits_net()
    with pytest.raises(InputError, match="ai_gan: nothing has been learnt yet; call prepare"):
        AIGAN()(net, x, y, WIDE, generator(0))
    with pytest.raises(ValueError, match=r"radii: expected 0 < lowest <= highest, got 0\.3 and 0\.1"):
        AIGAN(radii=(0.3, 0.1))
    with pytest.raises(InputError, match=r"ai_gan: expected images \[B, C, H, W\], got \(50, 64\)"):
        AIGAN().prepare(net, [(x[:50].flatten(1), y[:50])], generator(0))
