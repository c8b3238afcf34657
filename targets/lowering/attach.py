"""A detector around a lowered network, in one graph: logits as before, then `score` and `flag`.

    input ─┬─ network ──────────────────────────── logits ─┬───────────── logits [batch, K]
           └─ copies ─ network again ─ copies_logits ──────┴─ compare ─┬─ score  [batch] float32
                                                                       └─ flag   [batch] bool

The network's nodes are written twice and read the same weights, so that the file hardly grows and the logits are
computed by the very nodes that computed them before, whatever the detector does: the same bits in onnxruntime, but for
half precision on a CPU, where it moves its casts. It is attached after lowering, so its own arithmetic stays float32:
8-bit steps in squeezed pixels or in differences of probabilities are as large as the scores that tell inputs apart.
"""

from collections.abc import Mapping

import onnx
from onnx import TensorProto, helper

from targets.passes._graph import STANDARD, clean
from targets.passes.base import LoweringError

OUTPUTS = ("logits", "score", "flag")
_GUARD = (("input", "logits", "copies_logits"), ("copies", "score", "flag"))
_MARK = "detector/"


def attach(network: onnx.ModelProto, guard: onnx.ModelProto) -> onnx.ModelProto:
    """`guard` maps input, logits and copies_logits to copies, score and flag (`stages/detectors/base.py` makes one).

    Raises `LoweringError` where either has other inputs or outputs, another opset, or nodes with graphs inside.
    """
    _fits(network, (("input",), ("logits",)), "the network")
    _fits(guard, _GUARD, "the detector")
    versions = [_opset(model) for model in (network, guard)]
    if versions[0] != versions[1]:
        raise LoweringError(f"the network is written in opset {versions[0]}, the detector in {versions[1]}")
    made = onnx.ModelProto()
    made.CopyFrom(network)
    made.ir_version = max(network.ir_version, guard.ir_version)
    outer = {name: name for name in ("input", *OUTPUTS)}
    fixed = {tensor.name: tensor.name for tensor in network.graph.initializer}
    again = {**fixed, "input": f"{_MARK}copies", "logits": f"{_MARK}copies_logits"}
    # What the copies need comes first, what waits for their logits last.
    made.graph.node.extend(_renamed(node, outer, _MARK) for node in guard.graph.node)
    made.graph.node.extend(_renamed(node, again, f"{_MARK}network/") for node in network.graph.node)
    for tensor in guard.graph.initializer:
        made.graph.initializer.add().CopyFrom(tensor)
        made.graph.initializer[-1].name = _MARK + tensor.name
    batch = network.graph.output[0].type.tensor_type.shape.dim[0]
    axis: str | int = batch.dim_param or batch.dim_value
    made.graph.output.append(helper.make_tensor_value_info("score", TensorProto.FLOAT, [axis]))
    made.graph.output.append(helper.make_tensor_value_info("flag", TensorProto.BOOL, [axis]))
    return clean(made, "the detector")


def _renamed(node: onnx.NodeProto, known: Mapping[str, str], prefix: str) -> onnx.NodeProto:
    """A copy whose tensors are those of `known` or carry the prefix; an input that is left out stays so."""
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    if any(a.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS) for a in node.attribute):
        raise LoweringError(f'node "{node.name}" ({node.op_type}) holds a graph; a detector cannot be attached to it')
    copy.name = prefix + node.name
    for names in (copy.input, copy.output):
        for i, name in enumerate(names):
            names[i] = known.get(name, prefix + name) if name else name
    return copy


def _fits(model: onnx.ModelProto, expected: tuple[tuple[str, ...], tuple[str, ...]], what: str) -> None:
    fixed = {tensor.name for tensor in model.graph.initializer}
    found = tuple(
        tuple(v.name for v in side if v.name not in fixed) for side in (model.graph.input, model.graph.output)
    )
    if found != expected:
        raise LoweringError(f"{what}: expected inputs and outputs {expected}, got {found}")


def _opset(model: onnx.ModelProto) -> int:
    return max(int(entry.version) for entry in model.opset_import if entry.domain in STANDARD)
