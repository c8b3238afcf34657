"""Weights that are given: your own model, kept as it is."""

from collections.abc import Mapping
from typing import Annotated

from pydantic import Field
from torch import Generator, Tensor, nn

from stages.recipes.base import AnyRecipe, Recipe
from stages.recipes.trades import Trades
from stages.threat import Threat


class Fixed(Recipe):
    """No training: `stages/train.py` takes the weights from `weights`, a safetensors file below the data root.

    `sha256` is that file's digest: it pins what was trained elsewhere, and makes it part of the cache key. Where a
    later stage fine-tunes (after compression, say), it does so under `retune`, whose loss this recipe passes on.
    """

    weights: str = ""
    sha256: Annotated[str, Field(pattern=r"^([0-9a-f]{64})?$")] = ""
    retune: AnyRecipe = Trades()

    def loss(
        self, net: nn.Module, x: Tensor, y: Tensor, threat: Threat, rng: Generator, progress: float
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        return self.retune.loss(net, x, y, threat, rng, progress)

    def monitor(self, net: nn.Module, x: Tensor, y: Tensor, threat: Threat, rng: Generator) -> Mapping[str, float]:
        return self.retune.monitor(net, x, y, threat, rng)
