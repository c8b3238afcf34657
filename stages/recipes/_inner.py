"""The inner maximisation that recipes share: fixed steps, no early leaving, and no trace left in the network."""

from collections.abc import Callable

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from stages.evaluate import frozen
from stages.threat import Threat

Surrogate = Callable[[Tensor], Tensor]
"""[B, C, H, W] -> [B], to be maximised; no example's value depends on another example."""


def maximise(surrogate: Surrogate, x: Tensor, start: Tensor, threat: Threat, steps: int, length: float) -> Tensor:
    """x_{t+1} = project(x_t + length * steepest direction of `surrogate`), from `start`, within the threat around x.

    `length` in pixel units of the threat's norm. Returns a tensor without history.
    """
    x_adv = start.detach()
    for _ in range(steps):
        x_adv = threat.project(threat.ascend(x_adv, slope(surrogate, x_adv), length), x)
    return x_adv


def slope(surrogate: Surrogate, x: Tensor) -> Tensor:
    """Gradient of `surrogate` at x, example by example; parameters receive none."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        (grad,) = torch.autograd.grad(surrogate(x).sum(), x)
    return grad


def cross_entropy(net: nn.Module, y: Tensor) -> Surrogate:
    """CE(f(x), y), one value per example."""
    return lambda x: F.cross_entropy(net(x), y, reduction="none")


def pgd(
    net: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    rng: Generator,
    steps: int = 10,
    step: float = 0.25,
    start: str = "uniform",
) -> Tensor:
    """Cross-entropy PGD with `net` in eval mode; `step` as a share of eps, `start` "uniform" in the ball or "zero"."""
    begin = threat.random(x, rng) if start == "uniform" else x
    with frozen(net):
        return maximise(cross_entropy(net, y), x, begin, threat, steps, step * threat.eps)


def ramped(threat: Threat, progress: float, share: float) -> Threat:
    """The threat at this point of training: eps grows linearly from 0 over the first `share`, then stays."""
    if progress >= share:
        return threat
    return threat.model_copy(update={"eps": threat.eps * progress / share})


def hits(logits: Tensor, y: Tensor) -> Tensor:
    """Share of right answers, as a scalar to log."""
    return (logits.detach().argmax(1) == y).float().mean()
