"""ResNet for small images: a 3x3 stem without pooling, then stages of basic blocks."""

from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor, nn

from stages.nn.builders import _check
from stages.nn.layers.normalize import normalize


class BasicBlock(nn.Module):
    """out = act(BN(conv3x3(act(BN(conv3x3(x, stride))))) + shortcut(x)); a 1x1 convolution where shapes differ."""

    def __init__(self, inputs: int, outputs: int, stride: int, act: type[nn.Module]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.act1 = act()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                OrderedDict(conv=nn.Conv2d(inputs, outputs, 1, stride, bias=False), bn=nn.BatchNorm2d(outputs))
            )
        self.act2 = act()

    def forward(self, x: Tensor) -> Tensor:
        y = self.act1(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        out: Tensor = self.act2(y + self.shortcut(x))
        return out


def build(
    input_shape: tuple[int, int, int],
    classes: int,
    mean: Sequence[float] = (0.0,),
    std: Sequence[float] = (1.0,),
    *,
    width: int = 64,
    blocks: Sequence[int] = (2, 2, 2, 2),
    activation: str = "relu",
) -> nn.Sequential:
    """Stage i has blocks[i] blocks of width * 2^i channels and halves the image, but for the first.

    The defaults are ResNet-18. Source: He et al. 2016, with the stem that the field uses for 32x32 images (3x3, stride
    1, no pooling) and 1x1 shortcuts in place of zero padding.
    """
    channels, _, _ = _check.image(input_shape, classes, least=4)
    _check.positive(width=width)
    act = _check.activation(activation)
    layers: dict[str, nn.Module] = {
        "normalize": normalize(channels, mean, std),
        "conv": nn.Conv2d(channels, width, 3, 1, 1, bias=False),
        "bn": nn.BatchNorm2d(width),
        "act": act(),
    }
    inputs = width
    for stage, count in enumerate(_check.whole("blocks", blocks)):
        outputs = width * 2**stage
        body = []
        for block in range(count):
            body.append(BasicBlock(inputs, outputs, 2 if stage and not block else 1, act))
            inputs = outputs
        layers[f"stage{stage + 1}"] = nn.Sequential(*body)
    layers |= {"pool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten(), "head": nn.Linear(inputs, classes)}
    net = nn.Sequential(OrderedDict(layers))
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return net
