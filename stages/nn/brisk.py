"""The same function, faster to differentiate with respect to images on a processor; for attacks."""

import copy
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_FEW = 4


def brisk(net: nn.Module) -> nn.Module:
    """A copy of `net` in eval mode, channels-last, equal to it to rounding; training it further is not meant.

    Two things are slow in what torch does otherwise. The backward pass of a convolution with up to four input channels,
    usually the first one, is here W^T g followed by adding up overlapping patches (`fold`, col2im), where the patches
    take no more room than the slopes do (kernel area <= outputs / inputs * 4). And what comes back through a `Flatten`
    is put into the layout that the layers before it work in. Both are differentiable again. Layers of other classes,
    padding other than zeros, groups and dilation stay as they are.
    """
    twin = copy.deepcopy(net).eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for path, module in list(twin.named_modules()):
        if type(module) is nn.Flatten and (module.start_dim, module.end_dim) == (1, -1):
            _put(twin, path, _Flat())
        elif type(module) is nn.Conv2d and _narrow(module):
            _put(twin, path, _Narrow(module))
    return cast(nn.Module, twin)


def _put(net: nn.Module, path: str, module: nn.Module) -> None:
    if path:
        net.set_submodule(path, module)


def _narrow(conv: nn.Conv2d) -> bool:
    return (
        conv.groups == 1
        and conv.dilation == (1, 1)
        and conv.padding_mode == "zeros"
        and not isinstance(conv.padding, str)
        and few(conv.weight)
    )


class _Flat(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4:
            return x.flatten(1)
        z: Tensor = _Relaid.apply(x)  # type: ignore[no-untyped-call]
        return z.flatten(1)


class _Relaid(torch.autograd.Function):
    """The identity; slopes go back channels-last."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        del ctx
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> Tensor:
        del ctx
        return slopes[0].contiguous(memory_format=torch.channels_last)


class _Narrow(nn.Module):
    """A convolution with few input channels."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.weight, self.bias = conv.weight, conv.bias
        self.stride, self.padding = conv.stride, cast(tuple[int, int], conv.padding)

    def forward(self, x: Tensor) -> Tensor:
        return conv2d(x, self.weight, self.bias, self.stride, self.padding)


def conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, ...], padding: tuple[int, ...]) -> Tensor:
    """F.conv2d without groups and dilation; with the quicker backward pass where that is for x alone and is one."""
    if torch.is_grad_enabled() and x.requires_grad and not weight.requires_grad and few(weight):
        z: Tensor = _Convolution.apply(x, weight, bias, stride, padding)  # type: ignore[no-untyped-call]
        return z
    return F.conv2d(x, weight, bias, stride, padding)


def few(weight: Tensor) -> bool:
    """Whether a convolution has so few input channels that the patches of its slopes take no more room than those."""
    outputs, inputs, height, width = weight.shape
    return inputs <= _FEW and height * width * inputs <= _FEW * outputs


class _Convolution(torch.autograd.Function):
    """F.conv2d with slopes for x alone."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, int], padding: tuple[int, int]
    ) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.side, ctx.stride, ctx.padding = x.shape[2:], stride, padding
        return F.conv2d(x, weight, bias, stride, padding)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        patches = weight.flatten(1).T @ slopes[0].flatten(2)
        kernel = weight.shape[2:]
        back = F.fold(patches, ctx.side, kernel, padding=ctx.padding, stride=ctx.stride)
        return back, None, None, None, None
