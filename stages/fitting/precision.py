"""bfloat16 and channels-last memory, where they are faster than plain float32."""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from stages.fitting.optim import Fit

Mode = Literal["fp32", "fp32 channels-last", "bf16 channels-last"]

_DEEP = 4


def choose(net: nn.Module, config: Fit) -> Mode:
    """What `precision` means for this network on this kind of processor; nothing is timed, so it never varies.

    "auto" leaves perceptrons and transformers as they are, and so networks with a strided 1x1 convolution of fewer than
    8 channels: in channels-last float32 its weight gradient writes past its memory (torch 2.13, CPU). Other
    convolutional networks get channels-last memory, and, if they have four or more convolutions with at least 16 input
    channels each (a ResNet has, `small_cnn` has not), bf16 where the processor computes in it: with AVX-512 bfloat16
    instructions, or on a GPU that has them. Elsewhere bf16 is emulated and 5 to 10 times slower than float32. `docs/`
    and `benchmarks/` hold the numbers.
    """
    if config.precision == "fp32":
        return "fp32"
    if config.precision == "bf16":
        return "bf16 channels-last"
    convolutions = [module for module in net.modules() if isinstance(module, nn.Conv2d)]
    if not convolutions or any(isinstance(module, nn.MultiheadAttention) for module in net.modules()):
        return "fp32"
    if any(_overruns(module) for module in convolutions):
        return "fp32"
    deep = sum(module.in_channels >= 16 for module in convolutions) >= _DEEP
    return "bf16 channels-last" if deep and native(next(net.parameters()).device) else "fp32 channels-last"


def _overruns(module: nn.Conv2d) -> bool:
    return module.kernel_size == (1, 1) and max(module.stride) > 1 and module.in_channels < 8


def native(device: torch.device) -> bool:
    """True where the processor has bf16 arithmetic."""
    if device.type == "cpu":
        return bool(torch.cpu._is_avx512_bf16_supported())
    return device.type == "cuda" and torch.cuda.is_bf16_supported()


def prepare(net: nn.Module, mode: Mode) -> nn.Module:
    """What the loop hands to a recipe instead of `net`; the weights stay those of `net`, in float32."""
    return net if mode == "fp32" else Faster(net, torch.bfloat16 if mode == "bf16 channels-last" else None)


class Faster(nn.Module):
    """`net` on channels-last memory, under autocast where a type is given, with float32 logits.

    So every loss and every attack's surrogate is computed in float32: in bf16 the gradients of confident examples
    would vanish.
    """

    def __init__(self, net: nn.Module, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.net = layout(net, torch.channels_last)
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, self.dtype, enabled=self.dtype is not None):
            logits: Tensor = self.net(x.contiguous(memory_format=torch.channels_last))
        return logits if self.dtype is None else logits.float()

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
