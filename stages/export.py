"""STAGE 5: to ONNX, lowered for the target, and measured again on the file that ships.

Files in: `arch.json`, `weights.safetensors`, `evidence.jsonl`, `adversarial.safetensors`, figures. Files out: whatever
goes into the bundle under `bundle/`, and validate's figures. `bundle/model.onnx` is the float32 graph; a lowered
precision lies beside it (`bundle/model.int8.onnx`), and the contract names the one that runs.

What is measured, all of it on the lowered file in onnxruntime: parity with torch, accuracy, and robust accuracy as the
worst, per image, of the adversarial examples that broke the float network, a gradient attack through the file's torch
twin and a black-box attack on its outputs; size; and speed and memory where this machine is the kind that will run it.

Where validate fitted a detector it becomes part of the graph (`targets/lowering/attach.py`), and is attacked again
around the lowered network: validate's inputs are replayed, then its adaptive attack goes through the file. Speed, size
and memory are those of network and detector together.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, field_validator

from pipeline.core.gate import Budget
from pipeline.core.measurement import exact
from pipeline.core.stage import Context, Files, Result
from stages import detection, evidence, packing, remeasure
from stages.attachment import TABLE, Attachment
from stages.attacks.base import FOLDER as ATTACKS
from stages.attacks.base import QUICK, AttackSet
from stages.bounds.base import AnyCertifier
from stages.certify_file import CERTIFIED, FLOAT, GAP, Certified, beside, certify_file
from stages.detectors.base import FOLDER as DETECTORS
from stages.evaluate import OnStep, correct, frozen
from stages.lowering import calibration, check_export, lower
from stages.method import Value
from stages.nn import _atomic, checkpoint
from stages.nn.fold import dense, fold
from stages.nn.imported import imported
from stages.nn.to_onnx import export
from stages.oracle import Logits
from stages.scene import json_bytes
from stages.shipped import Shipped
from stages.task import Splits, Task
from stages.threat import Threat
from stages.tuning import sample
from targets.lowering.apply import check_passes, passes_for
from targets.runtime.ort import OrtEngine

LIBRARIES = ("torch", "numpy", "onnx", "onnxscript", "onnxruntime", "safetensors")
# Named in evidence.jsonl and detector.json, which are inputs and no config.
READS = (ATTACKS, DETECTORS)

PassSpec = str | dict[str, Any]
FIGURES = "figures.json"
_FLOAT32 = "fp32"
CASCADE = ("quantised", {"kind": "quantised", "inner": "crown"})
CERTIFY_SECONDS = 300.0  # for each file
_FIGURES = (FIGURES, "images/")
WITH_DETECTOR = detection.names("shipped.test")


class Config(Value):
    """`precision` is one of `precisions`, which the target's page maps to passes; the rest says how to measure.

    `machine` is the device's kind of processor where it is not this machine: then speed is owed and not measured here.
    `attacks` go through the file (gradients through its torch twin), on the test images together with those of validate
    that are not among them, so that file and float network stand up to the same. `certify` proves the file itself, on
    the same images; "quantised" covers int8, and is what a limit on `accuracy.certified.shipped.test` brings in, round
    CROWN-IBP and then round CROWN, with 300 seconds a file. Of a lowered file the float32 graph beside it is certified
    too, and the gap is told; each ends after `certify_seconds`, if given. For TensorRT the proof is of the graph as
    onnxruntime runs it, not of the engine that the device builds.
    `calibration` images, half of them attacked, fix the ranges of int8. `holdout_samples` bounds the images on which
    attempts are judged.
    """

    precision: str = "fp32"
    precisions: dict[str, tuple[PassSpec, ...]] = {"fp32": ()}
    runtime: Literal["onnxruntime", "tensorrt"] = "onnxruntime"
    provider: str | None = None
    machine: str | None = None
    exporter: Literal["dynamo", "legacy"] = "dynamo"
    attacks: AttackSet = Field(default=QUICK, min_length=1, validate_default=True)
    certify: tuple[AnyCertifier, ...] = ()
    certify_seconds: float | None = Field(default=None, gt=0)
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
    """The names in `WITH_DETECTOR` are measured only where validate fitted one; a limit on them refuses where not.

    Raises `InputError` for a precision that is not on offer, or an attack without a version for the task's norm."""
    threat = Task.load(task).threat
    for attack in config.attacks:
        attack.accept(threat)
    passes_for(config.precisions, config.precision)
    names = {f"accuracy.{what}.shipped.{part}" for what in ("clean", "robust") for part in ("holdout", "test")}
    names |= {"parity.logits", "parity.top1", "size.model", "size.bundle"}
    names |= {"memory.peak"} if config.runtime == "onnxruntime" else set()
    names |= {"latency.p50", "latency.p95"} if config.measures_speed else set()
    if config.certify:
        names |= {CERTIFIED} if config.precision == _FLOAT32 else {CERTIFIED, FLOAT, GAP}
    return frozenset(names | WITH_DETECTOR)


