"""Projected gradient ascent whose step size is set by its own progress (Auto-PGD)."""

from collections.abc import Iterator
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Generator, Tensor

from stages.attacks import _ascent, _sparse
from stages.attacks.base import Attack
from stages.oracle import Logits, reachable
from stages.threat import Threat

_TINY = 1e-12


class APGD(Attack):
    """Ascent with momentum from a step of 2 eps, halved for each example at checkpoints where it makes no headway.

        z_{t+1} = project(x_t + eta_t * steepest direction of loss(x_t))
        x_{t+1} = project(x_t + 0.75 (z_{t+1} - x_t) + 0.25 (x_t - x_{t-1}))        (x_1 = z_1)

    Checkpoints come after 0.22, then ever shorter shares of the steps (0.03 less each time, down to 0.06). There the
    step is halved and the search restarts from the best point so far, where either fewer than three quarters of the
    steps since the last checkpoint raised the loss, or at the last checkpoint the step was kept and the best loss has
    not risen since. The first point is drawn from the cube (linf) or the sphere (l2) and scaled onto the surface of the
    ball.

    l1: without momentum, x_{t+1} = project(x_t + eta_t s / ||s||_1), s the signs of the k_t steepest coordinates, onto
    the ball cut with the range, exactly; 30 % of the steps in a ball of 3 eps, 30 % in one of 2 eps, the rest in that
    of eps, each from the best point of the one before, the first from x plus normal noise. Every 4 % of a phase k_t
    becomes 2/3 of the number of pixels that the best point changes; where that number fell by 5 %, eta_t is eps again
    and the search goes on from the best point; elsewhere eta_t shrinks by 1.5, down to eps / 10.

    `loss` is cross-entropy or the scale-free `dlr` (with fewer than four classes that is the margin). `targets` > 0
    climbs the targeted DLR instead, towards each of the min(targets, K - 1) wrong classes of largest logit at x, the
    highest first and `restarts` times each; classes that are proved unreachable are left out.

    Source: Croce and Hein 2020, algorithm 1, sections 3 and 4; Croce and Hein 2021 ("Mind the box"), algorithm 2, for
    l1. Written from memory, the constants and the start compared with the code released with them. Departures: an
    example leaves at its first wrong answer, which changes no other example's path; the first checkpoint compares the
    first step with the loss at the start, as the paper does (the code compares it with zero).
    """

    steps: int = Field(default=100, ge=1)
    restarts: int = Field(default=1, ge=1)
    loss: Literal["ce", "dlr"] = "ce"
    targets: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _one_loss(self) -> Self:
        if self.targets and self.loss != "dlr":
            raise ValueError(f'targets = {self.targets} climbs the targeted DLR; set loss = "dlr", got "{self.loss}"')
        return self

    def perturb(self, logits: Logits, x: Tensor, y: Tensor, threat: Threat, rng: Generator) -> Tensor:
        climb = _sparse.climb if threat.norm == "l1" else _ascent.climb
        result = x.clone()
        alive = torch.ones(len(x), dtype=torch.bool, device=x.device)
        for target, wanted in self._aims(logits, x, y):
            for _ in range(self.restarts):
                start = _start(x, threat, rng)
                rows = (alive & wanted).nonzero().flatten()
                if len(rows) == 0:
                    continue
                hill = _ascent.Hill(logits, x, y, self.loss, target)[rows]
                result[rows], alive[rows] = climb(hill, start[rows], threat, self.steps)
        return result

    def _aims(self, logits: Logits, x: Tensor, y: Tensor) -> Iterator[tuple[Tensor | None, Tensor]]:
        """Target classes [B], None for any, and for which examples they are worth a climb, bool [B]."""
        if self.targets == 0:
            yield None, torch.ones_like(y, dtype=torch.bool)
            return
        with torch.no_grad():
            z = logits(x).float()
        ranked = z.scatter(1, y.unsqueeze(1), float("-inf")).argsort(dim=1, descending=True, stable=True)
        open_ = reachable(logits, z.shape[1], y)
        for target in ranked[:, : min(self.targets, z.shape[1] - 1)].T:
            yield target, open_.gather(1, target.unsqueeze(1)).squeeze(1)


def _start(x: Tensor, threat: Threat, rng: Generator) -> Tensor:
    """A random point on the surface of the ball, cut with the range; for l1, x plus normal noise, not projected."""
    if threat.norm == "linf":
        noise = torch.rand(x.shape, generator=rng, device=x.device, dtype=x.dtype) * 2 - 1
        size = noise.flatten(1).abs().amax(1)
    else:
        noise = torch.randn(x.shape, generator=rng, device=x.device, dtype=x.dtype)
        size = torch.linalg.vector_norm(noise.flatten(1), dim=1)
    if threat.norm == "l1":
        return x + noise
    return threat.project(x + threat.eps * noise / size.clamp(min=_TINY).view(_ascent.column(x)), x)
