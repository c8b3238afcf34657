"""STAGE 4: attack and certify on the test split; write evidence."""

import hashlib
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from pipeline.core.gate import Budget
from pipeline.core.measurement import Measurement, Strength
from pipeline.core.record import Outcomes
from pipeline.core.stage import Context, Files, Result
from stages import detection, evidence, validity
from stages.attacks.base import QUICK, AttackSet
from stages.bounds.base import AnyCertifier
from stages.data._cut import subset
from stages.data.base import Split
from stages.detectors.base import AnyDetector
from stages.early import Early
from stages.evaluate import OnStep, frozen
from stages.finding import Finding, Point
from stages.measure import accuracy
from stages.method import InputError, Value, kinds
from stages.nn import checkpoint
from stages.nn.fold import dense, fold
from stages.scene import Scene, Struck, write
from stages.seeding import derive, generator
from stages.striking import Striker
from stages.task import Task
from stages.trial import Proved, prove

ROBUST, CERTIFIED = "accuracy.robust.test", "accuracy.certified.test"
CASCADE = ("ibp", "crown_ibp", "crown", "alpha_crown", "branch_and_bound")  # the cheapest first
CERTIFY_SECONDS = 300.0
LIBRARIES = ("torch", "numpy", "safetensors", "pydantic", "pillow")


class Config(Value):
    """`[stages.validate]`.

    `samples` test images are drawn stratified by class, by the task's `split_seed` alone, so that every run of a task
    is measured on the same ones; all are taken where there are fewer. `attacks` all strike every image that is right
    without one, each on its own; with `sequence`, only what the ones before it left, so that the accuracy under an
    attack counts those before it too. Images that `certify`, which may be empty, proves robust are not attacked, but
    for a twentieth of them, at least 50, to test the proofs; classes proved unreachable are no targets. Certifying ends
    after `certify_seconds`, if given: what is proved by then counts, and that depends on the machine's speed. A limit
    on `accuracy.certified.test` asks for all certifiers, the cheapest first, each for what those before it left open,
    and for 300 seconds, where the spec says nothing else.

    `early` is a confidence, 0.99 say: attacking ends as soon as it is that certain what the gate's limit on
    `accuracy.robust.test`, which is filled in as `stop_at`, will say of all the images under all the attacks, the
    members of the standard ensemble taken one by one. Images without a verdict of their own are called open; the
    number that is measured comes with an interval that takes them into account, and there is none for single attacks.

    The validity checks and the curve over `curve` times eps use the first `validity_samples` of a further shuffle of
    those images; `images` of the broken ones go into the report.

    `detector`, by name or table, is fitted on the hold-out and attacked on the test images, by what the attacks found
    without knowing it and by its own adaptive attack; export then makes it part of the graph.
    """

    samples: int = Field(default=1000, ge=2)
    attacks: AttackSet = Field(default=QUICK, min_length=1, validate_default=True)
    sequence: bool = False
    early: float | None = Field(default=None, gt=0.5, lt=1)
    stop_at: float | None = Field(default=None, ge=0, le=1)
    certify: tuple[AnyCertifier, ...] = Field(default=("ibp",), validate_default=True)
    certify_seconds: float | None = Field(default=None, gt=0)
    validity_samples: int = Field(default=200, ge=20)
    curve: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        default=(0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0), min_length=2
    )
    images: int = Field(default=8, ge=0)
    detector: AnyDetector | None = None


def measures(config: Config, task: Mapping[str, Any]) -> frozenset[str]:
    """Raises `InputError` for an attack that has no version for the task's norm."""
    threat = Task.load(task).threat
    for attack in config.attacks:
        attack.accept(threat)
    names = {"accuracy.clean.test", ROBUST}
    if config.early is None:
        names |= {f"accuracy.robust.{name}.test" for name in kinds(config.attacks)}
    elif config.stop_at is None:
        raise InputError(
            f"early: expected a limit on {ROBUST} with at_least and nothing else, got none; "
            "the verdict to wait for is that limit's"
        )
    elif config.detector is not None:
        raise InputError("early: a detector asks for every image under every attack; drop one of the two")
    names |= {CERTIFIED} if config.certify else set()
    return frozenset(names | (detection.names("test") if config.detector is not None else set()))


