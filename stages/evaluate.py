"""Hits and totals of a classifier, clean and under an attack; the attack arrives as a callable.

Float32 only: no autocast here, and none of the callers opens one around it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Generator, Tensor, nn

from stages.data.base import to_float
from stages.method import InputError
from stages.oracle import Logits, Oracle, narrow
from stages.seeding import generator
from stages.threat import Threat

Strike = Callable[[Logits, Tensor, Tensor, Threat, Generator], Tensor]
"""The call of an attack: (logits, x, y, threat, rng) -> x_adv [B, C, H, W]."""

OnStep = Callable[[int, int], None]


@contextmanager
def frozen(net: nn.Module) -> Iterator[nn.Module]:
    """`net` in eval mode with parameters that need no gradient; every flag is as before afterwards.

    An attack differentiates with respect to its input alone, and without gradients for the weights a backward pass
    costs about half.
    """
    modes = [(module, module.training) for module in net.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in net.parameters()]
    net.eval()
    for parameter, _ in flags:
        parameter.requires_grad_(False)
    try:
        yield net
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def outputs(logits: Logits, x: Tensor, batch: int = 256) -> Tensor:
    """Logits [N, K] of images [N, C, H, W], uint8 or float in [0, 1], in batches and without gradients.

    Raises `InputError` where there is no image, or where an output is NaN or infinite: a prediction read off it would
    be an accident of `argmax`.
    """
    if len(x) == 0:
        raise InputError("evaluate: expected at least one image, got none")
    with torch.no_grad():
        z = torch.cat([logits(_floats(x[at : at + batch])) for at in range(0, len(x), batch)])
    bad = (~torch.isfinite(z).all(1)).nonzero().flatten()
    if len(bad):
        raise InputError(
            f"evaluate: the network's outputs are not finite for {len(bad)} of {len(x)} images "
            f"(first at position {int(bad[0])}); did training diverge, or does it overflow on such images?"
        )
    return z


def correct(logits: Logits, x: Tensor, y: Tensor, batch: int = 256) -> Tensor:
    """Which of the images [N, C, H, W] (uint8 or float) are classified rightly, bool [N]."""
    hits: Tensor = outputs(logits, x, batch).argmax(1) == y
    return hits


def under_attack(
    logits: Logits,
    strike: Strike,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    seed: int,
    batch: int = 256,
    on_step: OnStep | None = None,
) -> tuple[Tensor, Tensor]:
    """Which images are still classified rightly when `strike` has had its turn, bool [N], and x_adv float32.

    Images that are wrong already never enter the attack. x_adv differs from x only where the attack turned a right
    answer into a wrong one, as seen by a forward pass made here. Batch i draws from `generator(seed, "batch", i)`, so
    the same seed and batch size give the same answer, and an interrupted run can start again at any batch.
    `on_step(done, total)` counts images. An `Oracle` over the N images is charged for what `strike` asks.
    """
    judge = logits.logits if isinstance(logits, Oracle) else logits
    survived, found = [], []
    for number, at in enumerate(range(0, len(x), batch)):
        origin, labels = _floats(x[at : at + batch]), y[at : at + batch]
        alive = correct(judge, origin, labels, batch)
        adversarial = origin.clone()
        rows = alive.nonzero().flatten()
        if len(rows):
            rng = generator(seed, "batch", number, device=origin.device)
            candidate = strike(narrow(logits, at + rows), origin[rows], labels[rows], threat, rng)
            broken = ~correct(judge, candidate, labels[rows], batch)
            adversarial[rows[broken]] = candidate[broken]
            alive[rows[broken]] = False
        survived.append(alive)
        found.append(adversarial)
        if on_step is not None:
            on_step(min(at + batch, len(x)), len(x))
    return torch.cat(survived), torch.cat(found)


def confusion(logits: Logits, x: Tensor, y: Tensor, classes: int, batch: int = 256) -> Tensor:
    """Counts int64 [K, K]: row is the true class, column the predicted one.

    Raises `InputError` where a label or a prediction lies outside 0..K-1.
    """
    predicted = outputs(logits, x, batch).argmax(1)
    top = int(torch.maximum(predicted.max(), y.max()))
    if top >= classes or int(y.min()) < 0:
        raise InputError(f"confusion: expected labels and predictions within 0..{classes - 1}, got up to {top}")
    counts: Tensor = torch.bincount(y * classes + predicted, minlength=classes * classes).view(classes, classes)
    return counts


def _floats(x: Tensor) -> Tensor:
    return to_float(x) if x.dtype == torch.uint8 else x.to(torch.float32)
