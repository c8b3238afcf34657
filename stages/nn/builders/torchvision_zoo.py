"""Any torchvision classifier by name, freshly initialised."""

import difflib
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stages.method import InputError
from stages.nn._torchvision import torchvision
from stages.nn.builders import _check
from stages.nn.layers.normalize import normalize


class Grey(nn.Module):
    """One channel, three times: [B, 1, H, W] -> [B, 3, H, W], because these networks take colour images."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, x, x], 1)


def build(
    input_shape: tuple[int, int, int],
    classes: int,
    mean: Sequence[float] = (0.0,),
    std: Sequence[float] = (1.0,),
    *,
    name: str = "mobilenet_v3_small",
) -> nn.Sequential:
    """The network `name` of torchvision.models for images of any size it accepts, without pretrained weights.

    Grey images are repeated over three channels. Auxiliary heads are left off. Raises `InputError` for an unknown name
    (with the nearest one), for channel counts other than 1 and 3, and for images that the network cannot take.
    """
    channels, height, width = _check.image(input_shape, classes, least=1)
    if channels not in {1, 3}:
        raise InputError(f"torchvision_zoo: expected images of 1 or 3 channels, got {channels}; use another builder")
    zoo = torchvision().models
    names = zoo.list_models(module=zoo)
    if name not in names:
        close = difflib.get_close_matches(name, names, n=1)
        hint = f'did you mean "{close[0]}"?' if close else f"there is {', '.join(names)}"
        raise InputError(f'torchvision_zoo: no classifier "{name}"; {hint}')
    grey = {"grey": Grey()} if channels == 1 else {}
    try:
        net = zoo.get_model(name, weights=None, num_classes=classes, **_extras(name, height, width)).eval()
        _try_on_shapes(net, (1, 3, height, width))
    except (RuntimeError, ValueError, AssertionError) as error:
        raise InputError(f"torchvision_zoo: {name} cannot take images of {height}x{width}: {error}") from error
    return nn.Sequential(OrderedDict({"normalize": normalize(channels, mean, std), **grey, "net": net}))


def _try_on_shapes(net: nn.Module, shape: tuple[int, ...]) -> None:
    tensors = [*net.named_parameters(), *net.named_buffers()]
    shadows = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors}
    with torch.no_grad():
        torch.func.functional_call(net, shadows, (torch.empty(shape, device="meta"),))


def _extras(name: str, height: int, width: int) -> dict[str, Any]:
    if name.startswith("vit_"):
        return {"image_size": height}
    if name.startswith("maxvit"):
        return {"input_size": (height, width)}
    if name in {"googlenet", "inception_v3"}:
        return {"aux_logits": False, "init_weights": True}
    return {}
