"""A bundle: a folder whose `manifest.json` names every file by digest. Nothing is opened before its digest is checked.

`manifest.json` (schema 1):

    schema_version  1
    name, target    of the run
    model           the file that runs, such as "model.int8.onnx"
    precision       "fp32", "fp16" or a name that starts with "int8"
    runtime         "onnxruntime" or "tensorrt" (then `finish` builds the engine on the device)
    provider        optional; onnxruntime's execution provider, "CPUExecutionProvider" where absent
    machine         optional; `platform.machine()` of the device, where limits that are owed can be settled
    input           {name, shape: [C, H, W], dtype: "float32", layout: "NCHW", range: [0, 1]}
    output          {name: "logits", classes}
    detector        optional; {kind, settings, false_alarms, threshold, outputs: ["score", "flag"]}: the model has two
                    outputs more, score float32 [batch] and flag bool [batch], which is score > threshold
    labels          one name per class
    recipe          optional; how `finish` builds an engine: {"strongly_typed": true, "batches": [1, 1, 64]}
    threat          {norm, eps}
    measurements    [{name, value, low, high, unit, samples, better}]
    owed            [{metric, at_least, at_most}], limits that `finish` settles on the device
    lineage         where it came from, as text
    files           {relative path: {sha256, bytes}}, every file of the folder but the manifest and its digest

`manifest.sha256` holds the manifest's digest, so that a byte that changed on the way is found there, too.
Two more files may appear beside them, made on the device by `finish`: `device.json` (which names the manifest's digest)
and `device.engine` (whose digest `device.json` holds). They say what this device measured. Who can write the folder can
forge both; the manifest's own digest, printed by `verify`, is what to compare with the one noted at build time.
"""

import hashlib
import io
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt

from targets.runtime.errors import BundleError, TamperedError
from targets.runtime.form import BATCHES, MANIFEST, SCHEMA, SEAL, TOLERANCE, check_device, check_form, seal

DEVICE, ENGINE, PROBE = "device.json", "device.engine", "probe.npz"
# What `finish` may leave beside the listed files; a `.tmp` is what it left when it was killed, and is never opened.
MADE_HERE = (DEVICE, ENGINE, f"{DEVICE}.tmp", f"{ENGINE}.tmp")
_CHUNK = 1 << 20

Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Bundle:
    """A manifest that was read and whose form is right; `digest` is the SHA-256 of its bytes."""

    folder: Path
    digest: str
    manifest: Mapping[str, Any]

    @property
    def name(self) -> str:
        return str(self.manifest["name"])

    @property
    def target(self) -> str:
        return str(self.manifest["target"])

    @property
    def model(self) -> str:
        return str(self.manifest["model"])

    @property
    def precision(self) -> str:
        return str(self.manifest["precision"])

    @property
    def runtime(self) -> str:
        return str(self.manifest["runtime"])

    @property
    def provider(self) -> str:
        return str(self.manifest.get("provider", "CPUExecutionProvider"))

    @property
    def shape(self) -> tuple[int, int, int]:
        channels, height, width = self.manifest["input"]["shape"]
        return channels, height, width

    @property
    def classes(self) -> int:
        return int(self.manifest["output"]["classes"])

    @property
    def guarded(self) -> bool:
        """Whether the model holds a detector, and so answers with score and flag too."""
        return "detector" in self.manifest

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(self.manifest["labels"])

    @property
    def owed(self) -> tuple[Mapping[str, Any], ...]:
        return tuple(self.manifest["owed"])

    @property
    def batches(self) -> tuple[int, int, int]:
        """Smallest, favoured and largest batch of an engine that is built from this bundle."""
        smallest, favoured, largest = self.manifest.get("recipe", {}).get("batches", BATCHES)
        return smallest, favoured, largest

    @property
    def tolerance(self) -> float:
        return TOLERANCE["int8" if self.precision.startswith("int8") else self.precision]

    def read(self, name: str) -> bytes:
        """The bytes of a listed file, checked against the manifest on the way. Raises `TamperedError`."""
        entry = self.manifest["files"].get(name)
        if entry is None:
            raise BundleError(f"{self.folder / name}: the manifest lists no such file")
        path = _plain(self.folder, name)
        data = path.read_bytes()
        _expect(path, hashlib.sha256(data).hexdigest(), len(data), entry)
        return data

    def probe(self) -> tuple[Array, Array]:
        """Probe inputs [n, C, H, W] and the logits [n, classes] that the model gave when it was exported."""
        arrays = self._probe("inputs", "logits")
        inputs, logits = arrays["inputs"], arrays["logits"]
        if inputs.shape[1:] != self.shape or logits.shape != (len(inputs), self.classes) or not len(inputs):
            raise BundleError(
                f"{self.folder / PROBE}: expected inputs [n, *{self.shape}], logits [n, {self.classes}], "
                f"got {inputs.shape} and {logits.shape}"
            )
        return inputs, logits

    def probe_scores(self) -> Array:
        """The detector's scores [n] of the probe inputs, as the model gave them when it was exported."""
        arrays = self._probe("inputs", "score")
        if arrays["score"].shape != arrays["inputs"].shape[:1]:
            raise BundleError(f"{self.folder / PROBE}: expected score [n], got {arrays['score'].shape}")
        return arrays["score"]

    def _probe(self, *names: str) -> dict[str, Array]:
        if PROBE not in self.manifest["files"]:
            raise BundleError(f"{self.folder}: no {PROBE}, so nothing can be reproduced; export the bundle again")
        try:
            with np.load(io.BytesIO(self.read(PROBE)), allow_pickle=False) as arrays:
                return {name: arrays[name].astype(np.float32) for name in names}
        except (KeyError, ValueError, OSError) as error:
            if isinstance(error, BundleError):
                raise
            expected = " and ".join(names)
            raise BundleError(f"{self.folder / PROBE}: expected arrays {expected}, got: {error}") from error

    def device(self) -> dict[str, Any] | None:
        """What `finish` wrote here for these very bytes; None where it has not run or ran on another bundle."""
        path = self.folder / DEVICE
        if not path.exists():
            return None
        found = _json(_plain(self.folder, DEVICE).read_bytes(), path)
        if found.get("bundle") != self.digest or found.get("schema_version") != SCHEMA:
            return None
        check_device(found, path)
        return found

    def engine(self) -> bytes | None:
        """The engine that `finish` built here, where it did. Raises `TamperedError` where its bytes changed."""
        device = self.device()
        if device is None or device.get("engine") is None:
            return None
        path = _plain(self.folder, ENGINE)
        data = path.read_bytes()
        _expect(path, hashlib.sha256(data).hexdigest(), len(data), device["engine"])
        return data

    def still_owed(self) -> tuple[str, ...]:
        """The metrics whose limits no `finish` on this device has settled."""
        settled = {v["metric"] for v in (self.device() or {}).get("verdict", ()) if v.get("ok") is True}
        return tuple(str(limit["metric"]) for limit in self.owed if limit["metric"] not in settled)