def obeying(table: Mapping[str, Any], limits: Budget) -> Mapping[str, Any]:
    """A demand for proofs brings the whole cascade in, up to branch and bound, and a time for it, unless certifiers are
    named. An early verdict is that on the gate's own limit; several demands on the number leave none to wait for."""
    if any(limit.metric == CERTIFIED for limit in limits) and "certify" not in table:
        table = {"certify": CASCADE, "certify_seconds": CERTIFY_SECONDS, **table}
    held = [limit for limit in limits if limit.metric == ROBUST]
    if table.get("early") is None or any(limit.at_most is not None or limit.max_loss is not None for limit in held):
        return table
    bounds = [limit.at_least for limit in held if limit.at_least is not None]
    return {**({"stop_at": max(bounds)} if bounds else {}), **table}


def run(files: Files, config: Config, ctx: Context) -> Result:
    """Writes `evidence.jsonl`, `adversarial.safetensors` (x_adv, indices, survived), `figures.json` and `images/`.

    With a detector also `detector.json` and `detector.safetensors` (`attachment.write` documents them).

    Passes `arch.json` and `weights.safetensors` on. Finished attacks stay in the scratch folder, and a run that was
    stopped goes on after the last of them, to the same bytes. Everything is float32.
    """
    task = Task.load(ctx.task)
    splits = task.open(ctx.data_root)
    test = _sample(splits.test, config.samples, task.split_seed)
    net = fold(checkpoint.load(files[checkpoint.ARCH], files[checkpoint.WEIGHTS]).net).to(ctx.device)
    ctx.scratch.mkdir(parents=True, exist_ok=True)
    with frozen(net), frozen(dense(net)) as quick:
        # Attacks see the dense form of depthwise-separable layers: the same function, several times faster backward.
        scene = Scene.of(quick, test, task.threat, ctx.device)
        certifiers = dict(zip(kinds(config.certify), config.certify, strict=True))
        step = lambda name: _progress(ctx, f"certify: {name}")  # noqa: E731
        proved = prove(
            net, scene.x, scene.y, len(splits.classes), task.threat, certifiers, step, config.certify_seconds
        )
        strength = evidence.strength(config.attacks)
        named = lambda label: _progress(ctx, f"{label} ({strength})")  # noqa: E731
        striker = Striker(scene, proved, splits.train, ctx.scratch, ctx.seed, named)
        if config.early is None or config.stop_at is None:
            struck = striker.all(config.attacks, config.sequence)
        else:
            struck = striker.early(config.attacks, config.stop_at, config.early)
        points, findings = _doubt(scene, struck, proved, config, task.split_seed, ctx)
        guarded = None
        if config.detector is not None:
            sure = torch.zeros_like(scene.right) if proved.unproved is None else ~proved.unproved.any(1)
            held = splits.holdout.images
            guarded = detection.detect(config.detector, scene, struck, sure, held, _digest(files), ctx)
            findings = (*findings, *guarded.findings)
        header = evidence.Header(
            threat=task.threat.dump(),
            split="test",
            strength=strength,
            attacks={name: attack.dump() for name, attack in struck.attacks.items()},
            certifiers={name: certifier.dump() for name, certifier in proved.certifiers.items()},
            seed=ctx.seed,
            model=_digest(files),
            examples=len(test),
        )
        out = write(ctx.scratch / "out", scene, struck, proved, header, points, findings, splits.classes, config.images)
    measured, outcomes = _measure(scene, struck, proved, strength)
    if struck.early is not None:
        ctx.emit("note", {"text": _told(struck.early, scene)})
    if guarded is not None:
        out, measured, outcomes = out | guarded.files, measured + guarded.measurements, outcomes | guarded.outcomes
    for finding in findings:
        ctx.emit("note", {"text": f"{'ok' if finding.ok else 'FAILED'}: {finding.name}: {finding.text}"})
    return Result(
        files={**{name: files[name] for name in (checkpoint.ARCH, checkpoint.WEIGHTS)}, **out},
        measurements=measured,
        outcomes=outcomes,
        findings=tuple(f"{finding.name}: {finding.text}" for finding in findings if not finding.ok),
    )


def _sample(test: Split, samples: int, split_seed: int) -> Split:
    if samples >= len(test):
        return test
    present = int((test.labels.bincount() > 0).sum())
    if samples < present:
        raise InputError(f"stages.validate.samples: expected {present} (one per class) or more, got {samples}")
    return test.select(subset(test.labels, samples, generator(split_seed, "validate", "samples")))


