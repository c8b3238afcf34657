"""STAGE 5: to ONNX, lowered for the target, and measured again on the file that ships.

Files in: `arch.json`, `weights.safetensors`, `evidence.jsonl`, `adversarial.safetensors`, figures. Files out: whatever
goes into the bundle under `bundle/`, and validate's figures. `bundle/model.onnx` is the float32 graph; a lowered
precision lies beside it (`bundle/model.int8.onnx`), and the contract names the one that runs.

What is measured, all of it on the lowered file in onnxruntime: parity with torch, accuracy, and robust accuracy as the
worst, per image, of the adversarial examples that broke the float network, a gradient attack through the file's torch
twin and a black-box attack on its outputs; size; and speed and memory where this machine is the kind that will run it.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, field_validator
from safetensors.torch import load as tensors_of
from torch import Tensor

from pipeline.core.measurement import Measurement, exact
from pipeline.core.record import Outcomes
from pipeline.core.stage import Context, Emit, Files, Result
from stages import evidence
from stages.attacks.base import FOLDER as ATTACKS
from stages.attacks.base import QUICK, Attack, AttackSet
from stages.attacks.pgd import PGD
from stages.data.base import Split
from stages.evaluate import frozen, under_attack
from stages.measure import accuracy
from stages.method import InputError, Value, load
from stages.nn import checkpoint
from stages.nn.fold import dense, fold
from stages.nn.imported import imported
from stages.nn.to_onnx import export
from stages.seeding import derive, generator
from stages.shipped import Shipped, survivors
from stages.task import Splits, Task
from stages.threat import Threat
from stages.tuning import sample
from targets.lowering.apply import Lowered, apply, check_passes, passes_for, prove
from targets.lowering.parity import between, logits_of
from targets.passes.base import Kit
from targets.runtime.form import BATCHES
from targets.runtime.latency import measure
from targets.runtime.ort import OrtEngine

LIBRARIES = ("torch", "numpy", "onnx", "onnxscript", "onnxruntime", "safetensors")
# Named in evidence.jsonl, which is an input and no config.
READS = (ATTACKS,)

PassSpec = str | dict[str, Any]
_FIGURES = ("figures.json", "images/")
_PREDICT = Path(__file__).resolve().parent.parent / "targets" / "runtime" / "predict_bundle.txt"
_PROBES = 32
_BATCHES = (1, 2, 7, 64)
# Float32 sums in another order; a share of the largest logit. Beyond it the graph is not the network.
_SAME = 1e-3


class Config(Value):
    """`precision` is one of `precisions`, which the target's page maps to passes; the rest says how to measure.

    `machine` is the device's kind of processor where it is not this machine: then speed is owed and not measured here.
    `attacks` go through the file (gradients through its torch twin), on the test images together with those of validate
    that are not among them, so that file and float network stand up to the same. `calibration` images, half of them
    attacked, fix the ranges of int8. `holdout_samples` bounds the images on which attempts are judged.
    """

    precision: str = "fp32"
    precisions: dict[str, tuple[PassSpec, ...]] = {"fp32": ()}
    runtime: Literal["onnxruntime", "tensorrt"] = "onnxruntime"
    provider: str | None = None
    machine: str | None = None
    exporter: Literal["dynamo", "legacy"] = "dynamo"
    attacks: AttackSet = Field(default=QUICK, min_length=1, validate_default=True)
    calibration: int = Field(default=256, ge=8)
    holdout_samples: int = Field(default=256, ge=1)
    runs: int = Field(default=200, ge=20)
    threads: int = Field(default=1, ge=1)

    @field_validator("precisions")
    @classmethod
    def _known(cls, table: dict[str, tuple[PassSpec, ...]]) -> dict[str, tuple[PassSpec, ...]]:
        for passes in table.values():
            check_passes(passes)
        return table

    @property
    def measures_speed(self) -> bool:
        """Whether milliseconds taken here say anything about the device."""
        return self.machine is None and self.runtime == "onnxruntime"


def measures(config: Config, task: Mapping[str, Any]) -> frozenset[str]:
    """Raises `InputError` for a precision that is not on offer, or an attack without a version for the task's norm."""
    threat = Task.load(task).threat
    for attack in config.attacks:
        attack.accept(threat)
    passes_for(config.precisions, config.precision)
    names = {f"accuracy.{what}.shipped.{part}" for what in ("clean", "robust") for part in ("holdout", "test")}
    names |= {"parity.logits", "parity.top1", "size.model", "size.bundle"}
    names |= {"memory.peak"} if config.runtime == "onnxruntime" else set()
    return frozenset(names | ({"latency.p50", "latency.p95"} if config.measures_speed else set()))