def open_manifest(path: Path) -> Bundle:
    """Read and check `manifest.json`; `path` is a bundle or a run folder that holds one in `bundle/`.

    Raises `BundleError` where there is none, its form is wrong, or its digest is not the one beside it. No other file
    is touched.
    """
    folder = path / "bundle" if (path / "bundle" / MANIFEST).is_file() else path
    if not (folder / MANIFEST).is_file():
        raise BundleError(f"{path}: not a bundle, it holds no {MANIFEST}; `build` makes one in runs/NAME/bundle")
    where = folder / MANIFEST
    data = _plain(folder, MANIFEST).read_bytes()
    manifest = _json(data, where)
    check_form(manifest, where)
    if not (folder / SEAL).is_file():
        raise TamperedError(f"{folder / SEAL}: missing, though a build writes it; fetch the bundle again")
    if _plain(folder, SEAL).read_bytes() != seal(data):
        raise TamperedError(f"{where}: not the bytes that {SEAL} names; fetch the bundle again")
    return Bundle(folder, hashlib.sha256(data).hexdigest(), manifest)


def verify_files(bundle: Bundle) -> int:
    """Hold every file of the folder against the manifest; returns how many there are. Raises `TamperedError`."""
    listed = bundle.manifest["files"]
    for name, entry in listed.items():
        path = _plain(bundle.folder, name)
        _expect(path, _digest(path), path.stat().st_size, entry)
    for root, folders, names in os.walk(bundle.folder):
        for name in [*folders, *names]:
            path = Path(root) / name
            relative = path.relative_to(bundle.folder).as_posix()
            if path.is_symlink():
                raise TamperedError(f"{path}: a link; a bundle holds plain files only")
            known = relative in listed or relative in (MANIFEST, SEAL, *MADE_HERE)
            if name in folders:
                known = any(file.startswith(f"{relative}/") for file in listed)
            if not known:
                raise TamperedError(f"{path}: not in the manifest; remove it, or fetch the bundle again")
    if bundle.engine() is None and (bundle.folder / ENGINE).exists():
        raise TamperedError(f"{bundle.folder / ENGINE}: no {DEVICE} of this bundle names it; remove it, run `finish`")
    return len(listed)


def _plain(folder: Path, name: str) -> Path:
    """The path of a file none of whose parts below the folder is a link. Raises `TamperedError`."""
    path = folder
    for part in PurePosixPath(name).parts:
        path = path / part
        if path.is_symlink():
            raise TamperedError(f"{path}: a link; a bundle holds plain files only")
    if not path.is_file():
        raise TamperedError(f"{path}: missing; fetch the bundle again")
    return path


def _digest(path: Path) -> str:
    state = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_CHUNK):
            state.update(piece)
    return state.hexdigest()


def _expect(path: Path, digest: str, size: int, entry: Mapping[str, Any]) -> None:
    if digest != entry.get("sha256") or size != entry.get("bytes"):
        raise TamperedError(
            f"{path}: bytes differ from the recorded ones (expected {entry.get('bytes')} bytes, sha256 "
            f"{str(entry.get('sha256'))[:12]}, got {size}, {digest[:12]}); fetch the bundle again"
        )


def _json(data: bytes, where: Path) -> dict[str, Any]:
    try:
        found = json.loads(data, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{where}: not JSON: {error}") from error
    if not isinstance(found, dict):
        raise BundleError(f"{where}: expected a table, got {type(found).__name__}")
    return found


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is no number")
