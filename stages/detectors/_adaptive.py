"""The attack that knows the detector: a wrong answer that is not flagged."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Generator, Tensor

from stages.attacks._losses import margin
from stages.method import Value
from stages.threat import Threat

Examine = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(x [M, ...], rows [M]) -> logits [M, K] and suspicions [n, M]; `rows` says which of the examples these are."""


@dataclass(frozen=True, slots=True)
class Evaded:
    """By example: whether a wrong answer was found, whether one was found that is not flagged, and the best point.

    The point is an unflagged wrong one where there is one, else the wrong one with the lowest score, else x, and
    `score` its score, infinite where no wrong answer was found. `by` is the number of the weight that evaded first, the
    infinite one last; -2 where a start already did, -1 where nothing did.
    """

    wrong: Tensor
    evaded: Tensor
    x_adv: Tensor
    score: Tensor
    by: Tensor


class Adaptive(Value):
    """Steepest ascent, within the threat, of

        margin(z(x'), y) - weight * sum_i max(0, suspicions_i(x') - threshold)

    for every weight, and last with an infinite one: the margin alone while the answer is right, the detector alone once
    it is wrong. Every weight starts from each of `starts` (what attacks found that do not know the detector), then
    `restarts` times from a random point. The step falls from 2 eps to eps / 50 along a cosine. An example leaves at the
    first point that is wrong and not flagged.

    Source: the sum follows the adaptive attack of Xu et al. 2018 (their released code) and Carlini and Wagner 2017,
    "Adversarial examples are not easily detected", in the form for a norm ball; the infinite weight is the selective
    attack of Bryniarski et al. 2021 (both from memory). Departures: fixed weights for the search over the constant;
    projected ascent with the threat's steepest step for Adam in the space of tanh; the schedule of steps.
    """

    steps: int = Field(default=50, ge=1)
    restarts: int = Field(default=1, ge=0)
    weights: tuple[float, ...] = Field(default=(0.0, 1.0, 10.0, 100.0), min_length=1)

    def evade(
        self,
        examine: Examine,
        threshold: float,
        x: Tensor,
        y: Tensor,
        threat: Threat,
        rng: Generator,
        starts: Sequence[Tensor] = (),
    ) -> Evaded:
        """On examples [B, ...] that are right without an attack; `starts` [B, ...] each lie within the threat.

        Random points are drawn for the whole batch, so that an example's path does not depend on which others are left.
        """
        found = _Found.begin(x, y, threshold)
        everyone = torch.arange(len(x), device=x.device)
        for start in starts:
            with torch.no_grad():
                found.note(start, everyone, *examine(start, everyone), by=-2)
        everywhere = torch.ones_like(found.wrong)
        for number, weight in enumerate((*self.weights, None)):
            points = list(zip(starts, _fresh(starts), strict=True))
            points += [(threat.random(x, rng), everywhere) for _ in range(self.restarts)]
            for start, fresh in points:
                left = everyone[fresh & ~found.evaded]
                self._climb(examine, weight, found, start[left], left, x, threat, number)
        return Evaded(found.wrong, found.evaded, found.x_adv, found.score, found.by)

    def _climb(
        self,
        examine: Examine,
        weight: float | None,
        found: "_Found",
        point: Tensor,
        rows: Tensor,
        x: Tensor,
        threat: Threat,
        number: int,
    ) -> None:
        for step in range(self.steps):
            if len(rows) == 0:
                return
            point = point.detach().requires_grad_(True)
            with torch.enable_grad():
                z, suspicions = examine(point, rows)
                slope = _slope(z, suspicions, point, found.y[rows], found.threshold, weight)
            left = ~found.note(point.detach(), rows, z.detach(), suspicions.detach(), number)
            point, rows, slope = point.detach()[left], rows[left], slope[left]
            length = threat.eps * (0.02 + 0.99 * (1 + math.cos(math.pi * step / self.steps)))
            point = threat.project(threat.ascend(point, slope, length), x[rows])
        if len(rows):
            with torch.no_grad():
                found.note(point, rows, *examine(point, rows), by=number)


def _fresh(starts: Sequence[Tensor]) -> list[Tensor]:
    """By start, bool [B]: whether no start before it is the same point, which would be climbed from twice."""
    found = []
    for number, start in enumerate(starts):
        seen = torch.zeros(len(start), dtype=torch.bool, device=start.device)
        for one in starts[:number]:
            seen |= (start == one).flatten(1).all(1)
        found.append(~seen)
    return found


def _slope(z: Tensor, suspicions: Tensor, point: Tensor, y: Tensor, threshold: float, weight: float | None) -> Tensor:
    """The gradient of the objective, summed over the examples so that none depends on another."""
    lead = margin(z, y)
    excess = (suspicions - threshold).clamp(min=0).sum(0)
    if weight is None:
        right = z.detach().argmax(1) == y
        objective = torch.where(right, lead, -excess)
    else:
        objective = lead - weight * excess
    if not objective.requires_grad:  # nothing leads back to the input: the attack stands still, and findings say so
        return torch.zeros_like(point)
    (slope,) = torch.autograd.grad(objective.sum(), point, allow_unused=True)
    return torch.zeros_like(point) if slope is None else slope


@dataclass(slots=True)
class _Found:
    """The best point of every example so far."""

    y: Tensor
    threshold: float
    wrong: Tensor
    evaded: Tensor
    x_adv: Tensor
    score: Tensor
    by: Tensor

    @staticmethod
    def begin(x: Tensor, y: Tensor, threshold: float) -> "_Found":
        none = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        score = torch.full((len(x),), float("inf"), device=x.device)
        return _Found(y, threshold, none, none.clone(), x.clone(), score, torch.full_like(y, -1))

    def note(self, point: Tensor, rows: Tensor, z: Tensor, suspicions: Tensor, by: int) -> Tensor:
        """Take in what was seen at `point` for `rows`; which of these are wrong and not flagged, bool [M]."""
        score, wrong = suspicions.amax(0).to(self.score.dtype), z.argmax(1) != self.y[rows]
        slipped = wrong & (score <= self.threshold)
        better = wrong & (score < self.score[rows])
        self.x_adv[rows[better]], self.score[rows[better]] = point[better], score[better]
        self.by[rows[slipped & ~self.evaded[rows]]] = by
        self.wrong[rows[wrong]] = True
        self.evaded[rows[slipped]] = True
        return slipped
