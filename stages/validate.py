"""STAGE 4: attack and certify on the test split; write evidence."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any

import torch
from pydantic import Field
from safetensors.torch import load as tensors_of
from safetensors.torch import save as bytes_of
from torch import Tensor

from pipeline.core.measurement import Measurement
from pipeline.core.record import Outcomes
from pipeline.core.stage import Context, Files, Result
from stages import evidence, validity
from stages.attacks.base import QUICK, Attack, AttackSet
from stages.bounds.base import AnyCertifier, Certifier
from stages.data._cut import subset
from stages.data.base import Split
from stages.evaluate import OnStep, frozen
from stages.finding import Finding, Point
from stages.measure import accuracy
from stages.method import InputError, Value
from stages.nn import _atomic, checkpoint
from stages.nn.fold import dense, fold
from stages.oracle import Spent
from stages.scene import Scene, Struck, write
from stages.seeding import derive, generator
from stages.task import Task
from stages.trial import Hit, Proved, prove, spared, strike

LIBRARIES = ("torch", "numpy", "safetensors", "pydantic", "pillow")

_BATCH = 256


class Config(Value):
    """`[stages.validate]`.

    `samples` test images are drawn stratified by class, by the task's `split_seed` alone, so that every run of a task
    is measured on the same ones; all are taken where there are fewer. `attacks` all strike every image that is right
    without one, each on its own; with `sequence`, only what the ones before it left, so that the accuracy under an
    attack counts those before it too. Images that `certify`, which may be empty, proves robust are not attacked, but
    for a twentieth of them, at least 50, to test the proofs; classes proved unreachable are no targets.

    The validity checks and the curve over `curve` times eps use the first `validity_samples` of a further shuffle of
    those images; `images` of the broken ones go into the report.
    """

    samples: int = Field(default=1000, ge=2)
    attacks: AttackSet = Field(default=QUICK, min_length=1, validate_default=True)
    sequence: bool = False
    certify: tuple[AnyCertifier, ...] = Field(default=("ibp",), validate_default=True)
    validity_samples: int = Field(default=200, ge=20)
    curve: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        default=(0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0), min_length=2
    )
    images: int = Field(default=8, ge=0)


def measures(config: Config, task: Mapping[str, Any]) -> frozenset[str]:
    """Raises `InputError` for an attack that has no version for the task's norm."""
    threat = Task.load(task).threat
    for attack in config.attacks:
        attack.accept(threat)
    names = {"accuracy.clean.test", "accuracy.robust.test"}
    names |= {f"accuracy.robust.{name}.test" for name in _names(config.attacks)}
    return frozenset(names | ({"accuracy.certified.test"} if config.certify else set()))


