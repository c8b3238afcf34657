"""Where onnxruntime computes something else than a file's nodes say, so that bounds on the nodes prove nothing of it.

Nothing documents these; 1.31 was seen
- to make one Q/DQ pair, with codes of its own, of two in a row;
- to round a float bias to codes where the other operands are quantised;
- to run a softmax of codes by tables, with 1 / scale of its result rounded down to a whole number;
- to form the variance in GroupNormalization as mean x^2 - (mean x)^2. That loses it where it is small beside the mean,
  and then gives anything, or NaN; the mean of (x - mean x)^2, which bounds cover, does not. Layer and instance
  normalisation take the differences, as nodes of their own or fused from others. So whatever normalises is asked:
  entries of 1000 +- 0.001, whose squares agree in all 24 bits of float32.
"""

import math
from collections.abc import Iterator
from functools import cache

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

from targets.runtime.ort import OrtEngine

NORMS = {"LayerNormalization": {}, "InstanceNormalization": {}, "GroupNormalization": {"num_groups": 1}}
_ENTRIES, _EPS = 64, 1e-5
_WEIGHTED = frozenset({"Conv", "ConvTranspose", "Gemm"})
_NOTHING = frozenset({"Identity", "Dropout"})
_MOVES = _NOTHING | {"Flatten", "MaxPool", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze"}
_CODES, _VALUES = "QuantizeLinear", "DequantizeLinear"


def otherwise(model: onnx.ModelProto) -> str | None:
    """What onnxruntime does that a file's nodes do not say, and a way out; None where bounds on nodes hold for it."""
    return next(_found(model.graph), None)


def _found(graph: onnx.GraphProto) -> Iterator[str]:
    makers = {name: node for node in graph.node for name in node.output}
    fixed = {tensor.name: tensor for tensor in graph.initializer}
    fixed |= {node.output[0]: node.attribute[0].t for node in graph.node if node.op_type == "Constant"}
    for node in graph.node:
        here = f'{node.op_type} giving "{node.output[0]}"'
        before = _maker(node.input[0], makers, _NOTHING) if node.input else None
        if before is not None and before.op_type == _VALUES:
            if node.op_type == _CODES and not _alike(node, before, fixed):
                yield f"onnxruntime makes one Q/DQ pair of two in a row ({here}); leave one of them out"
            if node.op_type == "Softmax":
                yield f"onnxruntime's softmax of codes is not to its nodes ({here}); keep the softmax in float32"
        if _rounds_bias(node, makers, fixed):
            yield (
                f"onnxruntime rounds the float bias to codes ({here}); store it as int32 codes behind a "
                "DequantizeLinear whose scale is that of the image times that of the weights"
            )
    kinds = {node.op_type for node in graph.node}
    fused = {"LayerNormalization"} if {"ReduceMean", "Sqrt"} <= kinds else set[str]()
    for kind in sorted((kinds | fused) & NORMS.keys()):
        if loses_variance(kind):
            out = "update it" if kind == "LayerNormalization" else "export to opset 20 or older, or update it"
            yield f"this onnxruntime's {kind} loses the variance where it is small beside the mean; {out}"


def _rounds_bias(node: NodeProto, makers: dict[str, NodeProto], fixed: dict[str, TensorProto]) -> bool:
    """Of a layer with a bias that is no codes, or of a sum of a product and a constant: are its operands codes?"""
    layer: NodeProto | None = None
    if node.op_type in _WEIGHTED and any(_kind(name, makers) != _VALUES for name in node.input[2:] if name):
        layer = node
    if node.op_type == "Add" and any(_bias(name, fixed) for name in node.input):
        products = [_maker(name, makers, _NOTHING) for name in node.input]
        layer = next((one for one in products if one is not None and one.op_type == "MatMul"), None)
    return layer is not None and all(_kind(name, makers) == _VALUES for name in layer.input[:2])


def _maker(name: str, makers: dict[str, NodeProto], past: frozenset[str]) -> NodeProto | None:
    """The node that made a value, past those of some kinds."""
    node = makers.get(name)
    while node is not None and node.op_type in past:
        node = makers.get(node.input[0])
    return node


def _kind(name: str, makers: dict[str, NodeProto]) -> str:
    """What computes a value; past what moves entries about, as that is done to codes."""
    node = _maker(name, makers, _MOVES)
    return "" if node is None else node.op_type


def _bias(name: str, fixed: dict[str, TensorProto]) -> bool:
    """Whether a value is a constant row of floats; a mask of attention has several rows."""
    held = fixed.get(name)
    return held is not None and held.data_type == TensorProto.FLOAT and math.prod(held.dims[:-1]) == 1


def _alike(one: NodeProto, other: NodeProto | None, fixed: dict[str, TensorProto]) -> bool:
    """Whether two nodes have the same scale and zero point; what is no constant is like nothing."""
    if other is None or len(one.input) != len(other.input):
        return False
    pairs = list(zip(one.input[1:], other.input[1:], strict=True))
    if not all(name in fixed for pair in pairs for name in pair):
        return False
    arrays = [[numpy_helper.to_array(fixed[name]) for name in pair] for pair in pairs]
    return all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in arrays)


@cache
def loses_variance(kind: str = "LayerNormalization") -> bool:
    """Whether the probe's answer is further from the exact one than differences of float32 numbers explain."""
    wanted = np.random.default_rng(0).normal(size=(8, 1, _ENTRIES)) * 1e-3 + 1e3
    x = wanted.astype(np.float32)
    apart = x.astype(np.float64) - x.mean(2, keepdims=True, dtype=np.float64)
    exact = apart / np.sqrt((apart**2).mean(2, keepdims=True) + _EPS)
    return not bool(np.abs(OrtEngine(probe(kind))(x) - exact).max() < 0.1)


def probe(kind: str = "LayerNormalization") -> bytes:
    """One normalisation of [N, 1, 64]."""
    entries = _ENTRIES if kind == "LayerNormalization" else 1
    constants = {"scale": np.ones(entries, np.float32), "shift": np.zeros(entries, np.float32)}
    node = helper.make_node(kind, ["input", *constants], ["logits"], epsilon=_EPS, **NORMS[kind])
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 1, _ENTRIES]) for name in ("input", "logits")]
    held = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph([node], "probe", ends[:1], ends[1:], held)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return bytes(model.SerializeToString())
