"""bfloat16 on channels-last tensors, where it is faster than float32."""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from stages.fitting.optim import Fit


def choose(net: nn.Module, config: Fit) -> Literal["fp32", "bf16"]:
    """What `precision = "auto"` means; a function of the network and the kind of processor, so it never varies.

    bf16 with channels-last memory for networks that are mostly convolution over many channels: at least one 2-d
    convolution has 32 or more input and output channels, and no attention is in the way. Small CNNs and vision
    transformers gain nothing and stay in fp32, and so does everything on a CPU without AVX-512 bfloat16 instructions,
    where they would be emulated.
    """
    if config.precision != "auto":
        return config.precision
    if not _fast(next(net.parameters()).device):
        return "fp32"
    if any(isinstance(module, nn.MultiheadAttention) for module in net.modules()):
        return "fp32"
    wide = any(
        isinstance(module, nn.Conv2d) and min(module.in_channels, module.out_channels) >= 32 for module in net.modules()
    )
    return "bf16" if wide else "fp32"


class Mixed(nn.Module):
    """`net` under bf16 autocast and channels-last, with float32 logits, so that every loss and every attack's surrogate
    is computed in float32 (a bf16 loss flattens the gradients of confident examples). Weights stay float32.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = layout(net, torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16):
            logits: Tensor = self.net(x.contiguous(memory_format=torch.channels_last))
        return logits.float()

    def __getattr__(self, name: str) -> Any:
        """A recipe that made the network (`Recipe.wrap`) finds its parts again; they run in float32 when called."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("net"), name)


def layout(net: nn.Module, memory_format: torch.memory_format) -> nn.Module:
    """`net` itself, its weights laid out anew; no number changes."""
    net.to(memory_format=memory_format)  # type: ignore[call-overload]  # missing from torch's own overloads
    return net


def _fast(device: torch.device) -> bool:
    if device.type == "cpu":
        return bool(torch.cpu._is_avx512_bf16_supported())
    return device.type == "cuda" and torch.cuda.is_bf16_supported()
