"""Counting hits: what enters an attack, what is believed, and what is left as it was."""

import pytest
import torch
from torch import Generator, Tensor, nn

from stages.evaluate import confusion, correct, frozen, outputs, under_attack
from stages.method import InputError
from stages.oracle import Logits
from stages.threat import Threat

THREAT = Threat(norm="linf", eps=0.5)


def bright(x: Tensor) -> Tensor:
    """Class 1 where the mean pixel is above one half."""
    mean = x.flatten(1).mean(1)
    return torch.stack([0.5 - mean, mean - 0.5], 1)


def level(*values: float) -> Tensor:
    return torch.tensor(values).view(-1, 1, 1, 1).expand(-1, 1, 2, 2).clone()


def test_integers_and_floats_count_alike() -> None:
    bytes_ = torch.tensor([0, 100, 200, 255], dtype=torch.uint8).view(4, 1, 1, 1)
    y = torch.tensor([0, 1, 1, 1])
    expected = [True, False, True, True]
    assert correct(bright, bytes_, y).tolist() == expected
    assert correct(bright, bytes_.float() / 255, y, batch=3).tolist() == expected


def test_only_examples_that_are_right_enter_the_attack_and_only_broken_ones_come_back_changed() -> None:
    seen: list[int] = []

    def strike(logits: Logits, x: Tensor, y: Tensor, threat: Threat, rng: Generator) -> Tensor:
        seen.append(len(x))
        return x + 0.3

    x, y = level(0.1, 0.4, 0.9, 0.3), torch.tensor([0, 0, 1, 1])
    survived, x_adv = under_attack(bright, strike, x, y, THREAT, 0)
    assert seen == [3]
    assert survived.tolist() == [True, False, True, False]
    assert torch.allclose(x_adv, level(0.1, 0.7, 0.9, 0.3))


def test_a_batch_without_a_right_answer_calls_no_attack() -> None:
    def strike(logits: Logits, x: Tensor, y: Tensor, threat: Threat, rng: Generator) -> Tensor:
        raise AssertionError

    survived, x_adv = under_attack(bright, strike, level(0.9), torch.tensor([0]), THREAT, 0)
    assert survived.tolist() == [False]
    assert torch.equal(x_adv, level(0.9))


def test_every_batch_has_its_own_generator_and_the_seed_decides() -> None:
    def strike(logits: Logits, x: Tensor, y: Tensor, threat: Threat, rng: Generator) -> Tensor:
        return torch.ones_like(x) * torch.rand((), generator=rng) * 0.4 + 0.55

    x, y = level(*[0.2] * 6), torch.zeros(6, dtype=torch.int64)
    steps: list[tuple[int, int]] = []
    _, first = under_attack(bright, strike, x, y, THREAT, 7, batch=2, on_step=lambda *s: steps.append(s))
    _, again = under_attack(bright, strike, x, y, THREAT, 7, batch=2)
    _, other = under_attack(bright, strike, x, y, THREAT, 8, batch=2)
    _, tail = under_attack(bright, strike, x[:2], y[:2], THREAT, 7, batch=2)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert len(set(first[:, 0, 0, 0].tolist())) == 3
    assert torch.equal(first[:2], tail)
    assert steps == [(2, 6), (4, 6), (6, 6)]


def test_confusion_has_true_classes_in_rows() -> None:
    counts = confusion(bright, level(0.1, 0.9, 0.8, 0.2), torch.tensor([0, 0, 1, 1]), 2)
    assert counts.tolist() == [[1, 1], [1, 1]]
    assert confusion(bright, level(0.9), torch.tensor([0]), 3).tolist() == [[0, 1, 0], [0, 0, 0], [0, 0, 0]]


def test_confusion_refuses_labels_beyond_the_classes() -> None:
    with pytest.raises(InputError, match=r"expected labels and predictions within 0\.\.1, got up to 2"):
        confusion(bright, level(0.9), torch.tensor([2]), 2)


def test_outputs_that_are_not_finite_are_named() -> None:
    def broken(x: Tensor) -> Tensor:
        return torch.where(x.flatten(1).mean(1, keepdim=True) > 0.5, float("nan"), bright(x))

    with pytest.raises(InputError, match=r"not finite for 1 of 3 images \(first at position 1\)"):
        correct(broken, level(0.1, 0.9, 0.2), torch.tensor([0, 1, 0]), batch=2)


def test_no_images_is_an_error() -> None:
    with pytest.raises(InputError, match="expected at least one image, got none"):
        outputs(bright, level()[:0])


def test_frozen_restores_every_flag_even_after_an_error() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5), nn.BatchNorm1d(2))
    net.train()
    net[2].eval()
    net[0].bias.requires_grad_(False)
    modes = [module.training for module in net.modules()]
    flags = [parameter.requires_grad for parameter in net.parameters()]
    inside: list[bool] = []

    def use() -> None:
        with frozen(net) as still:
            inside.extend(module.training for module in still.modules())
            inside.extend(parameter.requires_grad for parameter in still.parameters())
            raise KeyError("interrupted")

    with pytest.raises(KeyError, match="interrupted"):
        use()
    assert not any(inside)
    assert [module.training for module in net.modules()] == modes
    assert [parameter.requires_grad for parameter in net.parameters()] == flags
