"""The form of `manifest.json`: every field there, of its type, within its range. `bundle.py` documents the fields."""

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from targets.runtime.errors import BundleError, TamperedError

SCHEMA = 1
MANIFEST = "manifest.json"
# The manifest's own digest, as `sha256sum --check` reads it: no file can hold its own.
SEAL = "manifest.sha256"
# Smallest, favoured and largest batch of an engine's one optimisation profile.
BATCHES = (1, 1, 64)
# Largest |logit - expected| on the probe inputs, as a share of the largest expected |logit|. Float32 kernels differ in
# the order of their sums. A rounding that falls the other way in int8 moves one step of 1/255 in one activation.
TOLERANCE = {"fp32": 1e-4, "fp16": 1e-2, "int8": 5e-2}


def seal(manifest: bytes) -> bytes:
    """What `manifest.sha256` holds beside these bytes."""
    return f"{hashlib.sha256(manifest).hexdigest()}  {MANIFEST}\n".encode()


def check_form(manifest: Mapping[str, Any], where: Path) -> None:
    """Raises `BundleError` naming the field, what was expected and what came."""
    version = manifest.get("schema_version")
    if type(version) is int and version > SCHEMA:
        raise BundleError(f"{where}: schema {version} is newer than this runtime reads ({SCHEMA}); update it")
    if type(version) is not int or version != SCHEMA:
        raise BundleError(f"{where}: expected schema_version {SCHEMA}, got {version!r}")
    for key in ("name", "target", "model", "precision", "runtime"):
        _field(manifest, key, str, where)
    if manifest["precision"] not in TOLERANCE and not manifest["precision"].startswith("int8"):
        raise BundleError(f"{where}: precision: expected fp32, fp16 or int8, got {manifest['precision']!r}")
    if manifest["runtime"] not in ("onnxruntime", "tensorrt"):
        raise BundleError(f"{where}: runtime: expected onnxruntime or tensorrt, got {manifest['runtime']!r}")
    for key in ("provider", "machine"):
        if key in manifest:
            _field(manifest, key, str, where)
    _network(manifest, where)
    _recipe(manifest, where)
    _rows(manifest, where)
    _files(manifest, where)


def check_device(device: Mapping[str, Any], where: Path) -> None:
    """What the runtime reads of a `device.json`; raises `BundleError` naming the field."""
    for row in _field(device, "verdict", list, where):
        if not isinstance(row, dict) or not isinstance(row.get("metric"), str):
            raise BundleError(f"{where}: verdict: expected a metric and whether it is kept, got {row!r}")
    engine = device.get("engine")
    known = isinstance(engine, dict) and isinstance(engine.get("sha256"), str) and type(engine.get("bytes")) is int
    if engine is not None and not known:
        raise BundleError(f"{where}: engine: expected sha256 and bytes, or nothing, got {engine!r}")


def _network(manifest: Mapping[str, Any], where: Path) -> None:
    given = _field(manifest, "input", dict, where)
    shape = _field(given, "shape", list, where)
    if len(shape) != 3 or not all(type(n) is int and n > 0 for n in shape):
        raise BundleError(f"{where}: input.shape: expected three positive whole numbers [C, H, W], got {shape!r}")
    for key, expected in (("name", "input"), ("dtype", "float32"), ("layout", "NCHW"), ("range", [0, 1])):
        if given.get(key) != expected:
            raise BundleError(f"{where}: input.{key}: expected {expected!r}, got {given.get(key)!r}")
    output = _field(manifest, "output", dict, where)
    classes = _field(output, "classes", int, where)
    if output.get("name") != "logits" or classes < 2:
        raise BundleError(f'{where}: output: expected name "logits" and at least 2 classes, got {output!r}')
    if "detector" in manifest:
        detector = _field(manifest, "detector", dict, where)
        if detector.get("outputs") != ["score", "flag"] or not _number(detector.get("threshold")):
            raise BundleError(
                f'{where}: detector: expected outputs ["score", "flag"] and a finite threshold, got {detector!r:.200}'
            )
    labels = _field(manifest, "labels", list, where)
    if len(labels) != classes or not all(isinstance(label, str) for label in labels):
        raise BundleError(f"{where}: labels: expected {classes} names, got {labels!r}")


def _recipe(manifest: Mapping[str, Any], where: Path) -> None:
    if "recipe" in manifest:
        batches = _field(_field(manifest, "recipe", dict, where), "batches", list, where)
        whole = len(batches) == 3 and all(type(n) is int and n > 0 for n in batches)
        if not whole or batches != sorted(batches):
            raise BundleError(
                f"{where}: recipe.batches: expected smallest, favoured and largest batch, got {batches!r}"
            )


def _rows(manifest: Mapping[str, Any], where: Path) -> None:
    threat = _field(manifest, "threat", dict, where)
    if not _number(threat.get("eps")) or not isinstance(threat.get("norm"), str):
        raise BundleError(f"{where}: threat: expected a norm and a finite eps, got {threat!r}")
    for row in _field(manifest, "measurements", list, where):
        if not isinstance(row, dict) or not isinstance(row.get("name"), str) or not _number(row.get("value")):
            raise BundleError(f"{where}: measurements: expected a name and a finite value, got {row!r}")
    for row in _field(manifest, "owed", list, where):
        bounds = [row.get(key) for key in ("at_least", "at_most")] if isinstance(row, dict) else []
        given = [bound for bound in bounds if bound is not None]
        if not given or not all(map(_number, given)) or not isinstance(row.get("metric"), str):
            raise BundleError(f"{where}: owed: expected a metric and at_least or at_most, got {row!r}")


def _files(manifest: Mapping[str, Any], where: Path) -> None:
    files = _field(manifest, "files", dict, where)
    for name, entry in files.items():
        parts = PurePosixPath(name).parts
        drive = len(name) > 1 and name[1] == ":"
        outside = not parts or name.startswith("/") or ".." in parts or drive
        if outside or "\\" in name or "\0" in name or name == MANIFEST:
            raise TamperedError(f"{where}: files[{name!r}]: expected a path inside the bundle")
        known = isinstance(entry, dict) and isinstance(entry.get("sha256"), str) and type(entry.get("bytes")) is int
        if not known:
            raise BundleError(f"{where}: files[{name!r}]: expected sha256 and bytes, got {entry!r}")
    if manifest["model"] not in files:
        raise BundleError(f"{where}: model {manifest['model']!r} is not among the files")


def _field(table: Mapping[str, Any], key: str, kind: type, where: Path) -> Any:
    if key not in table:
        raise BundleError(f'{where}: expected "{key}", and it is not there')
    if type(table[key]) is not kind:
        raise BundleError(f"{where}: {key}: expected {kind.__name__}, got {table[key]!r}")
    return table[key]


def _number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(float(str(value)))
