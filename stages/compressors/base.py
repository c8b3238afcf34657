"""The contract of a compressor. What it needs from data, recipes and attacks arrives as closures."""

from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated

from torch import Generator, Tensor, nn

from stages.method import Method, polymorphic
from stages.nn.arch import Model

FOLDER = "stages.compressors"


@dataclass(frozen=True, slots=True)
class Bench:
    """What a compressor may use, made by `stages/compress.py`.

    `tune(model)` fine-tunes under the training recipe. `adversarial(net)` yields a fixed number of batches (x, x_adv,
    y) from the training split, x_adv found on `net` within the threat. `note(text)` tells the user.
    """

    tune: Callable[[Model], Model]
    adversarial: Callable[[nn.Module], Iterator[tuple[Tensor, Tensor, Tensor]]]
    note: Callable[[str], None]


class Compressor(Method):
    @abstractmethod
    def compress(self, model: Model, bench: Bench, rng: Generator) -> Model:
        """A model whose arch holds every change as a rewrite, so that it rebuilds from arch.json alone."""


AnyCompressor = Annotated[Compressor, *polymorphic(FOLDER, Compressor)]