def run(files: Files, config: Config, ctx: Context) -> Result:
    task = Task.load(ctx.task)
    splits = task.open(ctx.data_root)
    model = checkpoint.load(files["arch.json"], files["weights.safetensors"])
    net = dense(fold(model.net))  # the same function, and faster to attack
    with frozen(net):
        ctx.emit("progress", {"label": "export to ONNX", "done": 0, "total": 4})
        plain = ctx.scratch / "model.onnx"
        export(model.net, splits.input_shape, plain, exporter=config.exporter)
        _check_export(net, plain.read_bytes(), splits)
        ctx.emit("progress", {"label": f"lower to {config.precision}", "done": 1, "total": 4})
        lowered = _lower(plain.read_bytes(), config, _calibration(net, splits, task.threat, config, ctx), ctx)
        shipped = Shipped(OrtEngine(lowered.model, config.threads), imported(lowered.model))
        ctx.emit("progress", {"label": "attack the file", "done": 2, "total": 4})
        measured, outcomes, findings = _attacked(shipped, net, splits, task.threat, files, config, ctx)
        parity = _parity(net, shipped, splits.holdout, config)
    ctx.emit("progress", {"label": "measure speed and size", "done": 3, "total": 4})
    bundle = _write(lowered, plain, splits, task.threat, config, ctx.scratch / "bundle")
    runs = ctx.scratch / "bundle" / _model_name(config.precision)
    size = exact("size.bundle", sum(path.stat().st_size for path in bundle.values()), "bytes")
    speed = _speed(runs, splits.input_shape, config)
    ctx.emit("progress", {"label": "measure speed and size", "done": 4, "total": 4})
    kept = {name: path for name, path in files.items() if name.startswith(_FIGURES)}
    return Result(
        files={**kept, **{f"bundle/{name}": path for name, path in bundle.items()}},
        measurements=(*measured, *parity, exact("size.model", runs.stat().st_size, "bytes"), size, *speed),
        outcomes=outcomes,
        findings=findings,
    )


def _check_export(net: torch.nn.Module, model: bytes, splits: Splits) -> None:
    """The float32 file agrees with torch at batch 1, 2, odd and maximum. Raises `InputError` where it does not."""
    x = splits.train.floats(slice(0, max(_BATCHES)))
    engine = OrtEngine(model)
    with torch.no_grad():
        expected = net(x).numpy()
    for batch in _BATCHES:
        gap = float(np.abs(engine(x[:batch].numpy()) - expected[:batch]).max())
        if not gap <= _SAME * max(1.0, float(np.abs(expected).max())):
            raise InputError(f'the exported graph is {gap:.3g} off at batch {batch}; try exporter = "legacy"')


def _calibration(net: torch.nn.Module, splits: Splits, threat: Threat, config: Config, ctx: Context) -> Tensor:
    """Training images, every second one attacked: what the int8 ranges must hold.

    Every one of those is perturbed, also where the attack does not succeed: a robust network meets such inputs too.
    """
    order = torch.randperm(len(splits.train), generator=generator(ctx.seed, "calibration"))
    rows = order[: config.calibration]
    x, attack = splits.train.floats(rows), PGD(steps=10, loss="margin")
    for at in range(1, len(x), 512):
        part = slice(at, at + 512, 2)
        rng = generator(ctx.seed, "calibration", at)
        x[part] = threat.project(attack.perturb(net, x[part], splits.train.labels[rows[part]], threat, rng), x[part])
    return x


