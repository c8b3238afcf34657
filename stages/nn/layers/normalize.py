"""Input normalisation inside the network, so that threats, bounds and the shipped graph all speak pixels in [0, 1]."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from stages.method import InputError


class Normalize(nn.Module):
    """y = (x - mean) / std per channel; images [B, C, H, W]. One mean and std stand for every channel."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if len(mean) != len(std) or not mean:
            raise InputError(f"normalisation: expected as many means as deviations, got {len(mean)} and {len(std)}")
        if min(std) <= 0:
            raise InputError(f"normalisation: expected deviations above 0, got {tuple(std)}; is a channel constant?")
        self.register_buffer("mean", torch.tensor(tuple(mean), dtype=torch.float32).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(tuple(std), dtype=torch.float32).view(-1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std

    def extra_repr(self) -> str:
        return f"channels={self.mean.shape[0]}"


def normalize(channels: int, mean: Sequence[float], std: Sequence[float]) -> Normalize:
    """The first module of every builder. Raises `InputError` where mean or std fit neither 1 nor `channels`."""
    for name, values in (("mean", mean), ("std", std)):
        if len(values) not in {1, channels}:
            raise InputError(f"{name}: expected 1 or {channels} values, one per channel, got {len(values)}")
    size = max(len(mean), len(std))
    return Normalize(_spread(mean, size), _spread(std, size))


def like(old: nn.Module, channels: int) -> Normalize:
    """A normalisation of `channels` channels (1: the same for all) in place of `old`; its buffers are loaded later."""
    if not isinstance(old, Normalize):
        raise InputError(f"layer normalize: expected a Normalize to replace, got {type(old).__name__}")
    return Normalize((0.0,) * channels, (1.0,) * channels)


def _spread(values: Sequence[float], size: int) -> tuple[float, ...]:
    return tuple(values) * size if len(values) == 1 else tuple(values)
