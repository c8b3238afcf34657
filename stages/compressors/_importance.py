"""How much an error in one input channel of a convolution endangers decisions (Dbouk and Shanbhag 2021, equation 8)."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_TIE = 1e-2
_CHUNK = 2**23  # elements of per-example gradients held at once


def importance(
    net: nn.Module,
    layers: Mapping[str, nn.Conv2d],
    batches: Iterable[tuple[Tensor, Tensor, Tensor]],
    rivals: int,
) -> dict[str, Tensor]:
    """alpha [C] in float64 for every layer, from adversarial examples x_adv of batches (x, x_adv, y).

        alpha_c = mean_x sum_{j != n} ||d(z_n - z_j) / dW_c||_F^2 / (2 (z_n - z_j)^2 M K^2),     n = argmax z

    If the error in slice c were noise of variance ||W_c - Q_c||^2 / (M K^2) per entry, sum_c alpha_c ||W_c - Q_c||^2
    would bound, to first order, the chance that a decision changes (Chebyshev); so an error budget beta is a budget of
    changed decisions.

    Departures from the authors' code: eval mode (theirs leaves batch statistics on), a floor of 0.01 under
    |z_n - z_j| (else one near-tie rules the mean), only the `rivals` largest other logits, and all examples of a batch
    in one backward pass per rival, with per-example gradients from the layer's input and output gradient.
    """
    totals = {name: torch.zeros(layer.in_channels, dtype=torch.float64) for name, layer in layers.items()}
    count = 0
    for _, x_adv, _ in batches:
        seen = _Seen(layers)
        with torch.enable_grad():
            z = net(x_adv.detach().clone().requires_grad_())
        seen.close()
        top = z.topk(min(rivals + 1, z.shape[1]), dim=1).values
        outputs = [out for _, _, out in seen.calls]
        for j in range(1, top.shape[1]):
            gap = top[:, 0] - top[:, j]
            slopes = torch.autograd.grad(
                gap.sum(), outputs, retain_graph=j + 1 < top.shape[1], allow_unused=True, materialize_grads=True
            )
            share = 1 / (2 * gap.detach().double().clamp(min=_TIE) ** 2)
            for name, squares in _squares(layers, seen.calls, slopes):
                totals[name] += (share.unsqueeze(1) * squares).sum(0).cpu()
        count += len(x_adv)
    return {name: total / max(count, 1) / layers[name].weight[:, 0].numel() for name, total in totals.items()}


class _Seen:
    """Inputs and outputs of the layers in one forward pass, in order of the calls."""

    def __init__(self, layers: Mapping[str, nn.Conv2d]) -> None:
        self.calls: list[tuple[str, Tensor, Tensor]] = []
        self._hooks = [layer.register_forward_hook(self._keep(name)) for name, layer in layers.items()]

    def _keep(self, name: str) -> Any:
        def hook(layer: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            del layer
            self.calls.append((name, args[0].detach(), out))

        return hook

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()


def _squares(
    layers: Mapping[str, nn.Conv2d], calls: list[tuple[str, Tensor, Tensor]], slopes: tuple[Tensor, ...]
) -> Iterable[tuple[str, Tensor]]:
    """Per layer, squared gradient norms [B, C]; a layer that is called twice has one gradient, the sum."""
    for name, layer in layers.items():
        used = [(x, slope) for (who, x, _), slope in zip(calls, slopes, strict=True) if who == name]
        if used:
            size = max(1, _CHUNK // layer.weight.numel())
            rows = range(0, len(used[0][0]), size)
            yield name, torch.cat([_chunk(layer, [(x[i : i + size], s[i : i + size]) for x, s in used]) for i in rows])


def _chunk(layer: nn.Conv2d, used: list[tuple[Tensor, Tensor]]) -> Tensor:
    gradient: Tensor | float = 0.0
    for x, slope in used:
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        padded = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
        patches = F.unfold(padded, layer.kernel_size, layer.dilation, 0, layer.stride)
        gradient = gradient + torch.einsum("bmp,bkp->bmk", slope.flatten(2), patches)
    assert isinstance(gradient, Tensor)
    by_channel = gradient.view(*gradient.shape[:2], layer.in_channels, -1)
    squares: Tensor = by_channel.square().sum((1, 3), dtype=torch.float64)
    return squares
