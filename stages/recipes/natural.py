"""Plain training; the control."""

from collections.abc import Mapping

from torch import Generator, Tensor, nn
from torch.nn import functional as F

from stages.recipes.base import Recipe
from stages.threat import Threat


class Natural(Recipe):
    """L = CE(f(x), y); the threat is not looked at."""

    def loss(
        self, net: nn.Module, x: Tensor, y: Tensor, threat: Threat, rng: Generator, progress: float
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        del threat, rng, progress
        return F.cross_entropy(net(x), y), {}
