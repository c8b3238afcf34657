"""TRADES: accuracy on clean images traded against agreement within the ball."""

from collections.abc import Mapping

import torch
from pydantic import Field
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from stages.evaluate import frozen
from stages.recipes import _inner
from stages.recipes.base import Recipe
from stages.threat import Threat

_NOISE = 0.001


class Trades(Recipe):
    """L = CE(f(x), y) + beta * mean_i KL(p(x_i) || p(x'_i)), x' maximising the same KL within the ball.

    KL(a || b) = sum_k a_k (log a_k - log b_k). In the outer loss the gradient flows through both arguments; in the
    attack p(x) is constant. The attack starts at x + 0.001 N(0, I), because at x itself the gradient of the KL is
    zero, and takes `steps` steps of `step` * eps in eval mode. `ramp` lets eps grow linearly from 0 over that share of
    the training; 0, the published way, is no ramp.
    Source: Zhang et al. 2019, equation 5 and the authors' code (beta 6; 10 steps of 0.007 at eps 0.031, hence the
    default step of 0.25 eps).
    """

    beta: float = Field(default=6.0, ge=0)
    steps: int = Field(default=10, ge=0)
    step: float = Field(default=0.25, gt=0)
    ramp: float = Field(default=0.0, ge=0, le=1)

    def loss(
        self, net: nn.Module, x: Tensor, y: Tensor, threat: Threat, rng: Generator, progress: float
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        threat = _inner.ramped(threat, progress, self.ramp)
        x_adv = self._attack(net, x, threat, rng)
        clean, adversarial = net(x), net(x_adv)
        natural = F.cross_entropy(clean, y)
        gap = divergence(clean, adversarial).mean()
        logs = {"loss.natural": natural.detach(), "kl": gap.detach(), "accuracy.train": _inner.hits(adversarial, y)}
        return natural + self.beta * gap, logs

    def _attack(self, net: nn.Module, x: Tensor, threat: Threat, rng: Generator) -> Tensor:
        if self.steps == 0:
            return x
        noise = torch.randn(x.shape, generator=rng, device=x.device, dtype=x.dtype)
        start = threat.project(x + _NOISE * noise, x)
        with frozen(net):
            with torch.no_grad():
                clean = net(x)
            return _inner.maximise(
                lambda z: divergence(clean, net(z)), x, start, threat, self.steps, self.step * threat.eps
            )


def divergence(a: Tensor, b: Tensor) -> Tensor:
    """KL(softmax(a) || softmax(b)) per example, [B], from logits [B, K]; the gradient flows through both."""
    log_a, log_b = F.log_softmax(a, dim=1), F.log_softmax(b, dim=1)
    return (log_a.exp() * (log_a - log_b)).sum(1)
