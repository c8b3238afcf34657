"""The graph that onnxruntime makes of a file before it runs it, and whether two files become the same one."""

import hashlib
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper

from targets.runtime.ort import CPU, OrtEngine


def as_run(model: onnx.ModelProto) -> onnx.ModelProto:
    """What the installed onnxruntime runs on this processor with the options that our sessions have."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "as_run.onnx"
        OrtEngine(model.SerializeToString(), keep=path)
        return onnx.load(path)


def without_idle(model: onnx.ModelProto) -> onnx.ModelProto:
    """The file without what onnxruntime takes away before it looks for kernels of codes: what does nothing, such as
    products with 1, and one of two Q/DQ pairs that then are in a row."""
    wanted = onnxruntime.SessionOptions()
    wanted.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    wanted.log_severity_level = 3
    wanted.add_session_config_entry("session.disable_quant_qdq", "1")
    with TemporaryDirectory() as folder:
        wanted.optimized_model_filepath = str(Path(folder) / "without_idle.onnx")
        onnxruntime.InferenceSession(model.SerializeToString(), wanted, providers=[CPU])
        return onnx.load(wanted.optimized_model_filepath)


def alike(one: onnx.ModelProto, other: onnx.ModelProto) -> bool:
    """Whether two graphs compute their outputs by the same operations from the same constants, whatever their names."""
    return _digests(one.graph) == _digests(other.graph)


def floats(model: onnx.ModelProto) -> Counter[bytes]:
    """How many operands are which constants of floats, in any order of their entries and without zeros, as layouts turn
    them and fill them up."""
    held = {one.name: one for one in model.graph.initializer}
    held |= {node.output[0]: node.attribute[0].t for node in model.graph.node if node.op_type == "Constant"}
    entries = {
        name: mixed(numpy_helper.to_array(one)) for name, one in held.items() if one.data_type == TensorProto.FLOAT
    }
    return Counter(entries[name] for node in model.graph.node for name in node.input if name in entries)


def mixed(values: NDArray[Any]) -> bytes:
    return bytes(np.sort(values[values != 0], axis=None).tobytes())


def _digests(graph: onnx.GraphProto) -> list[bytes]:
    known = {"": b""} | {value.name: value.name.encode() for value in graph.input}
    for held in graph.initializer:
        values = numpy_helper.to_array(held)
        known[held.name] = _digest(str((values.dtype, values.shape)).encode(), values.tobytes())
    for node in graph.node:
        attributes = sorted(one.SerializeToString(deterministic=True) for one in node.attribute)
        what = _digest(node.domain.encode(), node.op_type.encode(), *attributes, *(known[name] for name in node.input))
        known |= {name: _digest(what, bytes([i])) for i, name in enumerate(node.output)}
    return [known[value.name] for value in graph.output]


def _digest(*parts: bytes) -> bytes:
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).digest()
