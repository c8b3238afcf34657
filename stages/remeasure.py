"""What is measured on the file that ships: accuracy clean and attacked, agreement with torch, speed and memory."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load as tensors_of
from torch import Tensor, nn

from pipeline.core.measurement import Measurement, exact
from pipeline.core.paired import mcnemar
from pipeline.core.record import Outcomes
from pipeline.core.stage import Emit, Files
from stages import evidence
from stages.attacks.base import FOLDER as ATTACKS
from stages.attacks.base import Attack
from stages.attacks.pgd import PGD
from stages.data.base import Split
from stages.evaluate import under_attack
from stages.measure import accuracy
from stages.method import load
from stages.seeding import derive
from stages.shipped import Shipped, survivors
from stages.threat import Threat
from targets.lowering.parity import between
from targets.runtime.latency import measure

_LEVEL = 0.01


@dataclass(frozen=True, slots=True)
class Struck:
    """Two accuracies of a split of N images, clean and robust, one bit per example; what survived, bool [N], the
    points that broke the others, float32 [N, C, H, W], and the attacks."""

    split: Split
    measurements: tuple[Measurement, ...]
    outcomes: dict[str, Outcomes]
    alive: Tensor
    x_adv: Tensor
    attacks: Sequence[Attack]


def on_holdout(
    shipped: Shipped, net: nn.Module, held: Split, attacks: Sequence[Attack], threat: Threat, seed: int, emit: Emit
) -> Struck:
    """What breaks the float network `net` is replayed, then `attacks` strike the file."""
    _, replay = under_attack(
        net, PGD(steps=20, loss="margin"), held.images, held.labels, threat, derive(seed, "replay")
    )
    return _strike("holdout", shipped, held, replay, attacks, threat, seed, emit)


def on_test(
    shipped: Shipped,
    precision: str,
    test: Split,
    files: Files,
    attacks: Sequence[Attack],
    threat: Threat,
    seed: int,
    emit: Emit,
) -> tuple[Struck, tuple[str, ...]]:
    """Validate's adversarial examples are replayed, then `attacks` and validate's own strike the file.

    Also returns the findings that make the file's robust accuracy unbelievable.
    """
    stored = tensors_of(files["adversarial.safetensors"].read_bytes())
    told = evidence.read(files["evidence.jsonl"])
    split = test.select(positions(test.indices, stored["indices"]))
    found = _strike("test", shipped, split, stored["x_adv"], same_attacks(attacks, told), threat, seed, emit)
    judged = ~stored.get("open", torch.zeros_like(found.alive)).bool()
    findings = suspicious(found.alive[judged], stored["survived"][judged] if "survived" in stored else None, precision)
    proved = {e.index for e in told.examples if any(e.certified.values())}
    fooled = sum(index in proved for index in split.indices[~found.alive].tolist())
    if fooled:
        text = f"{fooled} of {len(proved)} images proved for the float network are broken on the file"
        # A lowered file is another network, for which nothing was proved.
        findings = (*findings, text) if precision == "fp32" else findings
        emit("note", {"text": text})
    return found, findings


def replayed(files: Files, split: Split, threat: Threat) -> Tensor:
    """Validate's adversarial examples for the images of `split`, float32 [N, C, H, W], within the threat."""
    stored = tensors_of(files["adversarial.safetensors"].read_bytes())
    order = positions(stored["indices"], split.indices)
    return threat.project(stored["x_adv"][order], split.floats())


def same_attacks(attacks: Sequence[Attack], told: evidence.Evidence) -> tuple[Attack, ...]:
    """`attacks`, and those that struck the float network and are not among them.

    A file that met weaker attacks than its float network survives more of them without hiding anything.
    """
    struck: list[Attack] = [
        load(ATTACKS, Attack, settings)  # type: ignore[type-abstract]
        for settings in told.header.attacks.values()
    ]
    return (*attacks, *(attack for attack in struck if attack not in attacks))


def suspicious(alive: Tensor, float_alive: Tensor | None, precision: str) -> tuple[str, ...]:
    """Rounding does not make a network robust: a file significantly more robust than the float network hides gradients.

    Exact one-sided McNemar test on the same images and under the same attacks, at 1 %.
    """
    if float_alive is None:
        return ()
    gained = int((alive & ~float_alive.bool()).sum())
    lost = int((~alive & float_alive.bool()).sum())
    p = mcnemar(gained, lost)
    if p >= _LEVEL:
        return ()
    return (
        f"the {precision} file withstood {gained} attacks that broke the float network and lost {lost} "
        f"(p = {p:.2g}): its gradients are masked, and its robust accuracy is not to be believed",
    )


def positions(indices: Tensor, wanted: Tensor) -> Tensor:
    """Rows of the split that hold the wanted indices, in the wanted order."""
    order = indices.argsort()
    return order[torch.searchsorted(indices[order], wanted)]


def parity(net: nn.Module, shipped: Shipped, split: Split, count: int) -> tuple[Measurement, ...]:
    """The file against the float network on the first `count` images of a split."""
    x = split.floats(slice(0, count))
    with torch.no_grad():
        before = np.concatenate([net(x[at : at + 256]).numpy() for at in range(0, len(x), 256)])
    after = shipped.engine(x.numpy())
    gap = between(before, after).gap
    same = torch.from_numpy(before.argmax(1) == after.argmax(1))
    top1, _ = accuracy("parity.top1", same, split.indices[: len(same)])
    return exact("parity.logits", gap, "logit"), top1


def speed(model: Path, shape: Sequence[int], runs: int, threads: int, latency: bool) -> tuple[Measurement, ...]:
    """Memory on this machine and, with `latency`, milliseconds: those mean something on the device's kind only."""
    found = measure(model, shape, runs=runs, threads=threads)
    numbers = [exact("memory.peak", found.peak_bytes, "bytes")]
    for name, figure in (("latency.p50", found.p50), ("latency.p95", found.p95)) if latency else ():
        numbers.append(
            Measurement(
                name=name,
                value=figure.value,
                low=figure.low,
                high=figure.high,
                unit="ms",
                samples=found.runs,
                better="lower",
            )
        )
    return tuple(numbers)


def _strike(
    part: str,
    shipped: Shipped,
    split: Split,
    replay: Tensor,
    attacks: Sequence[Attack],
    threat: Threat,
    seed: int,
    emit: Emit,
) -> Struck:
    clean, alive, x_adv = survivors(
        shipped, attacks, split.images, split.labels, replay, threat, derive(seed, part), _progress(emit, part)
    )
    measured, outcomes = [], dict[str, Outcomes]()
    for what, hits in (("clean", clean), ("robust", alive)):
        measurement, bits = accuracy(f"accuracy.{what}.shipped.{part}", hits, split.indices, evidence.strength(attacks))
        measured.append(measurement)
        outcomes |= bits
    return Struck(split, tuple(measured), outcomes, alive, x_adv, attacks)


def _progress(emit: Emit, part: str) -> Any:
    return lambda done, total: emit("progress", {"label": f"attack the file ({part})", "done": done, "total": total})
