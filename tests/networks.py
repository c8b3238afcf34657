"""Networks for tests: every builder at a small size, with batch statistics that look trained."""

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import onnxruntime
import torch
from torch import Generator, Tensor, nn

from stages import seeding
from stages.method import names
from stages.nn.arch import BUILDERS, Arch

Shape = tuple[int, int, int]
Net = TypeVar("Net", bound=nn.Module)

# Small options where a builder's defaults are too large for a test; any other builder is tested with its defaults.
_SMALL: dict[str, dict[str, Any]] = {
    "resnet": {"width": 8},
    "mobilenet": {"width": 0.25, "head": 64},
    "torchvision_zoo": {"name": "mobilenet_v3_small"},
}


def every_builder() -> list[Arch]:
    """One small architecture per file in the folder of builders, on colour images of 32 pixels."""
    return [arch(name) for name in names(BUILDERS)]


def arch(builder: str, shape: Shape = (3, 32, 32), **options: Any) -> Arch:
    return Arch(
        builder=builder,
        options={**_SMALL.get(builder, {}), **options},
        input_shape=shape,
        classes=10,
        mean=(0.4,) * shape[0],
        std=(0.2,) * shape[0],
    )


def lived_in(net: Net, seed: int = 0) -> Net:
    """Give normalisations statistics, and biases values, as training would; in eval mode."""
    rng = seeding.generator(seed, "lived in")
    for module in net.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            size = module.num_features
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.copy_(0.3 * torch.randn(size, generator=rng))
            module.running_var.copy_(0.5 + torch.rand(size, generator=rng))
            if module.affine:
                module.weight.data.copy_(0.5 + torch.rand(size, generator=rng))
                module.bias.data.copy_(0.3 * torch.randn(size, generator=rng))
    return net.eval()


def built(wanted: Arch, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        seeding.deterministic(seed)
        return lived_in(wanted.build(), seed)


def images(count: int, shape: Shape, seed: int = 0) -> Tensor:
    return torch.rand(count, *shape, generator=seeding.generator(seed, "images"))


def onnx_logits(graph: bytes, x: Tensor, optimised: bool = True) -> Tensor:
    """What onnxruntime computes on one CPU thread, as itself (fused) or node by node."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    level = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimised else level.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return torch.from_numpy(np.asarray(session.run(None, {name: x.detach().numpy()})[0]))


class Single(nn.Module):
    """One function as a network."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


@torch.no_grad()
def draw_weights(net: nn.Module, rng: Generator) -> None:
    """Parameters and statistics at random, variances well above 0."""
    for name, value in net.state_dict().items():
        if value.is_floating_point():
            value.copy_(0.4 * torch.randn(value.shape, generator=rng))
            if "running_var" in name:
                value.abs_().add_(0.1)