def obeying(table: Mapping[str, Any], limits: Budget) -> Mapping[str, Any]:
    """A limit on the file's certified accuracy asks for certifiers that cover int8 too, and for a time, unless others
    are named."""
    if "certify" in table or all(limit.metric != CERTIFIED for limit in limits):
        return table
    return {"certify": CASCADE, "certify_seconds": CERTIFY_SECONDS, **table}


def run(files: Files, config: Config, ctx: Context) -> Result:
    task = Task.load(ctx.task)
    threat, splits = task.threat, task.open(ctx.data_root)
    model = checkpoint.load(files["arch.json"], files["weights.safetensors"])
    net = dense(fold(model.net))  # the same function, and faster to attack
    with frozen(net):
        ctx.emit("progress", {"label": "export to ONNX", "done": 0, "total": 4})
        export(model.net, splits.input_shape, ctx.scratch / "model.onnx", exporter=config.exporter)
        plain = (ctx.scratch / "model.onnx").read_bytes()
        check_export(net, plain, splits)
        ctx.emit("progress", {"label": f"lower to {config.precision}", "done": 1, "total": 4})
        images = calibration(net, splits, threat, config.calibration, ctx.seed)
        attached = _attachment(files, splits, config, ctx)
        lowered = lower(plain, config.precisions, config.precision, images, ctx.scratch, _noting(ctx), attached)
        twin = imported(lowered.network)
        shipped = Shipped(OrtEngine(lowered.network, config.threads), twin)
        ctx.emit("progress", {"label": "attack the file", "done": 2, "total": 4})
        held = sample(splits.holdout, config.holdout_samples)
        with_held = remeasure.on_holdout(shipped, net, held, config.attacks, threat, ctx.seed, ctx.emit)
        with_test, findings = remeasure.on_test(
            shipped, config.precision, splits.test, files, config.attacks, threat, ctx.seed, ctx.emit
        )
        guarded = None
        if attached is not None:
            engine = OrtEngine(lowered.model, config.threads)
            guarded = detection.detect_on_file(
                attached,
                lowered.network,
                shipped,
                engine,
                with_test.split,
                with_test.x_adv,
                with_test.alive,
                threat,
                ctx,
            )
            findings = (*findings, *(f"{found.name}: {found.text}" for found in guarded.findings if not found.ok))
        certified = None
        if config.certify:
            certified = _certified(plain, lowered.network, shipped, with_test, files, threat, config, ctx)
            findings = (*findings, *certified.findings)
            for note in certified.notes:
                ctx.emit("note", {"text": note})
        parity = remeasure.parity(net, shipped, splits.holdout, config.holdout_samples)
    ctx.emit("progress", {"label": "measure speed and size", "done": 3, "total": 4})
    strength = evidence.strength(with_test.attacks)
    contract = packing.contract(
        splits,
        threat,
        config.precision,
        config.runtime,
        config.provider,
        config.machine,
        strength,
        None if attached is None else attached.contract(lowered.network),
    )
    if certified is not None:
        contract["certified"] = certified.contract
    bundle = packing.write(ctx.scratch / "bundle", plain, lowered, contract, splits)
    runs = bundle[contract["model"]]
    sizes = (
        exact("size.model", runs.stat().st_size, "bytes"),
        exact("size.bundle", sum(path.stat().st_size for path in bundle.values()), "bytes"),
    )
    speed = (
        remeasure.speed(runs, splits.input_shape, config.runs, config.threads, config.measures_speed)
        if config.runtime == "onnxruntime"
        else ()
    )
    ctx.emit("progress", {"label": "measure speed and size", "done": 4, "total": 4})
    measured = (*with_held.measurements, *with_test.measurements)
    outcomes = with_held.outcomes | with_test.outcomes
    if guarded is not None:
        measured, outcomes = measured + guarded.measurements, outcomes | guarded.outcomes
    if certified is not None:
        measured, outcomes = measured + certified.measurements, outcomes | certified.outcomes
    kept = {name: path for name, path in files.items() if name.startswith(_FIGURES)}
    if certified is not None and FIGURES in kept:
        kept[FIGURES] = _with_bars(kept[FIGURES], certified, ctx.scratch / FIGURES)
    return Result(
        files={**kept, **{f"bundle/{name}": path for name, path in bundle.items()}},
        measurements=(*measured, *parity, *sizes, *speed),
        outcomes=outcomes,
        findings=findings,
    )