def run(files: Files, config: Config, ctx: Context) -> Result:
    """Writes `evidence.jsonl`, `adversarial.safetensors` (x_adv, indices, survived), `figures.json` and `images/`.

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
        certifiers = dict(zip(_names(config.certify), config.certify, strict=True))
        step = lambda name: _progress(ctx, f"certify: {name}")  # noqa: E731
        proved = prove(net, scene.x, scene.y, len(splits.classes), task.threat, certifiers, step)
        struck = _strike_all(scene, proved, splits.train, config, ctx)
        points, findings = _doubt(scene, struck, proved, config, task.split_seed, ctx)
        header = evidence.Header(
            threat=task.threat.dump(),
            split="test",
            strength=evidence.STRENGTH,
            attacks={name: attack.dump() for name, attack in struck.attacks.items()},
            certifiers={name: certifier.dump() for name, certifier in proved.certifiers.items()},
            seed=ctx.seed,
            model=_digest(files),
            examples=len(test),
        )
        out = write(ctx.scratch / "out", scene, struck, proved, header, points, findings, splits.classes, config.images)
    measured, outcomes = _measure(scene, struck, proved)
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


def _names(methods: Sequence[Attack] | Sequence[Certifier]) -> tuple[str, ...]:
    """The kind of each; from the second of one kind on with its number: pgd, pgd_2."""
    found: list[str] = []
    for number, method in enumerate(methods):
        count = sum(other.kind == method.kind for other in methods[:number])
        found.append(method.kind if count == 0 else f"{method.kind}_{count + 1}")
    return tuple(found)


def _strike_all(scene: Scene, proved: Proved, train: Split, config: Config, ctx: Context) -> Struck:
    """Every attack on every image that is right and needs one; finished ones are read from the scratch folder."""
    attacks = dict(zip(_names(config.attacks), config.attacks, strict=True))
    rows = scene.right & ~spared(proved, scene.right, generator(ctx.seed, "doubt"))
    hits: dict[str, Hit] = {}
    for name, attack in attacks.items():
        attack.accept(scene.threat)
        kept = ctx.scratch / f"attack-{name}.safetensors"
        if not kept.exists():
            ready = attack.prepare(scene.net, _batches(train, ctx.device), generator(ctx.seed, "prepare", name))
            seed, label = derive(ctx.seed, "attack", name), f"attack: {name}"
            step = _progress(ctx, label)
            hit = strike(scene.net, ready, scene.x, scene.y, rows, scene.threat, seed, proved.unproved, step)
            _atomic.write(kept, _bytes(hit))
        hits[name] = _hit(kept.read_bytes(), ctx.device)
        if config.sequence:
            rows = rows & hits[name].survived
    for hit in hits.values():
        hit.survived.logical_and_(scene.right)
    x_adv, by = evidence.worst(scene.x, {name: hit.x_adv for name, hit in hits.items()}, scene.net, scene.y)
    return Struck(attacks, hits, x_adv, by)


def _bytes(hit: Hit) -> bytes:
    named = {"tried": hit.tried, "survived": hit.survived, "x_adv": hit.x_adv.contiguous()}
    named |= {"queries": hit.spent.queries, "gradients": hit.spent.gradients}
    return bytes_of({name: value.cpu() for name, value in named.items()})


def _hit(stored: bytes, device: str) -> Hit:
    named = {name: value.to(device) for name, value in tensors_of(stored).items()}
    return Hit(named["tried"], named["survived"], named["x_adv"], Spent(named["queries"], named["gradients"]))


def _batches(split: Split, device: str) -> Iterator[tuple[Tensor, Tensor]]:
    for at in range(0, len(split), _BATCH):
        rows = slice(at, at + _BATCH)
        yield split.floats(rows).to(device), split.labels[rows].to(device)


def _doubt(
    scene: Scene, struck: Struck, proved: Proved, config: Config, split_seed: int, ctx: Context
) -> tuple[tuple[Point, ...], tuple[Finding, ...]]:
    """The curve over eps, and every reason to disbelieve or to believe the numbers."""
    order = torch.randperm(len(scene.x), generator=generator(split_seed, "validate", "validity"))
    rows = order[: config.validity_samples].sort().values.to(scene.x.device)
    x, y, seed = scene.x[rows], scene.y[rows], derive(ctx.seed, "validity")
    points = validity.curve(scene.net, x, y, scene.threat, config.curve, seed, _progress(ctx, "curve"))
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
    kinds: dict[bool, list[Tensor]] = {True: [], False: []}
    for name, attack in struck.attacks.items():
        kinds[attack.needs_gradients].append(struck.hits[name].survived)
    tried = torch.stack([hit.tried for hit in struck.hits.values()]).all(0)
    if not all(kinds.values()) or any(bool((hit.tried != tried).any()) for hit in struck.hits.values()):
        return None
    return torch.stack(kinds[True]).all(0)[tried], torch.stack(kinds[False]).all(0)[tried]


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


def _measure(scene: Scene, struck: Struck, proved: Proved) -> tuple[tuple[Measurement, ...], dict[str, Outcomes]]:
    hits = {"accuracy.clean.test": scene.right, "accuracy.robust.test": struck.alive}
    hits |= {f"accuracy.robust.{name}.test": hit.survived for name, hit in struck.hits.items()}
    if proved.leads:
        hits["accuracy.certified.test"] = torch.stack(list(proved.certified(scene.right).values())).any(0)
    measured: list[Measurement] = []
    outcomes: dict[str, Outcomes] = {}
    for name, right in hits.items():
        measurement, bits = accuracy(name, right.cpu(), scene.indices)
        measured.append(measurement)
        outcomes |= bits
    return tuple(measured), outcomes


def _digest(files: Files) -> str:
    state = hashlib.sha256(files[checkpoint.ARCH].read_bytes())
    state.update(files[checkpoint.WEIGHTS].read_bytes())
    return state.hexdigest()


def _progress(ctx: Context, label: str) -> OnStep:
    return lambda done, total: ctx.emit(
        "progress", {"label": f"{label} ({evidence.STRENGTH})", "done": done, "total": total}
    )
