"""MobileNetV2 for small images: inverted residuals, the usual edge baseline."""

from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor, nn

from stages.method import InputError
from stages.nn.builders import _check
from stages.nn.layers.normalize import normalize

# channels, blocks and stride of each stage at width 1; the first stage does not expand.
_STAGES = ((16, 1, 1), (24, 2, 1), (32, 3, 2), (64, 4, 2), (96, 3, 1), (160, 3, 2), (320, 1, 1))


class InvertedResidual(nn.Module):
    """1x1 to `expansion` times the channels, depthwise 3x3, linear 1x1 back; added to x where shapes agree."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        middle = inputs * expansion
        layers: dict[str, nn.Module] = {}
        if expansion != 1:
            layers |= {
                "conv1": nn.Conv2d(inputs, middle, 1, bias=False),
                "bn1": nn.BatchNorm2d(middle),
                "act1": nn.ReLU6(),
            }
        layers |= {
            "conv2": nn.Conv2d(middle, middle, 3, stride, 1, groups=middle, bias=False),
            "bn2": nn.BatchNorm2d(middle),
            "act2": nn.ReLU6(),
            "conv3": nn.Conv2d(middle, outputs, 1, bias=False),
            "bn3": nn.BatchNorm2d(outputs),
        }
        self.body = nn.Sequential(OrderedDict(layers))
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x)
        return x + y if self.residual else y


def build(
    input_shape: tuple[int, int, int],
    classes: int,
    mean: Sequence[float] = (0.0,),
    std: Sequence[float] = (1.0,),
    *,
    width: float = 1.0,
    expansion: int = 6,
    head: int = 1280,
) -> nn.Sequential:
    """`width` multiplies every channel count, rounded to multiples of 8; `head` is the last 1x1 convolution's size.

    Source: Sandler et al. 2018, table 2. Departures for images of 32 pixels, as the field has them: the stem and the
    second stage do not halve the image, so it shrinks by 8 in all; no dropout before the head.
    """
    channels, _, _ = _check.image(input_shape, classes, least=8)
    _check.positive(expansion=expansion, head=head)
    if isinstance(width, bool) or not isinstance(width, int | float) or not 0 < width <= 8:
        raise InputError(f"width: expected a factor within (0, 8], got {width!r}")
    inputs = _multiple_of_8(32 * width)
    layers: dict[str, nn.Module] = {
        "normalize": normalize(channels, mean, std),
        "conv": nn.Conv2d(channels, inputs, 3, 1, 1, bias=False),
        "bn": nn.BatchNorm2d(inputs),
        "act": nn.ReLU6(),
    }
    for stage, (size, blocks, stride) in enumerate(_STAGES):
        outputs = _multiple_of_8(size * width)
        body = []
        for block in range(blocks):
            body.append(InvertedResidual(inputs, outputs, 1 if block else stride, expansion if stage else 1))
            inputs = outputs
        layers[f"stage{stage + 1}"] = nn.Sequential(*body)
    layers |= {
        "last_conv": nn.Conv2d(inputs, head, 1, bias=False),
        "last_bn": nn.BatchNorm2d(head),
        "last_act": nn.ReLU6(),
        "pool": nn.AdaptiveAvgPool2d(1),
        "flatten": nn.Flatten(),
        "head": nn.Linear(head, classes),
    }
    net = nn.Sequential(OrderedDict(layers))
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out")
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, 0.0, 0.01)
            nn.init.zeros_(module.bias)
    return net


def _multiple_of_8(size: float) -> int:
    """Nearest multiple of 8, and never more than 10 % below `size` (the authors' rounding)."""
    nearest = max(8, int(size + 4) // 8 * 8)
    return nearest if nearest >= 0.9 * size else nearest + 8
