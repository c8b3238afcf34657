"""adv-KIP in small: a few training points, optimised so that kernel regression on them withstands PGD.

Tsilivis, Su and Kempe 2022, reconstructed from the abstract: the loss of kernel inducing points (Nguyen et al.
2021) at inputs that PGD moved, with the closed-form tangent kernel of an infinite ReLU network (Jacot et al. 2018).
"""

import math
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stages.seeding import generator

_W, _B = 2.0, 0.01
_LAYERS = 3
_RIDGE = 1e-6


def tangent(a: Tensor, b: Tensor) -> Tensor:
    """Kernel [A, B] of float64 points [A, D] and [B, D]: k of the outputs, theta of their gradients, layer by layer."""
    k = _W * a @ b.T / a.shape[1] + _B
    along = (_W * a.square().sum(1) / a.shape[1] + _B).unsqueeze(1)
    across = (_W * b.square().sum(1) / b.shape[1] + _B).unsqueeze(0)
    theta = k
    for _ in range(_LAYERS):
        size = (along * across).sqrt()
        cosine = (k / size).clamp(-1 + 1e-7, 1 - 1e-7)
        angle = torch.arccos(cosine)
        first = size * (angle.sin() + (math.pi - angle) * cosine) / (2 * math.pi)
        k = _W * first + _B
        theta = k + _W * (math.pi - angle) / (2 * math.pi) * theta
        along, across = _W * along / 2 + _B, _W * across / 2 + _B
    return theta


def solve(points: Tensor, targets: Tensor) -> Tensor:
    """(K + ridge mean(diag K) I)^-1 targets, so that regression is `tangent(x, points) @ solve(points, targets)`."""
    kernel = tangent(points, points)
    ridge = _RIDGE * kernel.diagonal().mean() * torch.eye(len(points), dtype=kernel.dtype)
    solved: Tensor = torch.linalg.solve(kernel + ridge, targets)
    return solved


def distil(x: Tensor, y: Tensor, count: int, eps: float, steps: int, lr: float = 0.02) -> tuple[Tensor, Tensor]:
    """`count` float32 points [n, C, H, W] and centred targets [n, K], from images and labels; linf `eps` inside."""
    classes, rng, flat = int(y.max()) + 1, generator(0, "adv-kip"), x.flatten(1).double()
    centred = torch.eye(classes, dtype=torch.float64) - 1 / classes
    rows = torch.cat([(y == c).nonzero().flatten()[: count // classes] for c in range(classes)])
    points, targets = flat[rows].clone().requires_grad_(True), centred[y[rows]]
    adam = torch.optim.Adam([points], lr=lr)
    for _ in range(steps):
        batch = torch.randperm(len(flat), generator=rng)[:150]
        origin, wanted = flat[batch], centred[y[batch]]
        moved = _pgd(points.detach(), targets, origin, wanted, eps)
        loss = (tangent(moved, points) @ solve(points, targets) - wanted).square().mean() / 2
        adam.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        adam.step()
        with torch.no_grad():
            points.clamp_(0, 1)
    return points.detach().float().view(-1, *x.shape[1:]), targets.float()


def network(points: Tensor, targets: Tensor, epochs: int = 200) -> nn.Module:
    """Two hidden layers, ordinary training on the points alone."""
    rng, sizes = generator(0, "student"), (points[0].numel(), 256, 256, targets.shape[1])
    linear = [nn.Linear(a, b) for a, b in pairwise(sizes)]
    with torch.no_grad():
        for layer in linear:
            layer.weight.copy_(torch.randn(layer.weight.shape, generator=rng) * (2 / layer.in_features) ** 0.5)
            layer.bias.zero_()
    net = nn.Sequential(nn.Flatten(), linear[0], nn.ReLU(), linear[1], nn.ReLU(), linear[2])
    adam = torch.optim.Adam(net.parameters(), lr=0.003)
    for _ in range(epochs):
        adam.zero_grad()
        F.cross_entropy(net(points), targets.argmax(1)).backward()  # type: ignore[no-untyped-call]
        adam.step()
    return net.eval().requires_grad_(False)


def _pgd(points: Tensor, targets: Tensor, origin: Tensor, wanted: Tensor, eps: float, steps: int = 3) -> Tensor:
    dual, moved = solve(points, targets), origin
    for _ in range(steps):
        at = moved.detach().requires_grad_(True)
        (slope,) = torch.autograd.grad((tangent(at, points) @ dual - wanted).square().sum(), at)
        moved = torch.max(torch.min(moved + 2.5 * eps / steps * slope.sign(), origin + eps), origin - eps).clamp(0, 1)
    return moved
