"""What an audit reports apart from proofs: estimates of bounds, and what holds for the smoothed classifier."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from stages.bounds.base import Box, Estimator, lead_rows
from stages.bounds.smoothing import Smoothed, Smoothing
from stages.evaluate import OnStep
from stages.finding import Finding
from stages.method import InputError
from stages.scene import Scene
from stages.seeding import derive
from stages.subject import Subject

_BATCH = 256


@dataclass(frozen=True, slots=True)
class Apart:
    """By estimator: the low end of the true class's lead over the best other, [N], -inf where it says nothing.

    None of it may enter `certified`. `findings` names what could not be estimated.
    """

    estimators: Mapping[str, Estimator]
    leads: dict[str, Tensor]
    smoothing: Smoothing | None
    smoothed: Smoothed | None
    seconds: float
    findings: tuple[Finding, ...]


NOTHING = Apart({}, {}, None, None, 0.0, ())


def apart(
    subject: Subject,
    scene: Scene,
    estimators: Mapping[str, Estimator],
    smoothing: Smoothing | None,
    seed: int,
    on_step: Callable[[str], OnStep],
) -> Apart:
    """Estimates are made of the file's torch twin; the smoothed classifier asks the file itself."""
    leads, findings = dict[str, Tensor](), list[Finding]()
    for name, estimator in estimators.items():
        leads[name], why = _leads(subject, scene, estimator, on_step(f"estimate {name}"))
        if why:
            findings.append(Finding(f"covers_{name}", True, f"{name} estimates nothing about this file: {why}"))
    smoothed, start = None, time.perf_counter()
    if smoothing is not None:
        seeds = [derive(seed, "smoothing", index) for index in scene.indices.tolist()]
        smoothed = smoothing.judge(subject.file, scene.x, seeds.__getitem__, on_step("smoothed classifier"))
    return Apart(estimators, leads, smoothing, smoothed, time.perf_counter() - start, tuple(findings))


def _leads(subject: Subject, scene: Scene, estimator: Estimator, on_step: OnStep) -> tuple[Tensor, str]:
    nothing = torch.full((len(scene.x),), float("-inf"))
    if subject.twin is None:
        return nothing, "there is no torch twin to estimate it on"
    found = []
    try:
        for at in range(0, len(scene.x), _BATCH):
            x, y = scene.x[at : at + _BATCH], scene.y[at : at + _BATCH]
            rows = lead_rows(subject.twin, x, y)
            found.append(estimator.estimate(subject.twin, Box.around(x, scene.threat), rows)[0].amin(1))
            on_step(min(at + _BATCH, len(scene.x)), len(scene.x))
    except InputError as error:
        return nothing, str(error)
    return torch.cat(found), ""