def _lower(model: bytes, config: Config, calibration: Tensor, ctx: Context) -> Lowered:
    kit = Kit(calibration.numpy(), ctx.scratch, note=lambda text: ctx.emit("note", {"text": text}))
    if any("tensorrt_check" in map(_pass_name, passes) for passes in config.precisions.values()):
        # NVIDIA's parser must take every precision on offer, whichever is chosen.
        return prove(model, config.precisions, kit)[config.precision]
    return apply(model, passes_for(config.precisions, config.precision), kit)


def _pass_name(spec: PassSpec) -> str:
    return spec if isinstance(spec, str) else str(spec["pass"])


def _attacked(
    shipped: Shipped,
    net: torch.nn.Module,
    splits: Splits,
    threat: Threat,
    files: Files,
    config: Config,
    ctx: Context,
) -> tuple[tuple[Measurement, ...], dict[str, Outcomes], tuple[str, ...]]:
    held = sample(splits.holdout, config.holdout_samples)
    _, held_replay = under_attack(
        net, PGD(steps=20, loss="margin"), held.images, held.labels, threat, derive(ctx.seed, "replay")
    )
    stored = tensors_of(files["adversarial.safetensors"].read_bytes())
    test = splits.test.select(_positions(splits.test.indices, stored["indices"]))
    measured: list[Measurement] = []
    outcomes: dict[str, Outcomes] = {}
    told = evidence.read(files["evidence.jsonl"])
    both = same_attacks(config.attacks, told)
    for part, split, replay, attacks in (
        ("holdout", held, held_replay, config.attacks),
        ("test", test, stored["x_adv"], both),
    ):
        clean, alive = survivors(
            shipped,
            attacks,
            split.images,
            split.labels,
            replay,
            threat,
            derive(ctx.seed, part),
            _progress(ctx.emit, part),
        )
        for what, hits in (("clean", clean), ("robust", alive)):
            measurement, bits = accuracy(f"accuracy.{what}.shipped.{part}", hits, split.indices)
            measured.append(measurement)
            outcomes |= bits
        if part == "test":
            findings = _suspicious(alive, stored.get("survived"), config.precision)
            proved = {e.index for e in told.examples if any(e.certified.values())}
            fooled = sum(index in proved for index in split.indices[~alive].tolist())
            if fooled:
                text = f"{fooled} of {len(proved)} images proved for the float network are broken on the file"
                findings = (*findings, text) if config.precision == "fp32" else findings
                ctx.emit("note", {"text": text})
    return tuple(measured), outcomes, findings


def same_attacks(attacks: Sequence[Attack], told: evidence.Evidence) -> tuple[Attack, ...]:
    """`attacks`, and those that struck the float network and are not among them.

    A file that met weaker attacks than its float network survives more of them without hiding anything.
    """
    struck: list[Attack] = [
        load(ATTACKS, Attack, settings)  # type: ignore[type-abstract]
        for settings in told.header.attacks.values()
    ]
    return (*attacks, *(attack for attack in struck if attack not in attacks))


def _suspicious(alive: Tensor, float_alive: Tensor | None, precision: str) -> tuple[str, ...]:
    """Rounding does not make a network robust: a file significantly more robust than the float network hides gradients.

    Exact one-sided McNemar test on the same images and under the same attacks, at 1 %.
    """
    if float_alive is None:
        return ()
    gained = int((alive & ~float_alive.bool()).sum())
    lost = int((~alive & float_alive.bool()).sum())
    p = sum(math.comb(gained + lost, k) for k in range(gained, gained + lost + 1)) / 2 ** (gained + lost)
    if gained + lost == 0 or p >= 0.01:
        return ()
    return (
        f"the {precision} file withstood {gained} attacks that broke the float network and lost {lost} "
        f"(p = {p:.2g}): its gradients are masked, and its robust accuracy is not to be believed",
    )


