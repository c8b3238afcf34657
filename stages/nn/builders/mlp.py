"""Multi-layer perceptron on flattened pixels."""

from collections import OrderedDict
from collections.abc import Sequence

from torch import nn

from stages.nn.builders import _check
from stages.nn.layers.normalize import normalize


def build(
    input_shape: tuple[int, int, int],
    classes: int,
    mean: Sequence[float] = (0.0,),
    std: Sequence[float] = (1.0,),
    *,
    hidden: Sequence[int] = (256, 128),
) -> nn.Sequential:
    """Linear layers of the widths `hidden`, ReLU after each, then a linear layer to the classes."""
    channels, height, width = _check.image(input_shape, classes, least=1)
    layers: dict[str, nn.Module] = {"normalize": normalize(channels, mean, std), "flatten": nn.Flatten()}
    features = channels * height * width
    for number, size in enumerate(_check.whole("hidden", hidden), 1):
        layers[f"fc{number}"] = nn.Linear(features, size)
        layers[f"relu{number}"] = nn.ReLU()
        features = size
    layers["head"] = nn.Linear(features, classes)
    return nn.Sequential(OrderedDict(layers))
