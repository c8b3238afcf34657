"""A four-layer network of two strided convolutions and two linear layers; small enough to certify and to test with."""

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
    width: int = 32,
    hidden: int = 128,
) -> nn.Sequential:
    """conv 4x4/2 (width) - conv 4x4/2 (2 width) - linear (hidden) - linear (classes), ReLU between.

    No batch normalisation, so interval bounds stay tight. Sides from 4 pixels up; odd sides round down.
    Source: the small network of Wong and Kolter 2018 (width 16, hidden 100), here wider by default so that pruning
    in multiples of 16 has something to take.
    """
    channels, height, breadth = _check.image(input_shape, classes, least=4)
    _check.positive(width=width, hidden=hidden)
    features = 2 * width * (height // 2 // 2) * (breadth // 2 // 2)
    layers: dict[str, nn.Module] = {
        "normalize": normalize(channels, mean, std),
        "conv1": nn.Conv2d(channels, width, 4, stride=2, padding=1),
        "relu1": nn.ReLU(),
        "conv2": nn.Conv2d(width, 2 * width, 4, stride=2, padding=1),
        "relu2": nn.ReLU(),
        "flatten": nn.Flatten(),
        "fc1": nn.Linear(features, hidden),
        "relu3": nn.ReLU(),
        "fc2": nn.Linear(hidden, classes),
    }
    return nn.Sequential(OrderedDict(layers))
