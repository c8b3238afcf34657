"""One verdict for every image of an audit: proved, broken on the file itself, or standing after every attack.

Attacks climb where gradients are (the torch twin), one after the other, each on what those before it left. What they
find counts when the file, in onnxruntime, misreads it within ball and range. Where the file does not, the attack
strikes again with the file's own values and the twin's gradients, and what is left over then is counted and told.

Proofs are about the twin. Both leads in a comparison of classes may be off by what twin and file were seen to differ,
so twice that gap is taken off every bound. For float files the bounds allow for float32 sums in any order, and the gap
is for what onnxruntime does besides (it fuses operations); it is measured on some inputs and proved for none. A file
that rounds on the way may land a whole code away from its twin: of it only bounds that cover this say anything
(`quantised`), and nothing is taken off them.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from stages import evidence
from stages.attacks.base import Attack
from stages.bounds.base import Certifier
from stages.early import Demand, Early, early
from stages.evaluate import OnStep, outputs
from stages.finding import Finding
from stages.method import InputError
from stages.oracle import Spent
from stages.scene import Scene, Struck
from stages.seeding import derive, generator
from stages.subject import Subject
from stages.threat import Threat
from stages.trial import Hit, Proved, joined, prove, strike
from stages.unproved import REASONS, counts, settled

Ready = Callable[[Attack], Attack]


@dataclass(frozen=True, slots=True)
class Plan:
    """What is asked of every image. With `shortcuts` images proved robust are not attacked, and classes proved
    unreachable are not targeted. With `demand` attacking ends as soon as it is certain whether it is met. A memory
    that was asked for has to hold an image."""

    threat: Threat
    attacks: Mapping[str, Attack]
    certifiers: Mapping[str, Certifier]
    shortcuts: bool
    seed: int
    demand: Demand | None = None
    certify_seconds: float | None = None
    memory_asked: bool = False


@dataclass(frozen=True, slots=True)
class Line:
    """One attack: how many images it tried and broke, what it spent on them, how many broke the twin alone."""

    name: str
    tried: int
    broke: int
    twin_only: int
    queries: int
    gradients: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Verdicts:
    scene: Scene
    proved: Proved
    struck: Struck
    lines: tuple[Line, ...]

    @property
    def right(self) -> Tensor:
        return self.scene.right

    @property
    def robust(self) -> Tensor:
        """bool [N]: right, and broken by none; with an early verdict open ones are among them."""
        return self.scene.right & self.struck.alive

    @property
    def certified(self) -> Tensor | None:
        """bool [N]: proved by at least one certifier; None where none was asked."""
        if not self.proved.leads:
            return None
        return torch.stack(list(self.proved.certified(self.scene.right).values())).any(0)

    @property
    def unproved(self) -> dict[str, int] | None:
        """How many images are not proved for which reason; None where no certifier was asked."""
        return None if self.certified is None else counts(settled(self.proved.why, self.certified, self.robust))


def judge(
    subject: Subject, x: Tensor, y: Tensor, indices: Tensor, plan: Plan, ready: Ready, on_step: Callable[[str], OnStep]
) -> Verdicts:
    """Every image [N, C, H, W] of labels [N]; `ready` prepares an attack that learns, `on_step(label)` counts images.

    Without shortcuts the images that a proof would spare are attacked after the others and in batches of their own, so
    that the others meet the same random numbers either way.
    """
    right = outputs(subject.file, x).argmax(1) == y
    scene = Scene(subject.file, x, y, indices, plan.threat, right)
    proved = _proved(subject, scene, plan, on_step)
    unproved = proved.unproved
    safe = torch.zeros_like(right) if unproved is None else right & ~unproved.any(1)
    ring = _Ring(subject, scene, plan, unproved if plan.shortcuts else None, ready, on_step)
    told = None
    if plan.demand is None:
        for name in plan.attacks:
            ring.strike(name, right & ~safe, 0)
            if not plan.shortcuts:
                ring.strike(name, safe, 1)
    else:
        first, *others = plan.attacks

        def rest(rows: Tensor, number: int) -> Tensor:
            for name in others:
                rows = rows & ring.strike(name, rows, number)
            return rows

        told = early(
            right & ~safe,
            int(safe.sum()),
            plan.demand,
            lambda rows, number: ring.strike(first, rows, number),
            rest,
            generator(plan.seed, "early"),
            on_step("until the verdict is certain"),
        )
    return Verdicts(scene, proved, ring.struck(told), ring.lines())


class _Ring:
    """Attacks by name strike images, and what comes of it is kept; an image is broken once."""

    def __init__(
        self,
        subject: Subject,
        scene: Scene,
        plan: Plan,
        targets: Tensor | None,
        ready: Ready,
        on_step: Callable[[str], OnStep],
    ) -> None:
        self.subject, self.scene, self.plan, self.targets, self.on_step = subject, scene, plan, targets, on_step
        self.alive = scene.right.clone()
        self.ready = {name: ready(attack) for name, attack in plan.attacks.items()}
        # One tensor of inputs serves all attacks.
        self.best, self.stored = scene.x.clone(), list[str | None]([None] * len(scene.x))
        self.hits = {name: _untried(scene.x) for name in plan.attacks}
        self.twin_only, self.seconds = dict.fromkeys(plan.attacks, 0), dict.fromkeys(plan.attacks, 0.0)

    def strike(self, name: str, rows: Tensor, number: int) -> Tensor:
        """bool [N]: what the attack leaves, `rows` that were broken before not tried; `number` is part of its seed."""
        start, seed = time.perf_counter(), derive(self.plan.seed, name, number)
        given = (self.subject, self.scene, self.ready[name], rows & self.alive, seed, self.targets, self.on_step(name))
        found, missed = _strike(*given)
        broken = (~found.survived).nonzero().flatten()
        self.best[broken] = found.x_adv[broken]
        for row in broken.tolist():
            self.stored[row] = name
        self.alive &= found.survived
        self.hits[name] = replace(joined(self.hits[name], found), x_adv=self.best)
        self.twin_only[name] += missed
        self.seconds[name] += time.perf_counter() - start
        return found.survived

    def struck(self, told: Early | None) -> Struck:
        right = self.scene.right
        hits = {name: replace(hit, survived=hit.survived & right, x_adv=self.best) for name, hit in self.hits.items()}
        return Struck(dict(self.plan.attacks), hits, self.best, self.stored, told)

    def lines(self) -> tuple[Line, ...]:
        return tuple(_line(name, hit, self.twin_only[name], self.seconds[name]) for name, hit in self.hits.items())


def _proved(subject: Subject, scene: Scene, plan: Plan, on_step: Callable[[str], OnStep]) -> Proved:
    """Bounds of the twin, less what the file may be away from it."""
    certifiers = plan.certifiers
    twin, why = subject.twin, "there is no torch twin to prove it of"
    rounds = twin is not None and twin.twin.rounds
    able = {name: certifier for name, certifier in certifiers.items() if certifier.covers_rounding or not rounds}
    if rounds:
        why = 'the file rounds on the way, and may land a code away from what was bounded; "quantised" covers that'
    if subject.strange is not None:
        able, why = {}, subject.strange
    found = Proved({}, {}, (), (REASONS[0],) * len(scene.x))  # uncovered
    if twin is not None:
        labelled = lambda name: on_step(f"certify {name}")  # noqa: E731
        given = (twin, scene.x, scene.y, subject.classes, scene.threat, able, labelled)
        found = prove(*given, plan.certify_seconds, plan.memory_asked)
    leads = torch.full((len(scene.x), subject.classes), float("-inf"))
    nothing = leads.scatter(1, scene.y.unsqueeze(1), float("inf"))
    slack = 0.0 if rounds else 2 * subject.gap
    told = [
        Finding(f"covers_{name}", True, f"{name} proves nothing about this file: {why}")
        for name in certifiers
        if name not in found.leads
    ]
    bounds = {name: found.leads[name] - slack if name in found.leads else nothing for name in certifiers}
    return Proved(dict(certifiers), bounds, (*found.findings, *told), found.why)


def _strike(
    subject: Subject,
    scene: Scene,
    attack: Attack,
    rows: Tensor,
    seed: int,
    unproved: Tensor | None,
    on_step: OnStep,
) -> tuple[Hit, int]:
    """What the file itself misreads, and how many images broke the twin alone."""
    x, y, threat = scene.x, scene.y, scene.threat
    first = strike(subject.attacked, attack, x, y, rows, threat, seed, unproved, on_step)
    broken = misread(subject, scene, first, rows)
    missed = rows & ~first.survived & ~broken
    found = _counted(first, broken, x)
    if bool(missed.any()):
        second = strike(subject.through, attack, x, y, missed, threat, derive(seed, "file"), unproved)
        more = misread(subject, scene, second, missed)
        found, missed = joined(found, _counted(second, more, x)), missed & ~more
    return found, int(missed.sum())


def _counted(hit: Hit, broken: Tensor, x: Tensor) -> Hit:
    """What of a hit counts: the images that the file misreads."""
    return Hit(hit.tried, ~broken, torch.where(_wide(broken, x), hit.x_adv, x), hit.spent)


def _untried(x: Tensor) -> Hit:
    none = torch.zeros(len(x), dtype=torch.int64)
    return Hit(none > 0, none == 0, x, Spent(none, none))


def misread(subject: Subject, scene: Scene, hit: Hit, rows: Tensor) -> Tensor:
    """bool [N]: `rows` that the attack broke and that the file misreads, within ball and range."""
    broken = torch.zeros_like(rows)
    chosen = (rows & ~hit.survived).nonzero().flatten()
    if len(chosen):
        again = evidence.recheck(subject.file, scene.x[chosen], hit.x_adv[chosen], scene.y[chosen], scene.threat)
        broken[chosen] = again.holds
    return broken


def _wide(rows: Tensor, x: Tensor) -> Tensor:
    return rows.view((-1,) + (1,) * (x.dim() - 1))


def _line(name: str, hit: Hit, twin_only: int, seconds: float) -> Line:
    broke = int((hit.tried & ~hit.survived).sum())
    queries, gradients = int(hit.spent.queries.sum()), int(hit.spent.gradients.sum())
    return Line(name, int(hit.tried.sum()), broke, twin_only, queries, gradients, seconds)


def check_labels(subject: Subject, y: Tensor, classes: Sequence[str]) -> str | None:
    """Raises `InputError` for labels beyond the outputs; a sentence where the file knows more classes than the data."""
    top = int(y.max())
    if top >= subject.classes:
        raise InputError(
            f"{subject.path}: it has {subject.classes} outputs, but the data holds labels up to {top}; "
            "is it the classifier for this data?"
        )
    if subject.classes != len(classes):
        return f"the file has {subject.classes} outputs, the data {len(classes)} classes"
    return None
