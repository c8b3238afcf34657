"""The fast gradient sign method."""

from torch import Generator, Tensor

from stages.attacks._losses import Loss, gradient
from stages.attacks.base import Attack
from stages.oracle import Logits
from stages.threat import Threat


class FGSM(Attack):
    """One steepest step of length eps from x: x' = project(x + eps * steepest direction of loss(x)).

    Exact on linear networks away from the edges of the data range. As evidence it is weak; where it breaks more than
    many steps do, gradients are masked, and the validity checks use it for that.

    Source: Goodfellow, Shlens and Szegedy 2015, section 4. Departure: any norm, with the steepest step of that norm.
    """

    loss: Loss = "ce"

    def perturb(self, logits: Logits, x: Tensor, y: Tensor, threat: Threat, rng: Generator) -> Tensor:
        del rng
        _, _, slope = gradient(logits, x, y, self.loss)
        return threat.project(threat.ascend(x, slope, threat.eps), x)
