"""Single-step adversarial training that does not collapse."""

from collections.abc import Mapping

from pydantic import Field
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from stages.evaluate import correct, frozen
from stages.recipes import _inner
from stages.recipes.base import Recipe
from stages.threat import Threat


class NoisyFGSM(Recipe):
    """L = CE(f(x'), y) with one gradient per batch, taken at a noisy point:

        eta ~ U(-noise eps, noise eps), cut with the pixel range;  x' = x + eta + alpha eps sign grad CE(f(x + eta), y)

    cut with the pixel range but *not* projected onto the eps ball: training examples reach up to (noise + alpha) eps.
    For l2 and l1 the noise is uniform in that norm's ball and the step goes along its steepest direction (our
    extension). `ramp` lets eps grow linearly from 0 over that share of the training. `monitor` logs the accuracy under
    PGD-10: catastrophic overfitting shows as this number falling to 0 while the training accuracy rises.
    Source: de Jorge et al. 2022, algorithm 1 (N-FGSM; noise 2, alpha 1). Departure: the gradient is taken in eval
    mode, the original takes it in train mode.
    """

    noise: float = Field(default=2.0, ge=0)
    alpha: float = Field(default=1.0, gt=0)
    ramp: float = Field(default=0.0, ge=0, le=1)

    def loss(
        self, net: nn.Module, x: Tensor, y: Tensor, threat: Threat, rng: Generator, progress: float
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        threat = _inner.ramped(threat, progress, self.ramp)
        noisy = threat.model_copy(update={"eps": self.noise * threat.eps}).random(x, rng)
        with frozen(net):
            grad = _inner.slope(_inner.cross_entropy(net, y), noisy)
        x_adv = threat.ascend(noisy, grad, self.alpha * threat.eps).clamp(threat.low, threat.high)
        logits = net(x_adv)
        return F.cross_entropy(logits, y), {"accuracy.train": _inner.hits(logits, y)}

    def monitor(self, net: nn.Module, x: Tensor, y: Tensor, threat: Threat, rng: Generator) -> Mapping[str, float]:
        return {"accuracy.pgd": float(correct(net, _inner.pgd(net, x, y, threat, rng), y).float().mean())}
