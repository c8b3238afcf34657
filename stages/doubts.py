"""Every reason to believe or to disbelieve the numbers of an audit, as sentences."""

from collections.abc import Iterator

import torch
from torch import Tensor

from stages import evidence, validity
from stages.adapter import Behind
from stages.evaluate import OnStep
from stages.finding import Finding, Point
from stages.scene import Scene, Struck
from stages.seeding import derive, generator
from stages.subject import Subject
from stages.trial import strike
from stages.verdicts import Verdicts, misread

_DOUBTED, _SHARE = 50, 20
_CURVE = (0.5, 1.0, 2.0)
_OF_GRADIENTS = ("gradients_present", "gradients_explain", "rises_along_gradient", "black_box")


def findings(
    subject: Subject, verdicts: Verdicts, x: Tensor, y: Tensor, seed: int, on_step: OnStep
) -> Iterator[Finding]:
    """Those of the file itself, then of the gradients, then of the evidence and the proofs.

    x [M, C, H, W] and y are the images that the network is examined on, 20 or more, be they judged or not.
    """
    scene, at = verdicts.scene, derive(seed, "checks")
    own = (validity.repeatable(subject.file, x), validity.batch_free(subject.file, x), _probabilities(subject, x))
    yield from own
    if subject.twin is None:
        text = f"attacked by black box only, and may well break under more: the file has no torch twin: {subject.why}"
        yield Finding("imported", False, text)
    else:
        yield Finding("imported", True, f"the torch twin was compared with the file {subject.text}")
        points: tuple[Point, ...] = ()
        if scene.threat.eps > 0:
            points = validity.curve(subject.attacked, x, y, scene.threat, _CURVE, at)
            found = validity.checks(subject.attacked, x, y, scene.threat, at, points, None, on_step)
            done = {check.name for check in own}
            yield from (_blamed(finding, subject.twin) for finding in found if finding.name not in done)
    lost, allowed = sum(line.twin_only for line in verdicts.lines), max(1, len(scene.x) // 50)
    text = f"{lost} images were broken in an attack, and not when the file was asked again; they count as standing"
    yield Finding("broken_on_file", lost <= allowed, f"{text}; must be <= {allowed}")
    yield _rechecked(scene, verdicts.struck)
    yield from _sound(subject, verdicts, seed)
    yield from verdicts.proved.findings


def _blamed(finding: Finding, twin: Behind) -> Finding:
    """The nodes that gradients cannot see through, where gradients fail."""
    jumps = twin.twin.jumps()
    if finding.ok or not jumps or finding.name not in _OF_GRADIENTS:
        return finding
    text = f"{finding.text}; flat between jumps: {', '.join(jumps)}: attack a copy with smooth stand-ins for these"
    return Finding(finding.name, False, text)


def _probabilities(subject: Subject, x: Tensor) -> Finding:
    found = validity.not_probabilities(subject.file, x)
    if found.ok or subject.twin is None or not subject.twin.twin.softmax:
        return found
    text = (
        f"the outputs on {len(x)} images are probabilities; attacks climbed the logits before the file's last softmax"
    )
    return Finding(found.name, True, text)


def _rechecked(scene: Scene, struck: Struck) -> Finding:
    rows = torch.tensor([name is not None for name in struck.stored]).nonzero().flatten()
    held = 0
    if len(rows):
        again = evidence.recheck(scene.net, scene.x[rows], struck.x_adv[rows], scene.y[rows], scene.threat)
        held = int(again.holds.sum())
    text = f"{held} of {len(rows)} stored inputs are in ball and range and misread by the file when asked again"
    return Finding("rechecked", held == len(rows), f"{text}; must be all")


def gridded(scene: Scene, struck: Struck) -> Finding:
    """What an 8-bit image file can hold of the stored inputs, asked again; it informs, and refuses nothing."""
    rows = torch.tensor([name is not None for name in struck.stored]).nonzero().flatten()
    held = 0
    if len(rows):
        x, y = scene.x[rows], scene.y[rows]
        rounded = evidence.on_grid(struck.x_adv[rows], x, scene.threat)
        held = int(evidence.recheck(scene.net, x, rounded, y, scene.threat).holds.sum())
    text = f"{held} of {len(rows)} stored inputs still fool the file when rounded to what an 8-bit image can hold"
    return Finding("on_grid", True, f"{text}, within the ball")


def _sound(subject: Subject, verdicts: Verdicts, seed: int) -> Iterator[Finding]:
    """Proofs put to the test: what was attacked in spite of one, and shortly a twentieth of the others, at least 50."""
    scene, proved, struck = verdicts.scene, verdicts.proved, verdicts.struck
    for name, certified in proved.certified(scene.right).items():
        broken = certified & ~struck.alive
        tried = torch.stack([hit.tried for hit in struck.hits.values()]).any(0)
        rows = (certified & ~tried).nonzero().flatten()
        some, count = torch.zeros_like(certified), max(_DOUBTED, len(rows) // _SHARE)
        some[rows[torch.randperm(len(rows), generator=generator(seed, "doubt", name))[:count]]] = True
        hit = strike(subject.attacked, validity.PROBE, scene.x, scene.y, some, scene.threat, derive(seed, "doubt"))
        broken = broken | misread(subject, scene, hit, some)
        text = (
            f"{int(broken.sum())} of {int((certified & (tried | some)).sum())} attacked examples that {name} proved "
            f"were broken ({int(certified.sum())} proved in all); must be none"
        )
        yield Finding(f"sound_{name}", not bool(broken.any()), text)
