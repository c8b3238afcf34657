"""The momentum iterative fast gradient sign method."""

import torch
from pydantic import Field
from torch import Generator, Tensor

from stages.attacks._losses import Loss, gradient
from stages.attacks.base import Attack
from stages.oracle import Logits, narrow
from stages.threat import Threat

_TINY = 1e-12


class MIFGSM(Attack):
    """Steepest ascent along gradients that add up, each first divided by its l1 norm; from x, without a random start.

        g_{t+1} = decay g_t + grad loss(x_t) / ||grad loss(x_t)||_1
        x_{t+1} = project(x_t + step * steepest direction of g_{t+1})

    `step` is a share of eps; left out it is 1 / steps, which just reaches the surface. The momentum carries the climb
    over narrow peaks of the loss, which is why its examples fool other networks more often than those of PGD; on the
    network itself it is the weaker of the two. An example leaves at its first wrong answer.

    Source: Dong et al. 2018, "Boosting adversarial attacks with momentum", algorithm 1, equations 6 and 7 (linf) and 9
    (l2). Departures: broken examples stop; l1 takes the steepest step of that norm, which the paper does not treat.
    """

    steps: int = Field(default=10, ge=1)
    decay: float = Field(default=1.0, ge=0)
    step: float | None = Field(default=None, gt=0)
    loss: Loss = "ce"

    def perturb(self, logits: Logits, x: Tensor, y: Tensor, threat: Threat, rng: Generator) -> Tensor:
        del rng
        length = threat.eps * (self.step if self.step is not None else 1 / self.steps)
        result, alive = x.clone(), torch.arange(len(x), device=x.device)
        point, pull = x, torch.zeros_like(x)
        for _ in range(self.steps):
            z, _, slope = gradient(narrow(logits, alive), point, y[alive], self.loss)
            right = z.argmax(1) == y[alive]
            result[alive[~right]] = point[~right]
            alive, point, pull, slope = alive[right], point[right], pull[right], slope[right]
            if len(alive) == 0:
                return result
            size = slope.flatten(1).abs().sum(1).clamp(min=_TINY)
            pull = self.decay * pull + slope / size.view((-1,) + (1,) * (x.dim() - 1))
            point = threat.project(threat.ascend(point, pull, length), x[alive])
        result[alive] = point
        return result
