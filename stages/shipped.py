"""The exported file under attack: values from the engine that ships, gradients from its torch twin.

An int8 engine has no gradients, and an attack on the float network is only a transfer attack on it. Here every forward
value is the engine's own; the backward pass goes through the twin (`stages/nn/imported.py`), which lets gradients pass
straight through rounding. Black-box attacks see the engine alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from stages.attacks.base import Attack
from stages.evaluate import correct, under_attack
from stages.seeding import derive
from stages.threat import Threat

Engine = Callable[[npt.NDArray[np.float32]], npt.NDArray[np.float32]]
OnStep = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Shipped:
    """Logits [B, K] of the engine for images [B, C, H, W]; differentiable with respect to x through the twin.

    For z the twin's logits and e the engine's, the value is e + (z - z), with no gradient through the last z: the
    backward-pass differentiable approximation (Athalye, Carlini and Wagner 2018, section 4.1; from memory). The bracket
    is exactly 0, so the value is the engine's to the last bit; z + (e - z) would round, and an attack that stops at its
    first wrong answer could stop at one that the engine never gives.
    """

    engine: Engine
    twin: nn.Module

    def __call__(self, x: Tensor) -> Tensor:
        values = torch.from_numpy(self.engine(x.detach().contiguous().numpy()))
        if not (torch.is_grad_enabled() and x.requires_grad):
            return values
        twin: Tensor = self.twin(x)
        return values + (twin - twin.detach())


@dataclass(frozen=True, slots=True)
class Relay:
    """Logits of a float file: questions without gradients go to its engine, the others to its torch twin.

    The two are one function up to rounding, and an engine answers in about two thirds of the twin's time, which is most
    of what Square spends. Where values round on the way (int8) they are not one function: take `Shipped` there.
    """

    engine: Engine
    twin: nn.Module

    def __call__(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and x.requires_grad:
            z: Tensor = self.twin(x)
            return z
        return torch.from_numpy(self.engine(x.detach().contiguous().numpy()))


def survivors(
    shipped: Shipped,
    attacks: Sequence[Attack],
    x: Tensor,
    y: Tensor,
    replay: Tensor,
    threat: Threat,
    seed: int,
    on_step: OnStep | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Which images the file classifies rightly, and rightly still under the worst of everything, both bool [N]; and
    the points that broke the others, float32 [N, C, H, W], the image itself where it was not broken.

    `replay` [N, C, H, W] are adversarial examples found elsewhere (on the float network); an image whose replayed
    example is misread is broken before any attack of our own starts. Every attack is run on what is left. The points
    are within the threat: the attacks see to it, and replayed ones are projected again.
    """
    images = x if x.dtype == torch.float32 else x.to(torch.float32) / 255
    clean = correct(shipped, images, y)
    replay = threat.project(replay, images)
    alive = clean & correct(shipped, replay, y)
    found = torch.where((clean & ~alive).view(-1, 1, 1, 1), replay, images)
    for number, attack in enumerate(attacks):
        rows = alive.nonzero().flatten()
        if len(rows) == 0:
            break
        survived, points = under_attack(
            shipped, attack, images[rows], y[rows], threat, derive(seed, "shipped", number, attack.kind)
        )
        alive[rows[~survived]], found[rows] = False, points
        if on_step is not None:
            on_step(number + 1, len(attacks))
    return clean, alive, found
