"""Linear networks, on which the worst point of a threat is known in closed form."""

from typing import Literal

import torch
from torch import Tensor, nn

from stages.seeding import generator
from stages.threat import Threat

Norm = Literal["linf", "l2", "l1"]

NORMS: tuple[Norm, ...] = ("linf", "l2", "l1")
DUAL = {"linf": 1.0, "l2": 2.0, "l1": float("inf")}
EPS = {"linf": 0.05, "l2": 0.2, "l1": 0.3}


class TwoClass(nn.Module):
    """Logits (s, -s) / 2 with s = w . (x - 1/2) + b [B], so that the lead of class 0 is s."""

    b: Tensor

    def __init__(self, w: Tensor, b: Tensor | float = 0.0) -> None:
        super().__init__()
        self.w = nn.Parameter(w)
        self.register_buffer("b", torch.as_tensor(b))

    def lead(self, x: Tensor) -> Tensor:
        lead: Tensor = ((x - 0.5) * self.w).flatten(1).sum(1) + self.b
        return lead

    def forward(self, x: Tensor) -> Tensor:
        s = self.lead(x)
        return torch.stack([s / 2, -s / 2], 1)


def problem(norm: Norm, count: int = 24, seed: int = 0) -> tuple[TwoClass, Tensor, Threat]:
    """A net without offset, and images so near to mid-grey that the threat stays inside the range."""
    rng = generator(seed, norm)
    w = torch.randn(1, 4, 4, generator=rng)
    x = 0.5 + 0.1 * (torch.rand(count, 1, 4, 4, generator=rng) - 0.5)
    return TwoClass(w), x, Threat(norm=norm, eps=EPS[norm])


def drop(net: TwoClass, threat: Threat) -> float:
    """eps ||w||_dual: by how much the threat can lower the lead of any image."""
    return threat.eps * float(torch.linalg.vector_norm(net.w.detach().flatten(), ord=DUAL[threat.norm]))


def with_leads(norm: Norm, share: float, count: int = 24, seed: int = 0) -> tuple[TwoClass, Tensor, Tensor, Threat]:
    """Like `problem`, the images moved along w so that every lead is `share` of what the threat can take away."""
    net, x, threat = problem(norm, count, seed)
    w = net.w.detach()
    gap = share * drop(net, threat) - net.lead(x).detach()
    x = x + gap.view(-1, 1, 1, 1) * w / w.square().sum()
    return net, x, torch.zeros(count, dtype=torch.int64), threat
