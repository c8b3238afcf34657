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

Examine = Callable[[Tensor, Tensor], Sequence[Tensor]]
"""(x [M, ...], rows [M]) -> logits [M, K], suspicions [n, M] and, where there are any, the copies' logits [m, M, K];
`rows` says which of the examples these are."""

_Goal = Callable[[Sequence[Tensor], Tensor], Tensor | None]
"""(what `examine` answers, labels [M]) -> [M], to be climbed; None where it cannot be computed from these answers."""


@dataclass(frozen=True, slots=True)
class Evaded:
    """By example: whether a wrong answer was found, whether one was found that is not flagged, and the best point.

    The point is an unflagged wrong one where there is one, else the wrong one with the lowest score, else x, and
    `score` its score, infinite where no wrong answer was found. `by` is the number of the weight that evaded first, the
    infinite one after the others and the common class after that; -2 where a start already did, -1 where nothing did.
    """

    wrong: Tensor
    evaded: Tensor
    x_adv: Tensor
    score: Tensor
    by: Tensor


class Adaptive(Value):
    """Steepest ascent, within the threat, of three kinds of objectives, each from every point of `starts` (what attacks
    found that do not know the detector) and `restarts` times from a random point.

    1. A common class: for x' and its copies, together i = 0..m, and t the best wrong class of their mean logits,
       -log sum_i exp(max_{k != t} z_ik - z_it), so that all give the same wrong answer and give it surely; then with t
       the second best, up to the one at place `targets`.
    2. margin(z(x'), y) - weight * sum_i max(0, suspicions_i(x') - threshold) for every weight.
    3. The same with an infinite weight: the margin while the answer is right, the detector alone once it is wrong.

    The first has a gradient where the second has none: where the network is sure of x' and of its copies, a difference
    of probabilities is flat. The step falls from 2 eps to eps / 50 along a cosine. An example leaves at the first point
    that is wrong and not flagged.

    Source: 2 follows the adaptive attack of Xu et al. 2018 (their released code) and Carlini and Wagner 2017,
    "Adversarial examples are not easily detected", in the form for a norm ball; 3 is the selective attack of
    Bryniarski et al. 2021; 1 attacks all parts at once as He et al. 2017 do (all from memory). Departures: fixed
    weights for the search over the constant; projected ascent with the threat's steepest step for Adam in the space of
    tanh; the schedule of steps; in 1, logits with a smooth minimum in place of differences of probabilities.
    """

    steps: int = Field(default=50, ge=1)
    restarts: int = Field(default=1, ge=0)
    weights: tuple[float, ...] = Field(default=(0.0, 1.0, 10.0, 100.0), min_length=1)
    targets: int = Field(default=3, ge=0)

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
        Where `examine` tells no copies' logits, objective 1 is left out.
        """
        found = _Found.begin(x, y, threshold)
        everyone = torch.arange(len(x), device=x.device)
        for start in starts:
            with torch.no_grad():
                found.note(start, everyone, examine(start, everyone), by=-2)
        everywhere, last = torch.ones_like(found.wrong), len(self.weights)
        goals = [(last + 1, _common(place)) for place in range(self.targets)]
        goals += [(number, _weighed(weight, threshold)) for number, weight in enumerate(self.weights)]
        for number, goal in (*goals, (last, _selective(threshold))):
            points = list(zip(starts, _fresh(starts), strict=True))
            points += [(threat.random(x, rng), everywhere) for _ in range(self.restarts)]
            for start, fresh in points:
                left = everyone[fresh & ~found.evaded]
                self._climb(examine, goal, found, start[left], left, x, threat, number)
        return Evaded(found.wrong, found.evaded, found.x_adv, found.score, found.by)

    def _climb(
        self,
        examine: Examine,
        goal: _Goal,
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
                answers = examine(point, rows)
                objective = goal(answers, found.y[rows])
                if objective is None:
                    return
                slope = _slope(objective, point)
            left = ~found.note(point.detach(), rows, [answer.detach() for answer in answers], number)
            point, rows, slope = point.detach()[left], rows[left], slope[left]
            length = threat.eps * (0.02 + 0.99 * (1 + math.cos(math.pi * step / self.steps)))
            point = threat.project(threat.ascend(point, slope, length), x[rows])
        if len(rows):
            with torch.no_grad():
                found.note(point, rows, examine(point, rows), by=number)


def _fresh(starts: Sequence[Tensor]) -> list[Tensor]:
    """By start, bool [B]: whether no start before it is the same point, which would be climbed from twice."""
    found = []
    for number, start in enumerate(starts):
        seen = torch.zeros(len(start), dtype=torch.bool, device=start.device)
        for one in starts[:number]:
            seen |= (start == one).flatten(1).all(1)
        found.append(~seen)
    return found


def _common(place: int) -> _Goal:
    """Objective 1, for the class at this place among the wrong ones."""

    def goal(answers: Sequence[Tensor], y: Tensor) -> Tensor | None:
        if len(answers) < 3 or place >= answers[0].shape[1] - 1:
            return None
        all_z = torch.cat([answers[0].unsqueeze(0), answers[2]]).float()
        ranked = all_z.detach().mean(0).scatter(1, y.unsqueeze(1), float("-inf"))
        target = ranked.argsort(1, descending=True)[:, place]
        gaps = torch.stack([margin(z, target) for z in all_z])
        return -gaps.logsumexp(0)

    return goal


def _weighed(weight: float, threshold: float) -> _Goal:
    return lambda answers, y: margin(answers[0], y) - weight * (answers[1] - threshold).clamp(min=0).sum(0)


def _selective(threshold: float) -> _Goal:
    def goal(answers: Sequence[Tensor], y: Tensor) -> Tensor:
        right = answers[0].detach().argmax(1) == y
        return torch.where(right, margin(answers[0], y), -(answers[1] - threshold).clamp(min=0).sum(0))

    return goal


def _slope(objective: Tensor, point: Tensor) -> Tensor:
    """The gradient of the objective, summed over the examples so that none depends on another."""
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

    def note(self, point: Tensor, rows: Tensor, answers: Sequence[Tensor], by: int) -> Tensor:
        """Take in what was seen at `point` for `rows`; which of these are wrong and not flagged, bool [M]."""
        z, suspicions = answers[:2]
        score, wrong = suspicions.amax(0).to(self.score.dtype), z.argmax(1) != self.y[rows]
        slipped = wrong & (score <= self.threshold)
        better = wrong & (score < self.score[rows])
        self.x_adv[rows[better]], self.score[rows[better]] = point[better], score[better]
        self.by[rows[slipped & ~self.evaded[rows]]] = by
        self.wrong[rows[wrong]] = True
        self.evaded[rows[slipped]] = True
        return slipped