def _doubt(
    scene: Scene, struck: Struck, proved: Proved, config: Config, split_seed: int, ctx: Context
) -> tuple[tuple[Point, ...], tuple[Finding, ...]]:
    """The curve over eps, and every reason to disbelieve or to believe the numbers."""
    order = torch.randperm(len(scene.x), generator=generator(split_seed, "validate", "validity"))
    rows = order[: config.validity_samples].sort().values.to(scene.x.device)
    x, y, seed = scene.x[rows], scene.y[rows], derive(ctx.seed, "validity")
    points = validity.curve(
        scene.net,
        x,
        y,
        scene.threat,
        config.curve,
        seed,
        _progress(ctx, f"curve ({evidence.strength([validity.PROBE])})"),
    )
    found = validity.checks(
        scene.net,
        x,
        y,
        scene.threat,
        seed,
        points,
        _pair(struck),
        _progress(ctx, "validity"),
    )
    return points, (*found, _rechecked(scene, struck), *_sound(scene, struck, proved), *proved.findings)


def _pair(struck: Struck) -> tuple[Tensor, Tensor] | None:
    """What survived all gradient attacks and all black-box ones, of the images that all of them tried."""
    groups: dict[bool, list[Tensor]] = {True: [], False: []}
    for name, attack in struck.attacks.items():
        groups[attack.needs_gradients].append(struck.hits[name].survived)
    tried = torch.stack([hit.tried for hit in struck.hits.values()]).all(0)
    if (
        not all(groups.values())
        or not bool(tried.any())
        or any(bool((hit.tried != tried).any()) for hit in struck.hits.values())
    ):
        return None
    return torch.stack(groups[True]).all(0)[tried], torch.stack(groups[False]).all(0)[tried]


def _rechecked(scene: Scene, struck: Struck) -> Finding:
    broken = torch.tensor([name is not None for name in struck.stored], device=scene.x.device).nonzero().flatten()
    total = len(broken)
    held = 0
    if total:
        again = evidence.recheck(scene.net, scene.x[broken], struck.x_adv[broken], scene.y[broken], scene.threat)
        held = int(again.holds.sum())
    text = f"{held} of {total} adversarial inputs are in ball and range and misread when checked again; must be all"
    return Finding("rechecked", held == total, text)


def _sound(scene: Scene, struck: Struck, proved: Proved) -> Iterator[Finding]:
    for name, certified in proved.certified(scene.right).items():
        broken = int((certified & ~struck.alive).sum())
        text = f"{broken} of {int(certified.sum())} examples that {name} proved were broken by an attack; must be none"
        yield Finding(f"sound_{name}", broken == 0, text)


def _measure(
    scene: Scene, struck: Struck, proved: Proved, strength: Strength
) -> tuple[tuple[Measurement, ...], dict[str, Outcomes]]:
    hits = {"accuracy.clean.test": scene.right}
    if struck.early is None:
        hits[ROBUST] = struck.alive
        hits |= {f"accuracy.robust.{name}.test": hit.survived for name, hit in struck.hits.items()}
    if proved.leads:
        hits[CERTIFIED] = torch.stack(list(proved.certified(scene.right).values())).any(0)
    measured: list[Measurement] = []
    outcomes: dict[str, Outcomes] = {}
    for name, right in hits.items():
        measurement, bits = accuracy(name, right.cpu(), scene.indices, strength)
        measured.append(measurement)
        outcomes |= bits
    if struck.early is not None:
        measurement, bits = _estimate(struck.early, struck.alive, scene.indices, strength)
        measured.append(measurement)
        outcomes |= bits
    return tuple(measured), outcomes


def _estimate(
    told: Early, alive: Tensor, indices: Tensor, strength: Strength
) -> tuple[Measurement, dict[str, Outcomes]]:
    """What an early verdict says of all images; `samples` and the bits are those with a verdict of their own."""
    judged = ~told.open.cpu()
    count = int(judged.sum())
    value, low, high = told.interval()
    measurement = Measurement(
        name=ROBUST,
        value=value,
        low=low,
        high=high,
        unit="fraction",
        samples=max(count, 1),
        better="higher",
        under=strength,
    )
    bits = {ROBUST: Outcomes.of(indices[judged].tolist(), alive.cpu()[judged].tolist())} if count else {}
    return measurement, bits


def _told(told: Early, scene: Scene) -> str:
    """The early verdict in a sentence."""
    count = int(told.open.sum())
    return (
        f"the gate's verdict on {ROBUST} is certain with {count} of {len(scene.x)} images open: all attacks on all of "
        f"them would leave {told.low} to {told.high}"
    )


def _digest(files: Files) -> str:
    state = hashlib.sha256(files[checkpoint.ARCH].read_bytes())
    state.update(files[checkpoint.WEIGHTS].read_bytes())
    return state.hexdigest()


def _progress(ctx: Context, label: str) -> OnStep:
    return lambda done, total: ctx.emit("progress", {"label": label, "done": done, "total": total})
