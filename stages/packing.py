"""What goes into a bundle besides the report: the models, their contract, probe outputs, and a way to run them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from stages import evidence
from stages.task import Splits
from stages.threat import Threat
from targets.lowering.apply import Lowered
from targets.runtime.form import BATCHES
from targets.runtime.ort import OrtEngine

_PREDICT = Path(__file__).resolve().parent.parent / "targets" / "runtime" / "predict_bundle.txt"
_PROBES = 32


def model_name(precision: str) -> str:
    """`model.onnx` for float32; `model.int8.onnx` for any int8."""
    return "model.onnx" if precision == "fp32" else f"model.{precision.partition('_')[0]}.onnx"


def write(folder: Path, plain: bytes, lowered: Lowered, contract: Mapping[str, Any], splits: Splits) -> dict[str, Path]:
    """The files of the bundle, by their name there; `plain` is the float32 graph, `lowered` the one that runs."""
    folder.mkdir(parents=True, exist_ok=True)
    name = str(contract["model"])
    made: dict[str, bytes] = {"model.onnx": plain, name: lowered.model}
    made |= {name.removesuffix(".onnx") + suffix: data for suffix, data in lowered.extras.items()}
    probe = splits.train.floats(slice(0, _PROBES)).numpy()
    made["predict.py"] = _PREDICT.read_bytes()
    made["contract.json"] = json.dumps(contract, sort_keys=True, indent=1).encode()
    for file, data in made.items():
        (folder / file).write_bytes(data)
    # A flag is the score held against the contract's threshold, so the score is enough.
    arrays: dict[str, Any] = {"inputs": probe, **OrtEngine(lowered.model).outputs(probe)}
    arrays.pop("flag", None)
    np.savez(folder / "probe.npz", **arrays)
    return {path.name: path for path in sorted(folder.iterdir())}


def contract(
    splits: Splits,
    threat: Threat,
    precision: str,
    runtime: str,
    provider: str | None,
    machine: str | None,
    strength: evidence.Strength,
    detector: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What a reader of the bundle must know before the first image; the engine adds digests and numbers."""
    found = {
        "model": model_name(precision),
        "precision": precision,
        "runtime": runtime,
        "provider": provider,
        "machine": machine,
        # How `finish` builds the engine on the device; the precision is in the graph.
        "recipe": {"strongly_typed": True, "batches": list(BATCHES)} if runtime == "tensorrt" else None,
        "input": {
            "name": "input",
            "shape": list(splits.input_shape),
            "dtype": "float32",
            "layout": "NCHW",
            "range": [0, 1],
        },
        "output": {"name": "logits", "classes": len(splits.classes)},
        "detector": detector,
        "labels": list(splits.classes),
        "threat": {"norm": threat.norm, "eps": threat.eps},
        "attacks": strength,
    }
    return {key: value for key, value in found.items() if value is not None}
