"""What attacks that learn before they strike have in common: a sample of the stream, seeded weights, minibatches."""

import math
from collections.abc import Iterator

import torch
from torch import Generator, Tensor, nn

from stages.attacks.base import Attack, Batches
from stages.method import InputError


def sampled(data: Batches, count: int, rng: Generator) -> tuple[Tensor, Tensor]:
    """`count` examples drawn without replacement from a stream of any length, or all; holds no more than that at once.

    Each example gets a random key and the lowest keys stay, so that a stream sorted by class is no hindrance.
    Raises `InputError` for an empty stream.
    """
    kept: tuple[Tensor, Tensor, Tensor] | None = None
    for x, y in data:
        key = torch.rand(len(x), generator=rng, device=rng.device).to(x.device)
        joined = (x, y, key) if kept is None else tuple(torch.cat(pair) for pair in zip(kept, (x, y, key), strict=True))
        rows = joined[2].topk(min(count, len(joined[2])), largest=False).indices
        kept = (joined[0][rows], joined[1][rows], joined[2][rows])
    if kept is None or len(kept[0]) == 0:
        raise InputError("prepare: expected at least one example to learn from, got none")
    return kept[0], kept[1]


def seeded(net: nn.Module, rng: Generator, device: torch.device) -> nn.Module:
    """Weights normal with variance 2 / fan-in, biases zero, from `rng` alone."""
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.dim() < 2:
                parameter.zero_()
                continue
            noise = torch.randn(parameter.shape, generator=rng, device=rng.device)
            parameter.copy_(noise * math.sqrt(2 / parameter[0].numel()))
    return net.to(device)


def minibatches(
    count: int, size: int, epochs: int, rng: Generator, device: torch.device
) -> Iterator[tuple[int, Tensor]]:
    """Epoch and rows, int64; every epoch is a permutation of its own."""
    for epoch in range(epochs):
        order = torch.randperm(count, generator=rng, device=rng.device).to(device)
        for at in range(0, count, size):
            yield epoch, order[at : at + size]


def descend(optimiser: torch.optim.Optimizer, loss: Tensor) -> None:
    """One step of the optimiser on its own parameters; no other parameter in the graph receives a gradient."""
    own = [parameter for group in optimiser.param_groups for parameter in group["params"]]
    for parameter, slope in zip(own, torch.autograd.grad(loss, own), strict=True):
        parameter.grad = slope
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)


def unprepared(attack: Attack) -> InputError:
    return InputError(
        f"{attack.kind}: nothing has been learnt yet; call prepare(logits, data, rng) with training images, and strike "
        "with the attack that it returns"
    )


def fits(attack: Attack, wanted: tuple[int, ...], x: Tensor, classes: int, known: int) -> None:
    """Raise `InputError` where an attack was prepared on images or classes of another kind."""
    if tuple(x.shape[1:]) != wanted or classes != known:
        raise InputError(
            f"{attack.kind}: prepared on images {wanted} and {known} classes, got {tuple(x.shape[1:])} and {classes}; "
            "prepare it on this network"
        )