def _certified(
    plain: bytes,
    network: bytes,
    shipped: Shipped,
    struck: remeasure.Struck,
    files: Files,
    threat: Threat,
    config: Config,
    ctx: Context,
) -> Certified:
    """Of the file that runs and, where that is a lowered one, of the float32 graph beside it."""
    name = packing.model_name(config.precision)
    step = _counting(ctx, f"certify {name}")
    split = struck.split
    asked, clock = config.certify, config.certify_seconds
    twin = imported(network).eval()
    found = certify_file(network, twin, shipped, split, struck.alive, threat, asked, step, name, seconds=clock)
    if config.precision == _FLOAT32:
        return found
    twin = imported(plain).eval()
    graph = Shipped(OrtEngine(plain, config.threads), twin)
    # What broke the float32 network, and what broke the lowered file, put to the float32 file.
    points = (remeasure.replayed(files, split, threat), struck.x_adv)
    alive = torch.stack([correct(graph, x_adv, split.labels) for x_adv in points]).all(0)
    step = _counting(ctx, "certify model.onnx")
    other = certify_file(plain, twin, graph, split, alive, threat, asked, step, "model.onnx", FLOAT, clock)
    return beside(found, other)


def _with_bars(figures: Path, certified: Certified, out: Path) -> Path:
    """Validate's figures and one bar more for each file that was certified."""
    found = json.loads(figures.read_bytes())
    found["verdicts"] = [*found.get("verdicts", []), *certified.shares]
    _atomic.write(out, json_bytes(found))
    return out


def _attachment(files: Files, splits: Splits, config: Config, ctx: Context) -> Attachment | None:
    if TABLE not in files:
        return None

    def logits(network: bytes) -> Logits:
        engine = OrtEngine(network, config.threads)
        return lambda x: torch.from_numpy(engine(x.numpy()))

    return Attachment(files, splits.holdout.floats(), len(splits.classes), logits, _noting(ctx))


def _counting(ctx: Context, label: str) -> OnStep:
    return lambda done, total: ctx.emit("progress", {"label": label, "done": done, "total": total})


def _noting(ctx: Context) -> Callable[[str], None]:
    return lambda text: ctx.emit("note", {"text": text})
