"""Trained convolutional and residual networks in the competition's graph forms; for `benchmarks.verify_spec`.

Sizes, strides and where normalisation stands are the competition's; the weights are ours: trained for minutes on one
core with FGSM from random starts (Wong, Rice and Kolter, "Fast is better than free", 2020) and an L1 penalty on
all weights, which keeps bounds from growing.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from benchmarks import spec_family
from benchmarks.spec_family import Array, Families, Family
from benchmarks.spec_nets import Graph
from stages.fitting.loop import Loss, fit
from stages.fitting.optim import Fit
from stages.seeding import derive
from stages.task import Splits

_IMAGES = 4
_TRAIN = 20_000
_SHIFTS = {"cifar10": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)), "mnist": ((0.1307,), (0.3081,))}


@dataclass(frozen=True, slots=True)
class Recipe:
    """An architecture, the data set, the eps it is trained with, those that it is asked about, and how it is trained.

    `form` is how its graph is written: "shifted" has Sub and Div of the channels' means and deviations in front, "nhwc"
    a Transpose, "plain" neither.
    """

    build: Callable[[], nn.Sequential]
    data: str
    eps: float
    radii: tuple[float, ...]
    form: str = "plain"
    l1: float = 1e-5
    epochs: int = 6


class Residual(nn.Module):
    """relu(conv(relu(conv(x))) + shortcut(x)), all 3x3 but the shortcut, which is 1x1 or nothing."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.way = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1), nn.ReLU(), nn.Conv2d(outputs, outputs, 3, 1, 1)
        )
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride) if stride > 1 or inputs != outputs else nn.Sequential()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.way(x) + self.shortcut(x))


def _convs(channels: int, *layers: tuple[int, int, int], side: int, hidden: int = 100) -> nn.Sequential:
    """Convolutions (outputs, kernel, stride), padded by 1, on images of `side`; a hidden layer and ten classes."""
    parts: list[nn.Module] = []
    for outputs, kernel, stride in layers:
        parts += [nn.Conv2d(channels, outputs, kernel, stride, 1), nn.ReLU()]
        channels, side = outputs, (side + 2 - kernel) // stride + 1
    dense = [nn.Linear(channels * side**2, hidden), nn.ReLU(), nn.Linear(hidden, 10)]
    return nn.Sequential(*parts, nn.Flatten(), *dense)


