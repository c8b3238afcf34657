"""No compression: the network and its weights pass through."""

from torch import Generator

from stages.compressors.base import Bench, Compressor
from stages.nn.arch import Model


class Fixed(Compressor):
    """The model as it is; nothing is tuned."""

    def compress(self, model: Model, bench: Bench, rng: Generator) -> Model:
        del bench, rng
        return model
