"""The contract of a training recipe: one abstract loss; the loop, the optimiser and the data live elsewhere."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Annotated

from torch import Generator, Tensor, nn

from stages.method import Method, polymorphic
from stages.threat import Threat

FOLDER = "stages.recipes"


class Recipe(Method):
    """One way to train robustly. Attacks inside a recipe see the network in eval mode, so they move no statistics."""

    def curate(self, x: Tensor, y: Tensor, threat: Threat, rng: Generator) -> tuple[Tensor, Tensor]:
        """Change the training set once, before the first epoch (distil it, say); float images in [0, 1]."""
        del threat, rng
        return x, y

    def wrap(self, net: nn.Module) -> nn.Module:
        """Replace the network by what is really trained (an ensemble, say)."""
        return net

    @abstractmethod
    def loss(
        self, net: nn.Module, x: Tensor, y: Tensor, threat: Threat, rng: Generator, progress: float
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Scalar loss of one batch, and named scalars worth logging.

        `progress` runs from 0 to 1 over the whole training. x is float [B, C, H, W] in [0, 1]; net is in train mode
        on entry and must be on exit.
        """

    def monitor(self, net: nn.Module, x: Tensor, y: Tensor, threat: Threat, rng: Generator) -> Mapping[str, float]:
        """Numbers that tell whether the recipe still works, on a few training images, between epochs; net in eval mode.

        A share named "accuracy.*" that falls by more than 0.2 is pointed out to the user.
        """
        del net, x, y, threat, rng
        return {}


AnyRecipe = Annotated[Recipe, *polymorphic(FOLDER, Recipe)]
