"""`finish BUNDLE`, on the device: build the engine, compare with the probe, measure, settle the limits owed.

It writes `device.json` beside the manifest (and `device.engine` where TensorRT built one). Neither is in the manifest's
list, which was closed when the bundle was made; `device.json` names the manifest's digest and the engine's instead.

A limit is settled only by the device it is meant for: another kind of machine than the manifest's `machine`, or another
runtime than its `runtime`, is measured and shown, but the limit stays owed. `--runtime onnxruntime` says that
onnxruntime is what will run here, and its numbers count.

Exit status: 0 all settled, 1 a limit failed or is still owed or the probe disagrees, 2 the bundle cannot be used.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from targets.runtime import latency, trt, trt_build
from targets.runtime.bundle import DEVICE, ENGINE, Bundle, open_manifest, verify_files
from targets.runtime.errors import BundleError
from targets.runtime.form import SCHEMA
from targets.runtime.predictor import Predictor, on_onnxruntime

# Share of the probe inputs whose class must be the recorded one, whatever computes the engine's sums.
LEAST_AGREEMENT = 0.98


@dataclass(frozen=True)
class Row:
    """One measured number, in the form of the manifest's measurements."""

    name: str
    value: float
    low: float
    high: float
    unit: str
    samples: int
    better: str


def run(args: argparse.Namespace) -> int:
    bundle = open_manifest(args.bundle)
    files = verify_files(bundle)
    say = sys.stdout.write
    say(f"{bundle.name} for {bundle.target}: {files} files as recorded\n")
    wanted = bundle.runtime if args.runtime == "auto" else args.runtime
    used, why = _available(wanted, args.runtime)
    if used == "tensorrt":
        engine, rows, failures, provider = _with_tensorrt(bundle, args.runs, args.warmup)
    else:
        engine = None
        rows, failures, provider = _with_onnxruntime(bundle, args.runs, args.warmup, args.threads)
    foreign = _foreign(bundle, why)
    verdict = [settle(limit, rows, foreign) for limit in bundle.owed]
    report = {
        "schema_version": SCHEMA,
        "bundle": bundle.digest,
        "device": {"machine": platform.machine(), "system": platform.platform(), "provider": provider},
        "measurements": [vars(row) for row in rows],
        "failures": failures,
        "verdict": verdict,
        "engine": engine,
    }
    write_json(bundle.folder / DEVICE, report)
    say(table(rows, verdict, failures, f"{provider} on {platform.machine()}"))
    return 0 if not failures and all(v["ok"] is True for v in verdict) else 1


def settle(limit: Mapping[str, Any], rows: Sequence[Row], foreign: str | None) -> dict[str, Any]:
    """Hold a limit against what was measured: the high end for at_most, the low end for at_least (as the gate does).

    `ok` is True or False where the limit is settled, None where it stays owed because this is not its device
    (`foreign` says why). A metric that was not measured here fails.
    """
    metric = limit["metric"]
    row = next((r for r in rows if r.name == metric), None)
    answer = {"metric": metric, "at_least": limit.get("at_least"), "at_most": limit.get("at_most")}
    if row is None:
        return {**answer, "ok": False, "text": f"{metric} is not measured on a device"}
    parts, ok = [], True
    if limit.get("at_most") is not None:
        ok = ok and row.high <= limit["at_most"]
        parts.append(f"{_show(row.high, row.unit)} must be <= {_show(limit['at_most'], row.unit)}")
    if limit.get("at_least") is not None:
        ok = ok and row.low >= limit["at_least"]
        parts.append(f"{_show(row.low, row.unit)} must be >= {_show(limit['at_least'], row.unit)}")
    if foreign is not None:
        return {**answer, "ok": None, "text": f"still owed: {foreign}; here {' and '.join(parts)}"}
    return {**answer, "ok": ok, "text": f"{metric} {' and '.join(parts)}"}


def write_json(path: Path, data: object) -> None:
    """Atomically: temporary file beside it, fsync, rename. Raises `BundleError` where the folder cannot be written."""
    write_bytes(path, (json.dumps(data, indent=1, sort_keys=True, allow_nan=False) + "\n").encode())


def write_bytes(path: Path, data: bytes) -> None:
    """As `write_json`, for bytes."""
    # A fixed name: killed half-way, it is overwritten by the next run and known to `verify_files`.
    half = path.with_name(f"{path.name}.tmp")
    try:
        with half.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        half.replace(path)
    except OSError as error:
        raise BundleError(f"{path}: cannot be written: {error.strerror}; `finish` needs a writable bundle") from error


def table(rows: Sequence[Row], verdict: Sequence[Mapping[str, Any]], failures: Sequence[str], where: str) -> str:
    lines = [f"measured with {where}"]
    for row in rows:
        interval = "" if row.low == row.high else f"  ({_show(row.low, row.unit)} .. {_show(row.high, row.unit)})"
        lines.append(f"  {row.name:<14}{_show(row.value, row.unit):>16}{interval}")
    words = {True: "kept", False: "FAILED", None: "owed"}
    lines += [f"  {words[v['ok']]:<7} {v['text']}" for v in verdict]
    lines += [f"  FAILED  {text}" for text in failures]
    return "\n".join(lines) + "\n"


