"""Wide ResNet with depth and width per stage: robust networks want less of both near the output.

Three stages of pre-activation basic blocks at full, half and quarter resolution. A WRN-(6D + 4)-W has D blocks and
widening factor W in every stage; the presets give each stage its own.
"""

import math
from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor, nn

from stages.method import InputError
from stages.nn.builders import _check
from stages.nn.layers.normalize import normalize

_BASE = (16, 32, 64)
_STEM = 16

# name: (blocks per stage, widening factor per stage). "34-r" is RobustWRN; a1 to a4 are RobustScaling's sizes on basic
# blocks; s0 to s2 extrapolate its rule below 1 GMAC, where nobody has validated it.
PRESETS: dict[str, tuple[tuple[int, ...], tuple[float, ...]]] = {
    "28-10": ((4, 4, 4), (10, 10, 10)),
    "34-10": ((5, 5, 5), (10, 10, 10)),
    "34-12": ((5, 5, 5), (12, 12, 12)),
    "34-r": ((5, 5, 5), (20, 20, 8)),
    "a1": ((14, 14, 7), (5, 7, 3)),
    "a2": ((17, 17, 8), (7, 9, 4)),
    "a3": ((22, 22, 11), (8, 11, 5)),
    "a4": ((27, 28, 13), (10, 14, 6)),
    "s0": ((5, 5, 3), (2, 2.5, 1)),
    "s1": ((8, 8, 4), (3, 3.75, 1.5)),
    "s2": ((10, 10, 5), (4, 5, 2)),
}


class Block(nn.Module):
    """a = act(BN(x)); y = conv3x3(act(BN(conv3x3(a, stride)))); out = y + x, or y + conv1x1(a, stride).

    The second form where shapes differ: there both paths take the activated input.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, act: type[nn.Module]) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.act1 = act()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.act2 = act()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        differ = inputs != outputs or stride != 1
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if differ else None

    def forward(self, x: Tensor) -> Tensor:
        a = self.act1(self.bn1(x))
        y: Tensor = self.conv2(self.act2(self.bn2(self.conv1(a))))
        if self.shortcut is None:
            return y + x
        out: Tensor = y + self.shortcut(a)
        return out


def build(
    input_shape: tuple[int, int, int],
    classes: int,
    mean: Sequence[float] = (0.0,),
    std: Sequence[float] = (1.0,),
    *,
    depths: Sequence[int] = (1, 1, 1),
    widths: Sequence[float] = (1, 1, 1),
    preset: str | None = None,
    activation: str = "relu",
) -> nn.Sequential:
    """Stage i has depths[i] blocks of (16, 32, 64)[i] * widths[i] channels; the defaults are WRN-10-1.

    `preset` names both in place of `depths` and `widths`. Weights start at N(0, 2 / (k^2 c_out)), the last bias at 0.
    Sources: Zagoruyko and Komodakis 2016; Huang et al. 2021 (RobustWRN); Huang et al. 2023 (RobustScaling: widths
    2 : 2.5 : 1, depths 2 : 2 : 1). Departure: a stage whose width equals the one before it but whose image is halved
    gets a 1x1 shortcut too, where the reference code would fail.
    """
    channels, _, _ = _check.image(input_shape, classes, least=4)
    act = _check.activation(activation)
    if preset is not None:
        if preset not in PRESETS:
            raise InputError(f'preset: expected one of {", ".join(PRESETS)}, got "{preset}"')
        if tuple(depths) != (1, 1, 1) or tuple(widths) != (1, 1, 1):
            raise InputError(f'preset "{preset}" sets depths and widths; expected neither beside it')
        depths, widths = PRESETS[preset]
    layers: dict[str, nn.Module] = {
        "normalize": normalize(channels, mean, std),
        "conv": nn.Conv2d(channels, _STEM, 3, 1, 1, bias=False),
    }
    inputs = _STEM
    sizes = zip(_check.whole("depths", depths, 3), _check.numbers("widths", widths, 3), _BASE, strict=True)
    for stage, (depth, factor, base) in enumerate(sizes):
        outputs = max(1, round(base * factor))
        body = []
        for block in range(depth):
            body.append(Block(inputs, outputs, 2 if stage and not block else 1, act))
            inputs = outputs
        layers[f"stage{stage + 1}"] = nn.Sequential(*body)
    layers |= {
        "bn": nn.BatchNorm2d(inputs),
        "act": act(),
        "pool": nn.AdaptiveAvgPool2d(1),
        "flatten": nn.Flatten(),
        "head": nn.Linear(inputs, classes),
    }
    net = nn.Sequential(OrderedDict(layers))
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, 0.0, math.sqrt(2 / (module.weight[0, 0].numel() * module.out_channels)))
        elif isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
    return net
