"""The torch twin of an ONNX classifier, so that the very graph that ships can be attacked by gradient.

Float graphs agree with onnxruntime to rounding. Quantised graphs are computed exactly as their Q/DQ nodes say, with
straight-through gradients; onnxruntime fuses them to integer kernels, whose requantisation may land on the other side
of a rounding tie, so single codes can differ by one. Graphs in half precision are computed in single precision on the
half-precision weights, rounding where the graph casts; gradients never are in half precision. Depthwise convolutions
that only a 1x1 convolution reads are computed with it as one dense convolution, where that is quicker to differentiate.
"""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import numpy_helper
from torch import Tensor, nn

from stages.method import InputError
from stages.nn._onnx_ops import OPERATORS, Operator, objection
from stages.nn._onnx_separable import merge
from stages.nn._onnx_tidy import fold_constants

_OLDEST = 13
_SMALL = 1 << 16
_DOMAINS = ("", "ai.onnx")


@dataclass(frozen=True, slots=True)
class _Step:
    run: Operator
    attributes: Mapping[str, Any]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    spent: tuple[str, ...]


class Twin(nn.Module):
    """Images [B, C, H, W] -> logits [B, K], node by node. Constants are buffers, so nothing here trains."""

    def __init__(self, model: onnx.ModelProto) -> None:
        super().__init__()
        graph = model.graph
        constants = {tensor.name for tensor in graph.initializer}
        self._input = next(value.name for value in graph.input if value.name not in constants)
        self._output = graph.output[0].name
        self._buffers_of: dict[str, str] = {}
        self._indices: dict[str, Tensor] = {}
        for number, tensor in enumerate(graph.initializer):
            value = _tensor(tensor)
            if value.dtype == torch.int64:
                # Shapes and indices: read on the CPU, whatever the device.
                self._indices[tensor.name] = value
            else:
                self._buffers_of[tensor.name] = f"constant{number}"
                self.register_buffer(f"constant{number}", value)
        self._steps = _steps(graph)

    def forward(self, x: Tensor) -> Tensor:
        known: dict[str, Tensor] = {self._input: x, **self._indices}
        known |= {name: self.get_buffer(buffer) for name, buffer in self._buffers_of.items()}
        for step in self._steps:
            results = step.run(step.attributes, *(known[name] if name else None for name in step.inputs))
            results = (results,) if isinstance(results, Tensor) else results
            known.update(zip(step.outputs, results, strict=False))
            for name in step.spent:
                del known[name]
        return known[self._output].to(torch.float32)


def imported(source: Path | bytes) -> Twin:
    """The twin of an ONNX file, or of its bytes, in eval mode.

    Raises `InputError` for what is not ONNX, has other than one image in and one array of logits out, or holds an
    operator without a twin (naming it, its node, and what to do).
    """
    where = str(source) if isinstance(source, Path) else "the ONNX graph"
    try:
        model = onnx.load_model_from_string(source.read_bytes() if isinstance(source, Path) else source)
        onnx.checker.check_model(model)
    except OSError as error:
        raise InputError(f"{where}: cannot be read: {error.strerror}") from error
    except (DecodeError, onnx.checker.ValidationError) as error:
        raise InputError(f"{where}: expected an ONNX model, got: {error}") from error
    _readable(model, where)
    fold_constants(model)
    _unobjectionable(model, where)
    merge(model)
    return Twin(model).eval()


def _readable(model: onnx.ModelProto, where: str) -> None:
    """One image in, logits out, a current opset, and operators of the table only."""
    graph = model.graph
    constants = {tensor.name for tensor in graph.initializer}
    inputs = [value.name for value in graph.input if value.name not in constants]
    if len(inputs) != 1 or len(graph.output) != 1:
        raise InputError(f"{where}: expected one input and one output, got {len(inputs)} and {len(graph.output)}")
    opset = max((entry.version for entry in model.opset_import if entry.domain in _DOMAINS), default=0)
    if opset < _OLDEST:
        raise InputError(f"{where}: expected opset {_OLDEST} or newer, got {opset}; convert it with onnx's converter")
    for node in graph.node:
        if node.domain not in _DOMAINS or node.op_type not in {*OPERATORS, "Constant"}:
            close = difflib.get_close_matches(node.op_type, OPERATORS, n=1)
            raise _no_twin(where, node, f"nearest is {close[0]}" if close else "nothing like it is in the table")


def _unobjectionable(model: onnx.ModelProto, where: str) -> None:
    """Attributes and small constants (zero points, flags) are such that the table's operators compute them."""
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        known = [constants.get(name) for name in node.input]
        small = [None if tensor is None or tensor.ByteSize() > _SMALL else _tensor(tensor) for tensor in known]
        reason = objection(node.op_type, _attributes(node), small)
        if reason is not None:
            raise _no_twin(where, node, reason)


def _no_twin(where: str, node: onnx.NodeProto, reason: str) -> InputError:
    name = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
    return InputError(
        f'{where}: node "{node.name}": operator {name} has no torch twin: {reason}; '
        "replace it in the graph, or add it to stages/nn/_onnx_ops.py"
    )


def _steps(graph: onnx.GraphProto) -> tuple[_Step, ...]:
    last = {name: position for position, node in enumerate(graph.node) for name in (*node.input, *node.output)}
    keep = {graph.output[0].name, *(tensor.name for tensor in graph.initializer)}
    return tuple(
        _Step(
            run=OPERATORS[node.op_type],
            attributes=_attributes(node),
            inputs=tuple(node.input),
            outputs=tuple(node.output),
            spent=tuple(_last_uses(node, position, last, keep)),
        )
        for position, node in enumerate(graph.node)
    )


def _last_uses(node: onnx.NodeProto, position: int, last: Mapping[str, int], keep: set[str]) -> Sequence[str]:
    """What nobody reads after this node, so that its memory can go."""
    return sorted({name for name in node.input if name and last[name] == position} - keep)


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    found = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
    if node.op_type == "Split" and len(node.input) < 2:
        found.setdefault("num_outputs", len(node.output))  # before opset 18 the outputs themselves say so
    return {name: _tensor(value) if isinstance(value, onnx.TensorProto) else value for name, value in found.items()}


def _tensor(stored: onnx.TensorProto) -> Tensor:
    array = numpy_helper.to_array(stored)
    if array.dtype == np.float16 or array.dtype.name == "bfloat16":
        array = array.astype(np.float32)
    return torch.from_numpy(np.array(array))
