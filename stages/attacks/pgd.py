"""Projected gradient descent."""

from typing import Literal

import torch
from pydantic import Field
from torch import Generator, Tensor

from stages.attacks._losses import gradient
from stages.attacks.base import Attack
from stages.oracle import Logits, narrow
from stages.threat import Threat


class PGD(Attack):
    """Steepest ascent of a loss, projected onto the threat after every step, from several random starts.

        x_0 uniform in the ball;  x_{t+1} = project(x_t + step * steepest direction of loss(x_t))

    `step` is a share of eps; left out it is 2.5 / steps, so that any point of the ball can be reached and left again.
    The steepest direction is the sign for linf, the gradient divided by its norm for l2, and the one coordinate that
    gains most for l1 (slow for large l1 balls). An example leaves the batch at the first wrong answer. Random starts
    are drawn for the whole batch every time, so that an example's path does not depend on which others are left, and
    more restarts never break fewer. `start = "zero"` begins the first try at x itself, the others at random.

    Source: Madry et al. 2018, section 2.1; restarts as in their released evaluation. Departures: broken examples stop;
    the default step is theirs for 100 steps (2.5 eps / 100), carried over to other numbers of steps.
    """

    steps: int = Field(default=20, ge=1)
    restarts: int = Field(default=1, ge=1)
    step: float | None = Field(default=None, gt=0)
    loss: Literal["ce", "margin"] = "ce"
    start: Literal["uniform", "zero"] = "uniform"

    def perturb(self, logits: Logits, x: Tensor, y: Tensor, threat: Threat, rng: Generator) -> Tensor:
        length = threat.eps * (self.step if self.step is not None else 2.5 / self.steps)
        result = x.clone()
        alive = torch.arange(len(x), device=x.device)
        for number in range(self.restarts):
            start = threat.random(x, rng) if number or self.start == "uniform" else x
            alive = self._climb(logits, x, y, threat, length, start[alive], alive, result)
            if len(alive) == 0:
                break
        return result

    def _climb(
        self,
        logits: Logits,
        x: Tensor,
        y: Tensor,
        threat: Threat,
        length: float,
        point: Tensor,
        alive: Tensor,
        result: Tensor,
    ) -> Tensor:
        """One restart for the examples `alive` [M], from `point` [M, ...]; writes `result`, returns who is left."""
        for _ in range(self.steps):
            z, _, slope = gradient(narrow(logits, alive), point, y[alive], self.loss)
            right = z.argmax(1) == y[alive]
            result[alive[~right]] = point[~right]
            alive, point, slope = alive[right], point[right], slope[right]
            if len(alive) == 0:
                return alive
            point = threat.project(threat.ascend(point, slope, length), x[alive])
        with torch.no_grad():
            right = narrow(logits, alive)(point).argmax(1) == y[alive]
        result[alive] = point
        return alive[right]
