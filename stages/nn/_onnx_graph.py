"""An ONNX file as the twin reads it: loaded, cut down to the way from image to logits, and checked node by node."""

import difflib
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.inliner
import torch
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import numpy_helper
from torch import Tensor

from stages.method import InputError
from stages.nn._onnx_ops import OPERATORS, objection
from stages.nn._onnx_resize import NEWER, OLDER

LOGITS = "logits"
_OLDEST = 7
_JOINT = 13  # before it, softmax was over all axes from `axis` on
_ASYMMETRIC = 10  # up to it, images were resized in one way
_SMALL = 1 << 14  # numbers
_DOMAINS = ("", "ai.onnx")
_TYPES = {"float32", "float64", "int64", "int32", "int16", "uint16", "int8", "uint8", "bool"}
_CHOOSES = "it answers with a class, which has no gradients and no bounds; end the file at the scores that it reads"
_QUANTISED = {"QuantizeLinear", "DequantizeLinear"}
_HALVES = {onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16}
_NARROW = {"float16": np.float32, "bfloat16": np.float32, "int4": np.int8, "uint4": np.uint8}


def loaded(source: Path | bytes, where: str, output: str | None = None) -> onnx.ModelProto:
    """The model with its weights, without local functions, and with the nodes that lead to `output` alone.

    Without a name it is the one that is called "logits", or the only one.
    """
    try:
        model = onnx.load(source) if isinstance(source, Path) else onnx.load_model_from_string(source)
        _check(source, model)
    except OSError as error:
        raise InputError(f"{where}: cannot be read: {error.strerror or error}") from error
    except (DecodeError, onnx.checker.ValidationError) as error:
        raise InputError(f"{where}: expected an ONNX model, got: {error}") from error
    if model.functions:
        model = onnx.inliner.inline_local_functions(model)
    graph = model.graph
    chosen = [value for value in graph.output if value.name == (output or LOGITS)]
    if chosen and len(graph.output) > 1:
        del graph.output[:]
        graph.output.extend(chosen)
    _drop_unread(graph)
    return model


def _check(source: Path | bytes, model: onnx.ModelProto) -> None:
    """As the standard has it, but for shapes of outputs, which some exporters leave out and nobody here reads."""
    open_ended = [
        value.type.tensor_type for value in model.graph.output if not value.type.tensor_type.HasField("shape")
    ]
    for kind in open_ended:
        kind.shape.SetInParent()
    try:
        onnx.checker.check_model(source if isinstance(source, Path) and not open_ended else model)
    finally:
        for kind in open_ended:
            kind.ClearField("shape")


def without_softmax(model: onnx.ModelProto) -> bool:
    """Take the softmax, if any, off the end of a graph: the same classes in the same order, and gradients again."""
    graph = model.graph
    last = next((node for node in graph.node if graph.output[0].name in node.output), None)
    if last is None or last.op_type != "Softmax" or last.domain not in _DOMAINS:
        return False
    graph.output[0].name = last.input[0]
    _drop_unread(graph)
    return True


def rounds(model: onnx.ModelProto) -> bool:
    """Are values rounded on the way, to 8 bits or to half precision, so that other sums may give other codes?"""
    graph = model.graph
    return any(node.op_type in _QUANTISED for node in graph.node) or any(
        tensor.data_type in _HALVES for tensor in graph.initializer
    )


def _drop_unread(graph: onnx.GraphProto) -> None:
    needed = {output.name for output in graph.output}
    kept = []
    for node in reversed(graph.node):
        if needed.intersection(node.output):
            kept.append(node)
            # A subgraph may read any value of the graph around it.
            needed.update(node.input)
            needed.update(name for a in node.attribute for part in a.g.node for name in part.input)
    del graph.node[:]
    graph.node.extend(reversed(kept))


def declared(graph: onnx.GraphProto, shape: Sequence[int] | None) -> list[int] | None:
    """The input's shape with a batch of one where that is open; None where other sizes are and `shape` does not say."""
    constants = {tensor.name for tensor in graph.initializer}
    dims = next(value for value in graph.input if value.name not in constants).type.tensor_type.shape.dim
    sizes = [dim.dim_value for dim in dims]
    if not sizes:
        return None
    rest = sizes[1:] if shape is None else list(shape)
    return [max(sizes[0], 1), *rest] if min(rest, default=1) > 0 else None


def readable(model: onnx.ModelProto, where: str) -> None:
    """One image in, logits out, an opset that we know, and operators of the table only."""
    graph = model.graph
    constants = {tensor.name for tensor in graph.initializer}
    inputs = [value.name for value in graph.input if value.name not in constants]
    if len(inputs) != 1 or len(graph.output) != 1:
        raise InputError(
            f"{where}: expected one input and one output (or one called {LOGITS}), "
            f"got {len(inputs)} and {len(graph.output)}"
        )
    if opset(model) < _OLDEST:
        raise InputError(
            f"{where}: expected opset {_OLDEST} or newer, got {opset(model)}; convert it with onnx's converter"
        )
    for node in graph.node:
        if node.domain not in _DOMAINS or node.op_type not in {*OPERATORS, "Constant"}:
            close = difflib.get_close_matches(node.op_type, OPERATORS, n=1)
            near = f"nearest is {close[0]}" if close else "nothing like it is in the table"
            raise _no_twin(where, node, _CHOOSES if node.op_type in ("ArgMax", "ArgMin") else near)


def opset(model: onnx.ModelProto) -> int:
    return max((entry.version for entry in model.opset_import if entry.domain in _DOMAINS), default=0)


def unobjectionable(model: onnx.ModelProto, where: str) -> None:
    """Attributes and small constants (zero points, flags) are such that the table's operators compute them."""
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        known = [constants.get(name) for name in node.input]
        try:
            small = [None if tensor is None or prod(tensor.dims) > _SMALL else constant(tensor) for tensor in known]
            reason = objection(node.op_type, attributes(node, opset(model)), small)
        except InputError as error:
            reason = str(error)
        if reason is not None:
            raise _no_twin(where, node, reason)


def _no_twin(where: str, node: onnx.NodeProto, reason: str) -> InputError:
    name = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
    return InputError(
        f'{where}: node "{node.name or f"that gives {node.output[0]}"}": operator {name} has no torch twin: {reason}; '
        "replace it in the graph, or add it to stages/nn/_onnx_ops.py"
    )


def attributes(node: onnx.NodeProto, opset: int) -> dict[str, Any]:
    found = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
    if node.op_type == "Split" and len(node.input) < 2 and "split" not in found:
        found.setdefault("num_outputs", len(node.output))  # before opset 18 the outputs themselves say so
    if node.op_type in ("Softmax", "LogSoftmax") and opset < _JOINT:
        found = {"axis": 1, "joint": 1, **found}
    if node.op_type in ("Resize", "Upsample"):
        found = {**(NEWER if node.op_type == "Resize" and opset > _ASYMMETRIC else OLDER), **found}
    return {name: constant(value) if isinstance(value, onnx.TensorProto) else value for name, value in found.items()}


def constant(stored: onnx.TensorProto) -> Tensor:
    """Raises `InputError` for numbers that torch does not compute with."""
    array = numpy_helper.to_array(stored)
    if array.dtype.name in _NARROW:
        array = array.astype(_NARROW[array.dtype.name])
    if array.dtype.name not in _TYPES:
        raise InputError(f'its constant "{stored.name}" is of type {array.dtype.name}')
    return torch.from_numpy(np.array(array))