def _progress(emit: Emit, part: str) -> Any:
    return lambda done, total: emit("progress", {"label": f"attack the file ({part})", "done": done, "total": total})


def _positions(indices: Tensor, wanted: Tensor) -> Tensor:
    """Rows of the split that hold the wanted indices, in the wanted order."""
    order = indices.argsort()
    return order[torch.searchsorted(indices[order], wanted)]


def _parity(net: torch.nn.Module, shipped: Shipped, split: Split, config: Config) -> tuple[Measurement, ...]:
    """The file against the float network on hold-out images."""
    x = split.floats(slice(0, config.holdout_samples))
    with torch.no_grad():
        before = np.concatenate([net(x[at : at + 256]).numpy() for at in range(0, len(x), 256)])
    after = shipped.engine(x.numpy())
    gap = between(before, after).gap
    same = torch.from_numpy(before.argmax(1) == after.argmax(1))
    top1, _ = accuracy("parity.top1", same, split.indices[: len(same)])
    return exact("parity.logits", gap, "logit"), top1


def _speed(model: Path, shape: Sequence[int], config: Config) -> tuple[Measurement, ...]:
    if config.runtime != "onnxruntime":
        return ()
    found = measure(model, shape, runs=config.runs, threads=config.threads)
    numbers = [exact("memory.peak", found.peak_bytes, "bytes")]
    if config.measures_speed:
        for name, figure in (("latency.p50", found.p50), ("latency.p95", found.p95)):
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


def _write(
    lowered: Lowered, plain: Path, splits: Splits, threat: Threat, config: Config, folder: Path
) -> dict[str, Path]:
    """The files of the bundle, by their name there."""
    folder.mkdir(parents=True, exist_ok=True)
    name = _model_name(config.precision)
    made: dict[str, bytes] = {"model.onnx": plain.read_bytes(), name: lowered.model}
    made |= {name.removesuffix(".onnx") + suffix: data for suffix, data in lowered.extras.items()}
    probe = splits.train.floats(slice(0, _PROBES)).numpy()
    made["predict.py"] = _PREDICT.read_bytes()
    made["contract.json"] = json.dumps(_contract(splits, threat, config), sort_keys=True, indent=1).encode()
    for file, data in made.items():
        (folder / file).write_bytes(data)
    np.savez(folder / "probe.npz", inputs=probe, logits=logits_of(lowered.model, probe))
    return {path.name: path for path in sorted(folder.iterdir())}


def _contract(splits: Splits, threat: Threat, config: Config) -> dict[str, Any]:
    """What a reader of the bundle must know before the first image; the engine adds digests and numbers."""
    found = {
        "model": _model_name(config.precision),
        "precision": config.precision,
        "runtime": config.runtime,
        "provider": config.provider,
        "machine": config.machine,
        # How `finish` builds the engine on the device; the precision is in the graph.
        "recipe": {"strongly_typed": True, "batches": list(BATCHES)} if config.runtime == "tensorrt" else None,
        "input": {
            "name": "input",
            "shape": list(splits.input_shape),
            "dtype": "float32",
            "layout": "NCHW",
            "range": [0, 1],
        },
        "output": {"name": "logits", "classes": len(splits.classes)},
        "labels": list(splits.classes),
        "threat": {"norm": threat.norm, "eps": threat.eps},
        "attacks": evidence.STRENGTH,
    }
    return {key: value for key, value in found.items() if value is not None}


def _model_name(precision: str) -> str:
    """`model.onnx` for float32; `model.int8.onnx` for any int8."""
    return "model.onnx" if precision == "fp32" else f"model.{precision.partition('_')[0]}.onnx"
