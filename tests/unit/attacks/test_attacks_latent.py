"""Latent: linear machines on Gaussians, a decoder that keeps the answer, and what a strike costs."""

import math

import pytest
import torch
from torch import Tensor

from stages.attacks._learn import sampled
from stages.attacks.latent import Latent, boundaries
from stages.attacks.pgd import PGD
from stages.evaluate import under_attack
from stages.method import InputError
from stages.oracle import Oracle
from stages.seeding import generator
from stages.threat import Threat
from tests.digits_net import batches, digits_net

WIDE = Threat(norm="linf", eps=0.25)


def prepared(**settings: int) -> Latent:
    net, x, y, _, _ = digits_net()
    return Latent.load({"epochs": 40, "hidden": 128, **settings}).prepare(net, batches(x, y), generator(0))


def gaussians(count: int = 200) -> tuple[Tensor, Tensor, Tensor]:
    """Two clouds of unit variance around +-mu, far from the origin and in another unit."""
    rng = generator(1)
    mu = torch.randn(8, generator=rng)
    mu *= 2 / mu.norm()
    y = torch.arange(2 * count) % 2
    z = torch.randn(2 * count, 8, generator=rng) + (2 * y.unsqueeze(1) - 1) * mu
    return 30 + 5 * z, y, mu


def test_the_machine_between_two_gaussians_stands_across_their_means() -> None:
    z, y, mu = gaussians()
    normals, offsets, means = boundaries(z, y, 2, 200, generator(0))
    cosine = float(normals[0, 1] @ mu / mu.norm())
    assert math.degrees(math.acos(cosine)) < 10
    assert torch.equal(normals[1, 0], -normals[0, 1])
    assert torch.equal(offsets[1, 0], -offsets[0, 1])
    assert float(normals[0, 1].norm()) == pytest.approx(1, abs=1e-5)
    side = z @ normals[0, 1] + offsets[0, 1]
    assert float(((side > 0) == (y == 1)).float().mean()) > 0.95
    middle = means.mean(0) @ normals[0, 1] + offsets[0, 1]
    assert abs(float(middle)) < 0.1 * float((means[1] - means[0]).norm())


def test_classes_that_were_never_seen_have_no_boundary() -> None:
    z, y, _ = gaussians()
    normals, offsets, _ = boundaries(z, y * 2, 4, 200, generator(0))
    known = ~offsets.isnan()
    assert known.nonzero().tolist() == [[0, 2], [2, 0]]
    assert bool(normals[1].isnan().all())


def test_the_decoded_image_keeps_the_networks_answer() -> None:
    net, x, _, _, _ = digits_net()
    bank = prepared()._bank
    assert bank is not None
    decoded = bank.decode(net[:-1](x)).view_as(x)  # type: ignore[index]
    assert float((net(decoded).argmax(1) == net(x).argmax(1)).float().mean()) > 0.95


def test_crossing_by_the_distance_of_means_changes_the_networks_answer_for_most_pairs() -> None:
    net, _, _, _, _ = digits_net()
    bank = prepared()._bank
    assert bank is not None
    s, t = (~torch.eye(10, dtype=torch.bool)).nonzero().T
    there = net[-1](bank.moved(bank.means[s], s, t, 1.0)).argmax(1)  # type: ignore[index]
    assert float((there == t).float().mean()) > 0.9
    assert torch.equal(bank.moved(bank.means[s], s, t, 0.0), bank.means[s])


def test_it_finds_some_and_pgd_finds_them_and_more() -> None:
    net, _, _, x, y = digits_net()
    mine, _ = under_attack(net, prepared(), x, y, WIDE, 0)
    pgd, _ = under_attack(net, PGD(steps=20, loss="margin"), x, y, WIDE, 0)
    assert 10 < int((~mine).sum()) <= int((~pgd).sum())


def test_a_strike_costs_no_gradient_and_one_query_a_try() -> None:
    net, _, _, x, y = digits_net()
    oracle = Oracle.of(net, len(x))
    attack = prepared(targets=3, tries=4)
    found = attack.perturb(oracle, x, y, WIDE.model_copy(update={"eps": 1e-6}), generator(0))
    assert torch.equal(found, x)
    assert oracle.spent.queries.tolist() == [1 + 3 * 4] * len(x)
    assert not bool(oracle.spent.gradients.any())


def test_proved_classes_are_not_tried() -> None:
    net, _, _, x, y = digits_net()
    oracle = Oracle.of(net, len(x), unproved=torch.zeros(len(x), 10, dtype=torch.bool))
    prepared().perturb(oracle, x, y, WIDE, generator(0))
    assert oracle.spent.queries.tolist() == [1] * len(x)


def test_preparing_is_repeatable_leaves_the_setting_as_it_was_and_moves_no_global_generator() -> None:
    net, _, _, x, y = digits_net()
    before = torch.random.get_rng_state()
    first, second = prepared(epochs=2), prepared(epochs=2)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(first(net, x, y, WIDE, generator(0)), second(net, x, y, WIDE, generator(1)))
    assert first.dump() == second.dump()
    assert Latent(epochs=2)._bank is None


def test_unprepared_or_prepared_on_something_else_it_says_what_to_do() -> None:
    net, _, _, x, y = digits_net()
    with pytest.raises(InputError, match=r"latent: nothing has been learnt yet; call prepare\(logits, data, rng\)"):
        Latent()(net, x, y, WIDE, generator(0))
    wide = torch.cat([x, x], 3)
    with pytest.raises(InputError, match=r"latent: prepared on images .* prepare it on this network"):
        prepared(epochs=1)(lambda x: net(x[..., : x.shape[3] // 2]), wide, y, WIDE, generator(0))


def test_a_sample_of_a_sorted_stream_holds_every_class_evenly() -> None:
    y = torch.arange(10).repeat_interleave(300)
    stream = ((y[at : at + 100].view(-1, 1, 1, 1).float(), y[at : at + 100]) for at in range(0, 3000, 100))
    x, labels = sampled(stream, 500, generator(0))
    counts = labels.bincount(minlength=10)
    assert len(x) == 500
    assert torch.equal(x.flatten().long(), labels)
    assert 25 < int(counts.min()) <= int(counts.max()) < 80
    with pytest.raises(InputError, match="expected at least one example to learn from, got none"):
        sampled(iter(()), 5, generator(0))
