"""From the float32 network to the graph that a target runs: exported, held against torch, lowered."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from stages.attacks.pgd import PGD
from stages.method import InputError
from stages.seeding import generator
from stages.task import Splits
from stages.threat import Threat
from targets.lowering.apply import Guard, Lowered, PassSpec, apply, passes_for, prove
from targets.passes.base import Kit
from targets.runtime.ort import OrtEngine

BATCHES = (1, 2, 7, 64)
# Float32 sums in another order; a share of the largest logit. Beyond it the graph is not the network.
SAME = 1e-3


def check_export(net: nn.Module, model: bytes, splits: Splits) -> None:
    """The float32 file agrees with torch at batch 1, 2, odd and maximum. Raises `InputError` where it does not."""
    x = splits.train.floats(slice(0, max(BATCHES)))
    engine = OrtEngine(model)
    with torch.no_grad():
        expected = net(x).numpy()
    for batch in BATCHES:
        gap = float(np.abs(engine(x[:batch].numpy()) - expected[:batch]).max())
        if not gap <= SAME * max(1.0, float(np.abs(expected).max())):
            raise InputError(f'the exported graph is {gap:.3g} off at batch {batch}; try exporter = "legacy"')


def calibration(net: nn.Module, splits: Splits, threat: Threat, count: int, seed: int) -> Tensor:
    """Float32 [`count`, C, H, W], training images, every second one attacked: what the int8 ranges must hold.

    Every one of those is perturbed, also where the attack does not succeed: a robust network meets such inputs too.
    """
    order = torch.randperm(len(splits.train), generator=generator(seed, "calibration"))
    rows = order[:count]
    x, attack = splits.train.floats(rows), PGD(steps=10, loss="margin")
    for at in range(1, len(x), 512):
        part = slice(at, at + 512, 2)
        rng = generator(seed, "calibration", at)
        x[part] = threat.project(attack.perturb(net, x[part], splits.train.labels[rows[part]], threat, rng), x[part])
    return x


def lower(
    model: bytes,
    precisions: Mapping[str, Sequence[PassSpec]],
    precision: str,
    images: Tensor,
    work: Path,
    note: Callable[[str], None],
    guard: Guard | None = None,
) -> Lowered:
    """The graph at one precision; `images` fix the ranges of int8, `guard` makes a detector's graph for each lowered
    network. Raises `LoweringError`."""
    kit = Kit(images.numpy(), work, note=note)
    if any("tensorrt_check" in map(_pass_name, passes) for passes in precisions.values()):
        # NVIDIA's parser must take every precision on offer, whichever is chosen.
        return prove(model, precisions, kit, guard=guard)[precision]
    return apply(model, passes_for(precisions, precision), kit, guard=guard)


def _pass_name(spec: PassSpec) -> str:
    return spec if isinstance(spec, str) else str(spec["pass"])