def _residual(channels: int, blocks: int, side: int) -> nn.Sequential:
    """One convolution to half the side, a block to a quarter, and blocks that stay there."""
    first = [nn.Conv2d(channels, 8, 3, 2, 1), nn.ReLU(), Residual(8, 16, 2)]
    dense = [nn.Linear(16 * (side // 4) ** 2, 100), nn.ReLU(), nn.Linear(100, 10)]
    return nn.Sequential(*first, *(Residual(16, 16, 1) for _ in range(blocks - 1)), nn.Flatten(), *dense)


def _pooled() -> nn.Sequential:
    first = [nn.Conv2d(3, 8, 3, 1, 1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 16, 3, 1, 1), nn.ReLU()]
    dense = [nn.Linear(1024, 100), nn.ReLU(), nn.Linear(100, 10)]
    return nn.Sequential(*first, nn.MaxPool2d(2), nn.Flatten(), *dense)


def _sigmoid() -> nn.Sequential:
    net = _convs(3, (16, 4, 2), (32, 4, 2), side=32)
    return nn.Sequential(*(nn.Sigmoid() if isinstance(part, nn.ReLU) else part for part in net))


RECIPES = {
    "oval21_base": Recipe(
        lambda: _convs(3, (8, 4, 2), (16, 4, 2), side=32), "cifar10", 4 / 255, (3 / 255, 6 / 255), epochs=10
    ),
    "oval21_wide": Recipe(lambda: _convs(3, (16, 4, 2), (32, 4, 2), side=32), "cifar10", 4 / 255, (3 / 255, 6 / 255)),
    "oval21_deep": Recipe(
        lambda: _convs(3, (8, 4, 2), (8, 3, 1), (8, 3, 1), (8, 4, 2), side=32), "cifar10", 4 / 255, (3 / 255, 6 / 255)
    ),
    "cifar2020_pool": Recipe(_pooled, "cifar10", 2 / 255, (1 / 255, 2 / 255), epochs=3),
    "cifar2020_sigmoid": Recipe(_sigmoid, "cifar10", 2 / 255, (1 / 255, 2 / 255)),
    "resnet_2b": Recipe(lambda: _residual(3, 2, 32), "cifar10", 2 / 255, (1 / 255, 2 / 255), "shifted"),
    "resnet_4b": Recipe(lambda: _residual(3, 4, 32), "cifar10", 2 / 255, (1 / 255, 2 / 255), "shifted"),
    "mnist_nhwc": Recipe(
        lambda: _convs(1, (8, 4, 2), (16, 4, 2), side=28), "mnist", 0.1, (0.05, 0.1), "nhwc", epochs=4
    ),
}


def net(name: str, splits: Splits) -> nn.Sequential:
    """The network, trained where it is not stored yet."""
    recipe = RECIPES[name]
    with torch.random.fork_rng():
        torch.manual_seed(derive(0, "spec", name))
        made = recipe.build()

    def train() -> dict[str, Array]:
        settings = {"epochs": recipe.epochs, "batch": 100, "optimiser": "adam", "lr": 2e-3, "weight_decay": 0.0}
        images, labels = splits.train.images[:_TRAIN], splits.train.labels[:_TRAIN]
        fit(made, images, labels, _fgsm(recipe), Fit.load({**settings, "precision": "fp32"}), 0)
        return {key: value.numpy() for key, value in made.state_dict().items()}

    stored = spec_family.kept(name, train)
    made.load_state_dict({key: torch.from_numpy(value) for key, value in stored.items()})
    return made.eval()


def _shift(recipe: Recipe) -> tuple[Tensor, Tensor]:
    mean, std = _SHIFTS[recipe.data] if recipe.form == "shifted" else ((0.0,), (1.0,))
    return torch.tensor(mean).view(1, -1, 1, 1), torch.tensor(std).view(1, -1, 1, 1)


def _fgsm(recipe: Recipe) -> Loss:
    mean, std = _shift(recipe)

    def loss(
        net: nn.Module, x: Tensor, y: Tensor, rng: Generator, progress: float
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        eps = recipe.eps * min(1.0, 2 * progress)
        start = (x + eps * (2 * torch.rand(x.shape, generator=rng) - 1)).requires_grad_()
        (slope,) = torch.autograd.grad(F.cross_entropy(net((start - mean) / std), y), start)
        moved = torch.minimum(torch.maximum(start.detach() + 1.25 * eps * slope.sign(), x - eps), x + eps).clamp(0, 1)
        logits = net((moved - mean) / std)
        hit = (logits.argmax(1) == y).float().mean()
        size = sum(value.abs().sum() for value in net.parameters())
        return F.cross_entropy(logits, y) + recipe.l1 * size, {"accuracy.fgsm": hit.detach()}

    return loss


def _family(name: str) -> Family:
    recipe = RECIPES[name]
    splits = spec_family.opened(recipe.data)
    made, (mean, std) = net(name, splits), _shift(recipe)

    def answers(images: Array) -> Array:
        with torch.no_grad():
            found: Array = made((torch.from_numpy(images) - mean) / std).numpy()
        return found

    shape = splits.test.images.shape[1:]
    g = Graph([1, *shape[1:], shape[0]] if recipe.form == "nhwc" else [1, *shape], 0)
    last = g("Transpose", "input", perm=[0, 3, 1, 2]) if recipe.form == "nhwc" else "input"
    if recipe.form == "shifted":
        last = g("Div", g("Sub", last, mean.numpy()), std.numpy())
    model = g.net(_written(g, made, last), np.zeros(shape), 1.0).model
    questions = [
        spec_family.robust(
            f"{name}_{place}_{eps:.4f}", image.transpose(1, 2, 0) if recipe.form == "nhwc" else image, label, 10, eps
        )
        for place, image, label in spec_family.right(splits, answers, _IMAGES)
        for eps in recipe.radii
    ]
    return Family(model, tuple(questions))


def _written(g: Graph, module: nn.Module, x: str) -> str:
    """The node that a module's result has when it reads x."""
    if isinstance(module, nn.Sequential):
        for part in module:
            x = _written(g, part, x)
        return x
    if isinstance(module, Residual):
        return str(g("Relu", g("Add", _written(g, module.way, x), _written(g, module.shortcut, x))))
    values: list[str | Array] = [x, *(value.detach().numpy() for value in module.parameters())]
    if isinstance(module, nn.Conv2d):
        pads = [int(pad) for pad in module.padding] * 2
        return str(g("Conv", *values, kernel_shape=module.kernel_size, strides=module.stride, pads=pads))
    if isinstance(module, nn.MaxPool2d):
        return str(g("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2]))
    if isinstance(module, nn.Linear):
        return str(g("Gemm", *values, transB=1))
    operator = {nn.ReLU: "Relu", nn.Sigmoid: "Sigmoid", nn.Flatten: "Flatten"}[type(module)]
    return str(g(operator, x))


FAMILIES: Families = {name: partial(_family, name) for name in RECIPES}
