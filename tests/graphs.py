"""Small ONNX classifiers and bundles around them, made without torch."""

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from targets.lowering.parity import logits_of
from targets.runtime.form import seal

Array = npt.NDArray[np.float32]
SHAPE = (1, 8, 8)
CLASSES = 4


def tiny(seed: int = 0, channels: int = 1, classes: int = CLASSES) -> bytes:
    """Normalise, Conv, BatchNorm, Relu, a residual Conv, pooling, Gemm: what our own networks are made of."""
    rng = np.random.default_rng(seed)
    tensors: dict[str, Array] = {
        "mean": np.full((1, channels, 1, 1), 0.3, np.float32),
        "half": np.full((1, channels, 1, 1), 0.5, np.float32),
        "w1": rng.normal(0, 0.5, (8, channels, 3, 3)).astype(np.float32),
        "scale": rng.uniform(0.5, 1.5, 8).astype(np.float32),
        "shift": rng.normal(0, 0.1, 8).astype(np.float32),
        "running_mean": rng.normal(0, 0.1, 8).astype(np.float32),
        "running_var": rng.uniform(0.5, 1.5, 8).astype(np.float32),
        "w2": rng.normal(0, 0.15, (8, 8, 3, 3)).astype(np.float32),
        "b2": rng.normal(0, 0.1, 8).astype(np.float32),
        "w3": rng.normal(0, 1.0, (classes, 8)).astype(np.float32),
        "b3": rng.normal(0, 0.1, classes).astype(np.float32),
    }
    nodes = [
        helper.make_node("Mul", ["half", "half"], ["std"], "std"),
        helper.make_node("Sub", ["input", "mean"], ["centred"], "centre"),
        helper.make_node("Div", ["centred", "std"], ["normal"], "divide"),
        helper.make_node("Conv", ["normal", "w1"], ["c1"], "conv1", pads=[1, 1, 1, 1]),
        helper.make_node("BatchNormalization", ["c1", "scale", "shift", "running_mean", "running_var"], ["n1"], "norm"),
        helper.make_node("Relu", ["n1"], ["r1"], "relu1"),
        helper.make_node("Conv", ["r1", "w2", "b2"], ["c2"], "conv2", pads=[1, 1, 1, 1]),
        helper.make_node("Add", ["r1", "c2"], ["a2"], "residual"),
        helper.make_node("Relu", ["a2"], ["r2"], "relu2"),
        helper.make_node("GlobalAveragePool", ["r2"], ["p"], "pool"),
        helper.make_node("Flatten", ["p"], ["f"], "flat"),
        helper.make_node("Gemm", ["f", "w3", "b3"], ["logits"], "head", transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", channels, *SHAPE[1:]])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", classes])],
        [numpy_helper.from_array(array, name) for name, array in tensors.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model)
    data: bytes = model.SerializeToString(deterministic=True)
    return data


def images(count: int, seed: int = 1, channels: int = 1) -> Array:
    """Images on the 1/255 grid, half of them with noise off the grid, as attacks leave them."""
    rng = np.random.default_rng(seed)
    clean = (rng.integers(0, 256, (count, channels, *SHAPE[1:])) / 255).astype(np.float32)
    clean[count // 2 :] += rng.uniform(-0.03, 0.03, clean[count // 2 :].shape).astype(np.float32)
    return clean.clip(0, 1)


def make_bundle(
    folder: Path,
    graph: bytes | None = None,
    probes: Array | None = None,
    extra: dict[str, bytes] | None = None,
    **over: Any,
) -> Path:
    """A bundle as `build` writes one; `over` replaces fields of its manifest."""
    data = tiny() if graph is None else graph
    inputs = images(12, seed=5) if probes is None else probes
    name = str(over.get("model", "model.onnx"))
    stream = io.BytesIO()
    np.savez(stream, inputs=inputs, logits=logits_of(data, inputs))
    template = Path(__file__).parents[1] / "targets" / "runtime" / "predict_bundle.txt"
    files = {name: data, "probe.npz": stream.getvalue(), "predict.py": template.read_bytes(), **(extra or {})}
    folder.mkdir(parents=True, exist_ok=True)
    for relative, content in files.items():
        path = folder / relative
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    manifest: dict[str, Any] = {
        "schema_version": 1,
        "name": "tiny",
        "target": "x86_cpu",
        "model": name,
        "precision": "fp32",
        "runtime": "onnxruntime",
        "input": {
            "name": "input",
            "shape": list(inputs.shape[1:]),
            "dtype": "float32",
            "layout": "NCHW",
            "range": [0, 1],
        },
        "output": {"name": "logits", "classes": CLASSES},
        "labels": ["ant", "bee", "cat", "dog"],
        "threat": {"norm": "linf", "eps": 0.1},
        "measurements": [],
        "owed": [],
        "lineage": {},
        **over,
    }
    manifest["files"] = {
        relative: {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
        for relative, content in files.items()
    }
    write_manifest(folder, manifest)
    return folder


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    data = json.dumps(manifest, sort_keys=True).encode()
    (folder / "manifest.json").write_bytes(data)
    (folder / "manifest.sha256").write_bytes(seal(data))
