"""Dense networks like the competition's, trained: on MNIST with ReLUs, sigmoids and tanhs, and on encounters."""

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import spec_family, spec_nets
from benchmarks.spec_family import Array, Families, Family, Question
from stages.data.base import to_float

_ACTS = {"Relu": nn.ReLU, "Sigmoid": nn.Sigmoid, "Tanh": nn.Tanh}
_IMAGES = 4
_TORCH = 0.41  # of Kaiming's weights, as torch's own layers begin
_DRAWN = 200_000
_RARE = 0.01  # of the drawn points
_BOXES = (  # of encounters, low and high ends; the first two are like the competition's properties 1 and 3
    ([0.1, -0.5, -0.5, 0.45, -0.5], [0.5, 0.5, 0.5, 0.5, -0.45]),
    ([-0.30, -0.01, 0.493, 0.3, 0.3], [-0.2985, 0.01, 0.5, 0.5, 0.5]),
    ([-0.324, 0.032, -0.5, -0.5, -0.5], [-0.322, 0.064, -0.499, -0.227, -0.167]),
    ([-0.328, -0.5, -0.5, -0.5, -0.5], [0.5, 0.5, 0.5, 0.5, 0.5]),
    ([-0.30, -0.064, 0.4, 0.2, 0.2], [-0.25, 0.064, 0.45, 0.5, 0.5]),
)
Layers = list[tuple[Array, Array]]


def _mnist(name: str, sizes: list[int], act: str, steps: int, radii: tuple[float, float], begun: float = 1.0) -> Family:
    splits = spec_family.opened("mnist")
    x, y = to_float(splits.train.images).flatten(1), splits.train.labels

    def draw(rng: torch.Generator) -> tuple[Tensor, Tensor]:
        picked = torch.randint(len(x), (128,), generator=rng)
        return x[picked], y[picked]

    widths = [784, *sizes, 10]
    layers = _layers(name, lambda: spec_nets.trained(widths, _ACTS[act], draw, 0, steps, settles=True, begun=begun))
    graph = spec_nets.Graph([1, 784, 1], 0, 13)
    graph_out = graph.stored(graph("Flatten", "input", axis=1), layers, act)
    images = spec_family.right(splits, lambda images: _answers(layers, act, images.reshape(len(images), -1)), _IMAGES)
    questions = [
        spec_family.robust(f"{name}_{place}_{eps}", image, label, 10, eps)
        for place, image, label in images
        for eps in radii
    ]
    return Family(graph.net(graph_out, np.zeros(784), 1.0).model, tuple(questions))


def _encounters(name: str, seed: int) -> Family:
    """Is a cost ever a little beyond what was drawn, or like the twentieth highest; is a rare turn ever the best?"""
    sizes = [5, *[50] * 6, 5]
    layers = _layers(name, lambda: spec_nets.trained(sizes, nn.ReLU, spec_nets.encounter, seed, 6000, settles=True))
    graph = spec_nets.Graph([1, 1, 1, 5], seed, 8, listed=True)
    x = graph("Flatten", graph("Sub", "input", np.zeros((1, 1, 1, 5))), axis=1)
    net = graph.net(graph.stored(x, layers, "Relu"), np.zeros(5), 0.5)
    rng, questions = np.random.default_rng(seed), list[Question]()
    for i, ends in enumerate(_BOXES):
        low, high = (np.array(end, np.float32) for end in ends)
        costs = _answers(layers, "Relu", low + rng.random((_DRAWN, 5)) * (high - low))
        first = np.sort(costs[:, 0])
        asked = {f"over{part}": first[-1] + part * (first[-1] - first[0]) for part in (0.03, 0.15)}
        for kind, least in {**asked, "reached": first[-20]}.items():
            row = np.array([[-1.0, 0, 0, 0, 0]])
            questions.append(Question(f"{name}_{i}_{kind}", low, high, row, np.array([-float(least)])))
        best = np.bincount(costs.argmin(1), minlength=5)
        for turn in np.flatnonzero(best < _RARE * _DRAWN).tolist():
            rows = -np.delete(np.eye(5), turn, 0)
            rows[:, turn] = 1.0
            questions.append(Question(f"{name}_{i}_least{turn}", low, high, rows, np.zeros(4), every=True))
    return Family(net.model, tuple(questions))


def _layers(name: str, train: Callable[[], Layers]) -> Layers:
    def arrays() -> dict[str, Array]:
        return {f"{kind}{i}": part for i, pair in enumerate(train()) for kind, part in zip("wb", pair, strict=True)}

    found = spec_family.kept(name, arrays)
    return [(found[f"w{i}"], found[f"b{i}"]) for i in range(len(found) // 2)]


def _answers(layers: Layers, act: str, x: Array) -> Array:
    """[B, n] -> [B, K], in torch."""
    with torch.no_grad():
        y = torch.from_numpy(np.asarray(x, np.float32))
        for i, (weight, bias) in enumerate(layers):
            y = torch.from_numpy(bias) + (y if i == 0 else _ACTS[act]()(y)) @ torch.from_numpy(weight)
    return y.numpy()


FAMILIES: Families = {
    "mnist_relu2": partial(_mnist, "mnist_relu2", [256] * 2, "Relu", 1400, (0.03, 0.05)),
    "mnist_relu4": partial(_mnist, "mnist_relu4", [256] * 4, "Relu", 1400, (0.03, 0.05)),
    "mnist_relu6": partial(_mnist, "mnist_relu6", [256] * 6, "Relu", 1400, (0.03, 0.05)),
    "mnist_fc2": partial(_mnist, "mnist_fc2", [256] * 2, "Relu", 1400, (0.03, 0.05), _TORCH),
    "mnist_fc4": partial(_mnist, "mnist_fc4", [256] * 4, "Relu", 1400, (0.03, 0.05), _TORCH),
    "mnist_sigmoid6": partial(_mnist, "mnist_sigmoid6", [200] * 6, "Sigmoid", 2500, (0.015, 0.03)),
    "mnist_tanh4": partial(_mnist, "mnist_tanh4", [200] * 4, "Tanh", 1400, (0.015, 0.03)),
    "encounters": partial(_encounters, "encounters", 0),
}
