"""Networks in the graph forms of the verification competition, small, seeded, made here; for `benchmarks.verify_spec`.

What is taken from the competition is how its graphs are written: operators, ranks, opsets, where normalisation stands,
what is a constant node and what an initialiser. Weights are random, or trained for seconds where the name says so.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnx import ModelProto, TensorProto, helper, numpy_helper
from torch import nn
from torch.nn import functional as F

from stages.seeding import generator

Array = npt.NDArray[Any]
_IR = {7: 3, 8: 3, 9: 4, 11: 6, 12: 7, 13: 8}


@dataclass(frozen=True, slots=True)
class Net:
    """A graph, and the boxes [n] that it is asked about: centres and half widths in the units of its input."""

    model: ModelProto
    centre: Array
    radius: Array


class Graph:
    """A graph that grows node by node; `listed` names the initialisers among the inputs, as old exporters did."""

    def __init__(self, shape: Sequence[int | str], seed: int, opset: int = 13, listed: bool = False) -> None:
        self.rng = np.random.default_rng([seed, *name_of(shape)])
        self.shape, self.opset, self.listed = list(shape), opset, listed
        self.nodes: list[Any] = []
        self.arrays: dict[str, Array] = {}

    def __call__(self, operator: str, *inputs: str | Array | float, outputs: int = 1, **attributes: Any) -> Any:
        """The name of the result, or the names where there are several."""
        names = [value if isinstance(value, str) else self.constant(value) for value in inputs]
        made = [f"v{len(self.nodes)}_{k}" for k in range(outputs)]
        self.nodes.append(helper.make_node(operator, names, made, f"{operator}_{len(self.nodes)}", **attributes))
        return made[0] if outputs == 1 else made

    def constant(self, value: Array | float) -> str:
        name = f"k{len(self.arrays)}"
        array = np.asarray(value)
        self.arrays[name] = array.astype(np.float32) if array.dtype == np.float64 else array
        return name

    def weight(self, *shape: int, fan: int) -> Array:
        return self.rng.normal(0, np.sqrt(2 / fan), shape)

    def dense(self, x: str, inputs: int, outputs: int, gemm: bool = False) -> str:
        weight, bias = self.weight(inputs, outputs, fan=inputs), self.rng.normal(0, 0.1, outputs)
        if gemm:
            return str(self("Gemm", x, weight.T.copy(), bias, transB=1))
        return str(self("Add", self("MatMul", x, weight), bias))

    def chain(self, x: str, sizes: Sequence[int], act: str = "Relu", gemm: bool = False, **attributes: Any) -> str:
        for i, (a, b) in enumerate(pairwise(sizes)):
            x = self.dense(x, a, b, gemm)
            x = x if i == len(sizes) - 2 else self(act, x, **attributes)
        return x

    def conv(self, x: str, inputs: int, outputs: int, k: int = 3, stride: int = 1, **attributes: Any) -> str:
        attributes = {"kernel_shape": [k, k], "strides": [stride, stride], "pads": [k // 2] * 4, **attributes}
        weight = self.weight(outputs, inputs, k, k, fan=inputs * k * k)
        return str(self("Conv", x, weight, self.rng.normal(0, 0.1, outputs), **attributes))

    def norm(self, x: str, channels: int) -> str:
        stats = [self.rng.uniform(0.5, 1.5, channels), self.rng.normal(0, 0.2, channels)]
        stats += [self.rng.normal(0, 0.2, channels), self.rng.uniform(0.5, 1.5, channels)]
        return str(self("BatchNormalization", x, *stats, epsilon=1e-5))

    def stored(self, x: str, layers: Sequence[tuple[Array, Array]], act: str) -> str:
        """MatMul, Add and activation with the weights [in, out] and biases of a trained network."""
        for i, (weight, bias) in enumerate(layers):
            x = self("Add", self("MatMul", x, weight), bias)
            x = x if i == len(layers) - 1 else self(act, x)
        return x

    def net(self, output: str, centre: Array, radius: Array | float) -> Net:
        kinds = {np.dtype(np.float32): TensorProto.FLOAT, np.dtype(np.int64): TensorProto.INT64}
        inputs = [helper.make_tensor_value_info("input", TensorProto.FLOAT, self.shape)]
        if self.listed:
            inputs += [helper.make_tensor_value_info(n, kinds[a.dtype], a.shape) for n, a in self.arrays.items()]
        stored = [numpy_helper.from_array(array, name) for name, array in self.arrays.items()]
        last = helper.make_tensor_value_info(output, TensorProto.FLOAT, None)
        graph = helper.make_graph(self.nodes, "net", inputs, [last], stored)
        opsets = [helper.make_opsetid("", self.opset)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=_IR[self.opset])
        model.graph.output[0].CopyFrom(onnx.shape_inference.infer_shapes(model, strict_mode=True).graph.output[0])
        flat = np.asarray(centre, np.float32).reshape(-1)
        widths = np.asarray(radius, np.float32)
        return Net(model, flat, widths.reshape(-1) if widths.size == flat.size else np.full(flat.shape, widths))


def name_of(shape: Sequence[int | str]) -> list[int]:
    return [size if isinstance(size, int) else 1 for size in shape]


def acas_xu(seed: int) -> Net:
    """[1,1,1,5], Sub of the mean, Flatten, six times MatMul, Add, Relu; trained on costs of a made-up encounter."""
    g = Graph([1, 1, 1, 5], seed, 8, listed=True)
    x = g("Flatten", g("Sub", "input", np.zeros((1, 1, 1, 5))), axis=1)
    layers = trained([5, *[50] * 6, 5], nn.ReLU, encounter, seed, 1500)
    return g.net(g.stored(x, layers, "Relu"), np.zeros(5), 0.15)


def mnist_fc(seed: int, images: Callable[..., Any]) -> Net:
    """[784,1]: the weight stands on the left of its column."""
    g, (image, draw) = Graph([784, 1], seed, 12), images(seed)
    x = "input"
    layers = trained([784, 256, 256, 10], nn.ReLU, draw, seed, 400)
    for i, (weight, bias) in enumerate(layers):
        x = g("Add", g("MatMul", weight.T.copy(), x), bias[:, None])
        x = x if i == len(layers) - 1 else g("Relu", x)
    return g.net(x, image, 0.03)


def eran_sigmoid(seed: int, images: Callable[..., Any]) -> Net:
    """[1,1,28,28], Sub and Div of constant nodes, Reshape, sigmoids."""
    g, (image, draw) = Graph(["batch", 1, 28, 28], seed, 9), images(seed)
    mean, std = (numpy_helper.from_array(np.full((1, 1, 1, 1), v, np.float32)) for v in (0.1307, 0.3081))
    x = g("Div", g("Sub", "input", g("Constant", value=mean)), g("Constant", value=std))
    layers = trained([784, 100, 100, 100, 10], nn.Sigmoid, lambda rng: _shifted(draw(rng)), seed, 600)
    return g.net(g.stored(g("Reshape", x, np.array([-1, 784])), layers, "Sigmoid"), image, 0.02)


def trained(
    sizes: Sequence[int],
    act: type[nn.Module],
    draw: Any,
    seed: int,
    steps: int,
    settles: bool = False,
    begun: float = 1.0,
) -> list[tuple[Array, Array]]:
    """Weights [in, out] and biases after some steps of Adam on `draw(rng)` -> inputs, labels or values.

    With `settles` the steps' size falls to nothing, and the network is as good as it gets in so many. Weights begin as
    Kaiming's times `begun`; torch's own layers begin at 0.41, and their bounds are a good deal closer.
    """
    rng = generator(seed, "spec nets")
    layers = [nn.Linear(a, b) for a, b in pairwise(sizes)]
    for layer in layers:
        nn.init.kaiming_normal_(layer.weight, generator=rng)
        layer.weight.data.mul_(begun)
        nn.init.zeros_(layer.bias)
    net = nn.Sequential(*(part for layer in layers for part in (layer, act())))[:-1]
    optimiser = torch.optim.Adam(net.parameters(), 2e-3)
    for step in range(steps):
        x, y = draw(rng)
        for group in optimiser.param_groups if settles else ():
            group["lr"] = 2e-3 * (1 - step / steps)
        loss = F.cross_entropy(net(x), y) if y.dim() == 1 else F.mse_loss(net(x), y)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return [(layer.weight.detach().numpy().T.copy(), layer.bias.detach().numpy()) for layer in layers]


def encounter(rng: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Five costs of an encounter of two aircraft: one for each turn that the own one may take."""
    x = torch.rand(256, 5, generator=rng) - 0.5
    far, side, turn, own, other = x.unbind(1)
    across, ahead = (far + 0.5) * torch.cos(6.28 * side), (far + 0.5) * torch.sin(6.28 * side)
    costs = []
    for way in (0.0, 0.4, -0.4, 0.8, -0.8):
        vx = (other + 0.5) * torch.cos(6.28 * turn) - (own + 0.5) * float(np.cos(way))
        vy = (other + 0.5) * torch.sin(6.28 * turn) - (own + 0.5) * float(np.sin(way))
        at = (-(across * vx + ahead * vy) / (vx**2 + vy**2 + 0.05)).clamp(0, 2)
        miss = ((across + at * vx) ** 2 + (ahead + at * vy) ** 2 + 1e-4).sqrt()
        costs.append(1.2 * torch.exp(-3 * miss) + 0.05 * abs(way))
    return x, torch.stack(costs, 1)


def _shifted(drawn: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    return (drawn[0] - 0.1307) / 0.3081, drawn[1]