def _available(wanted: str, asked: str) -> tuple[str, str | None]:
    """The runtime that can run here and, where it is not the wanted one, why. Raises where it was asked by name."""
    if wanted != "tensorrt":
        return wanted, None
    name = trt_build.installed()
    why = "TensorRT is not installed here" if name is None else None
    if why is None and not trt.driver_answers():
        why = "no CUDA driver answers here"
    if why is None:
        return "tensorrt", None
    if asked == "tensorrt":
        raise BundleError(f"{why}; run `finish` on the device, or with --runtime onnxruntime")
    return "onnxruntime", why


def _foreign(bundle: Bundle, why: str | None) -> str | None:
    machine = bundle.manifest.get("machine")
    if machine is not None and machine != platform.machine():
        return f"measured on {platform.machine()}, not on {machine}"
    return why


def _with_onnxruntime(bundle: Bundle, runs: int, warmup: int, threads: int) -> tuple[list[Row], list[str], str]:
    from targets.runtime import ort

    predictor = on_onnxruntime(bundle, threads)
    rows, failures = _parity(predictor, bundle.tolerance)
    model = bundle.folder / bundle.model
    found = latency.measure(model, bundle.shape, 1, runs, warmup, threads, predictor.provider)
    rows += _speed(found.p50, found.p95, runs)
    rows.append(_exact("memory.peak", found.peak_bytes, "bytes"))
    rows.append(_exact("size.model", model.stat().st_size, "bytes"))
    return rows, failures, f"{ort.version()} {predictor.provider}"


def _with_tensorrt(bundle: Bundle, runs: int, warmup: int) -> tuple[dict[str, Any], list[Row], list[str], str]:
    name = trt_build.installed()
    assert name is not None  # _available asked
    with tempfile.TemporaryDirectory() as scratch:
        model, made = Path(scratch) / "model.onnx", Path(scratch) / "plan"
        model.write_bytes(bundle.read(bundle.model))
        built = trt_build.build_apart(name, model, made, bundle.batches)
        plan = made.read_bytes()
    cuda = trt.Cuda()
    free, (resident, _) = cuda.free_bytes(), latency.resident()
    engine = trt.TrtEngine(
        import_module(name), plan, cuda, bundle.shape, bundle.classes, bundle.batches[2], bundle.guarded
    )
    # TensorRT picks other kernels and fuses other nodes than onnxruntime: the classes must agree, the last bits cannot.
    rows, failures = _parity(Predictor(bundle, engine.outputs, "TensorRT"), None)
    image = bundle.probe()[0][:1]
    p50, p95 = latency.percentiles(latency.time_calls(lambda: engine.outputs(image), runs, warmup))
    host, device = max(0, latency.resident()[0] - resident), max(0, free - cuda.free_bytes())
    rows += _speed(p50, p95, runs)
    rows.append(_exact("memory.peak", host + device, "bytes"))
    rows.append(_exact("size.model", len(plan), "bytes"))
    write_bytes(bundle.folder / ENGINE, plan)
    entry = trt_entry(plan, built.version)
    return entry, rows, failures, f"{name} {built.version}"


def trt_entry(plan: bytes, version: str) -> dict[str, Any]:
    """What `device.json` records of an engine."""
    import hashlib

    return {"sha256": hashlib.sha256(plan).hexdigest(), "bytes": len(plan), "version": version, "file": ENGINE}


def _parity(predictor: Predictor, tolerance: float | None) -> tuple[list[Row], list[str]]:
    inputs, expected = predictor.bundle.probe()
    logits = predictor(inputs)
    gap = float(np.abs(logits - expected).max())
    agreement = float((logits.argmax(1) == expected.argmax(1)).mean())
    failures = []
    if not np.isfinite(gap):
        return [], ["the probe outputs hold NaN or infinity"]
    if tolerance is not None and gap > tolerance * float(np.abs(expected).max()):
        allowed = tolerance * float(np.abs(expected).max())
        failures.append(f"probe outputs differ by {gap:.3g}, at most {allowed:.3g} is allowed")
    if agreement < LEAST_AGREEMENT:
        failures.append(f"{agreement:.1%} of the probe inputs keep their class, at least {LEAST_AGREEMENT:.0%} must")
    return [
        Row("parity.logits", gap, gap, gap, "logit", len(inputs), "lower"),
        Row("parity.top1", agreement, agreement, agreement, "fraction", len(inputs), "higher"),
    ], failures


def _speed(p50: latency.Figure, p95: latency.Figure, runs: int) -> list[Row]:
    return [
        Row(name, figure.value, figure.low, figure.high, "ms", runs, "lower")
        for name, figure in (("latency.p50", p50), ("latency.p95", p95))
    ]


def _exact(name: str, value: float, unit: str) -> Row:
    return Row(name, value, value, value, unit, 1, "lower")


def _show(value: float, unit: str) -> str:
    if unit == "bytes":
        return f"{int(value):,} bytes"
    return f"{value:.4g}" + (" ms" if unit == "ms" else "")
