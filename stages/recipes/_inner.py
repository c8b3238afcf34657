"""The inner maximisation that recipes share: fixed steps, no early leaving, and no trace left in the network."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from stages.threat import Threat


@contextmanager
def still(net: nn.Module) -> Iterator[None]:
    """`net` in eval mode inside, every module's own flag as before outside; batch-norm statistics do not move."""
    flags = [(module, module.training) for module in net.modules()]
    net.eval()
    try:
        yield
    finally:
        for module, flag in flags:
            module.training = flag


def maximise(
    surrogate: Callable[[Tensor], Tensor], x: Tensor, start: Tensor, threat: Threat, steps: int, size: float
) -> Tensor:
    """x_{t+1} = Pi(x_t + size * ascent direction of `surrogate`), from `start`, within the threat around x.

    `surrogate` [B, C, H, W] -> [B]; its examples must not depend on each other. Returns a tensor without history.
    """
    x_adv = start.detach()
    for _ in range(steps):
        x_adv = threat.project(threat.ascend(x_adv, gradient(surrogate, x_adv), size), x).detach()
    return x_adv


def gradient(surrogate: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Gradient of the sum of `surrogate` at x; parameters receive none."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        (grad,) = torch.autograd.grad(surrogate(x).sum(), x)
    return grad


def pgd(net: nn.Module, x: Tensor, y: Tensor, threat: Threat, rng: Generator, steps: int, size: float) -> Tensor:
    """Cross-entropy PGD from a uniform start, `net` in eval mode; `size` in pixel units."""
    with still(net):
        return maximise(
            lambda x_adv: F.cross_entropy(net(x_adv), y, reduction="none"),
            x,
            threat.random(x, rng),
            threat,
            steps,
            size,
        )
