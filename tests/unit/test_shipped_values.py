"""Attacks on a file: the engine's own values, the twin's gradients, and what survives them."""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from stages.attacks.fgsm import FGSM
from stages.shipped import Relay, Shipped, survivors
from stages.threat import Threat

LINF = Threat(norm="linf", eps=0.1)


class Scaled(nn.Module):
    """Logits (pixel 0, pixel 1) times a factor."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)[:, :2] * self.factor


def engine(images: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    return images.reshape(len(images), -1)[:, :2] * np.float32(0.0123456)


def test_values_are_the_engines_to_the_last_bit_and_gradients_the_twins() -> None:
    x = torch.rand(300, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    shipped = Shipped(engine, Scaled(1000 / 7))
    point = x.clone().requires_grad_()
    z = shipped(point)
    assert torch.equal(z, torch.from_numpy(engine(x.numpy())))
    assert torch.equal(z, shipped(x))
    (slope,) = torch.autograd.grad(z[:, 0].sum(), point)
    assert torch.equal(slope.flatten(1)[:, 0], torch.full((300,), 1000 / 7))


def test_a_relay_asks_the_engine_unless_a_gradient_is_wanted() -> None:
    x = torch.rand(5, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    relay, answers = Relay(engine, Scaled(3.0)), torch.from_numpy(engine(x.numpy()))
    point = x.clone().requires_grad_()
    assert torch.equal(relay(x), answers)
    with torch.no_grad():
        assert torch.equal(relay(point), answers)
    z = relay(point)
    assert torch.equal(z, Scaled(3.0)(x))
    assert torch.equal(torch.autograd.grad(z[:, 1].sum(), point)[0].flatten(1)[:, 1], torch.full((5,), 3.0))


def test_a_gradient_attack_breaks_exactly_what_lies_within_reach() -> None:
    # Class 0 leads by the gap of two pixels, and linf 0.1 closes a gap below 0.2.
    gaps = torch.tensor([0.05, 0.15, 0.19, 0.21, 0.4])
    x = torch.zeros(5, 1, 1, 2)
    x[..., 0], x[..., 1] = (0.5 + gaps / 2).view(-1, 1, 1), (0.5 - gaps / 2).view(-1, 1, 1)
    clean, alive, _ = survivors(Shipped(engine, Scaled(3.0)), [FGSM()], x, torch.zeros(5, dtype=torch.long), x, LINF, 0)
    assert clean.all()
    assert alive.tolist() == [False, False, False, True, True]


def test_a_replayed_example_counts_only_within_the_threat() -> None:
    x = torch.tensor([[0.56, 0.44], [0.9, 0.1]]).view(2, 1, 1, 2)
    replay = torch.tensor([[0.46, 0.54], [0.0, 1.0]]).view(2, 1, 1, 2)
    clean, alive, _ = survivors(Shipped(engine, Scaled(3.0)), [], x, torch.zeros(2, dtype=torch.long), replay, LINF, 0)
    assert clean.all()
    assert alive.tolist() == [False, True]
