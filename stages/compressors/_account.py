"""What every layer of a network costs, so that a compressor can choose and a report can tell."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stages.nn.layers.gdws_conv import GDWSConv


@dataclass(frozen=True, slots=True)
class Layer:
    """For one image: output pixels (summed over calls), multiply-accumulates, parameters, channels in and out."""

    pixels: int
    macs: int
    params: int
    inputs: int
    outputs: int


def account(net: nn.Module, input_shape: tuple[int, int, int]) -> dict[str, Layer]:
    """Every convolution, linear and GDWS layer that one forward pass calls, by path, in order of the first call."""
    pixels: dict[str, int] = {}
    hooks = [
        module.register_forward_hook(_count(path, pixels))
        for path, module in net.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear | GDWSConv)
    ]
    device = next((p.device for p in net.parameters()), torch.device("cpu"))
    try:
        with torch.no_grad():
            net(torch.zeros((1, *input_shape), device=device))
    finally:
        for hook in hooks:
            hook.remove()
    return {path: _layer(net.get_submodule(path), count) for path, count in pixels.items()}


def _count(path: str, pixels: dict[str, int]) -> Any:
    def hook(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        del args
        places = math.prod(out.shape[2:]) if not isinstance(module, nn.Linear) else math.prod(out.shape[1:-1])
        pixels[path] = pixels.get(path, 0) + places

    return hook


def _layer(module: nn.Module, pixels: int) -> Layer:
    params = sum(parameter.numel() for parameter in module.parameters())
    if isinstance(module, nn.Linear):
        return Layer(pixels, pixels * module.weight.numel(), params, module.in_features, module.out_features)
    if isinstance(module, GDWSConv):
        weights = module.depthwise.numel() + module.pointwise.numel()
        return Layer(pixels, pixels * weights, params, module.in_channels, module.out_channels)
    assert isinstance(module, nn.Conv2d)
    return Layer(pixels, pixels * module.weight.numel(), params, module.in_channels, module.out_channels)
