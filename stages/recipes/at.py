"""Adversarial training on PGD examples."""

from collections.abc import Mapping
from typing import Literal

from pydantic import Field
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from stages.recipes import _inner
from stages.recipes.base import Recipe
from stages.threat import Threat


class AdversarialTraining(Recipe):
    """L = CE(f(x'), y), where x' comes from `steps` PGD steps on the cross-entropy.

    `step` is the length of one step as a share of eps (0.25 is the customary 2/255 at eps 8/255); `start` is a uniform
    point of the ball, or x itself ("zero"). `ramp` lets eps grow linearly from 0 over that share of the training: small
    networks at large eps (MNIST at 0.3) otherwise never leave chance level. 0, the published way, is no ramp.
    Source: Madry et al. 2018, equation 2.1. Departure: the attack sees the network in eval mode, as Pang et al. 2021
    recommend, where the original attacks in train mode.
    """

    steps: int = Field(default=10, ge=1)
    step: float = Field(default=0.25, gt=0)
    start: Literal["uniform", "zero"] = "uniform"
    ramp: float = Field(default=0.0, ge=0, le=1)

    def loss(
        self, net: nn.Module, x: Tensor, y: Tensor, threat: Threat, rng: Generator, progress: float
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        threat = _inner.ramped(threat, progress, self.ramp)
        x_adv = _inner.pgd(net, x, y, threat, rng, self.steps, self.step, self.start)
        logits = net(x_adv)
        return F.cross_entropy(logits, y), {"accuracy.train": _inner.hits(logits, y)}
