"""int8 for CPUs: unsigned activations x signed weights per channel, biases int32, whole chains of nodes quantised.

On x86 this is the recipe whose kernels are fast; the symmetric one is often no faster than float32. The logits stay
float32: a scale of 1/255 of their range would tie classes and hide margins.
"""

from collections.abc import Mapping
from typing import Any

import onnx
from onnxruntime.quantization import QuantType

from targets.passes._graph import clean, prune
from targets.passes._qdq import quantise
from targets.passes.base import Kit, read_options

EXACT = False
WHOLE = False
OPERATORS = (
    "Conv", "Gemm", "MatMul", "Add", "Relu", "Clip", "MaxPool", "AveragePool", "GlobalAveragePool",
    "Reshape", "Flatten", "Transpose", "Concat",
)  # fmt: skip


def lower(model: onnx.ModelProto, options: Mapping[str, Any], kit: Kit) -> onnx.ModelProto:
    """Options: `keep`, nodes in float32 (names, "first", "last"); `reduce_range`, weights of 7 bits (the default).

    x86 without VNNI adds pairs of products in 16 bits and saturates, silently: 2 x 255 x 127 > 2^15 - 1, while
    2 x 255 x 64 fits. With 7 bits the file computes the same on every processor and in anybody's session, with the fast
    kernels. With 8 bits it does so only in sessions that set `session.x64quantprecision`, as `runtime/ort.py` does,
    and not in an `.ort` file, which is past the rewrite that this setting asks for.
    """
    asked = read_options("qdq_int8_cpu", options, {"keep": [], "reduce_range": True})
    made = quantise(model, kit, QuantType.QUInt8, OPERATORS, asked["keep"], {}, asked["reduce_range"])
    return clean(_float_logits(made), "qdq_int8_cpu")


def _float_logits(model: onnx.ModelProto) -> onnx.ModelProto:
    """Take the Q/DQ pair in front of the output away."""
    made = onnx.ModelProto()
    made.CopyFrom(model)
    output = made.graph.output[0].name
    by_output = {name: node for node in made.graph.node for name in node.output}
    last = by_output[output]
    before = by_output.get(last.input[0]) if last.op_type == "DequantizeLinear" else None
    if before is None or before.op_type != "QuantizeLinear":
        return made
    producer = by_output[before.input[0]]
    old = before.input[0]
    made.graph.node.remove(last)
    for node in made.graph.node:
        for names in (node.input, node.output):
            for i, name in enumerate(names):
                if name == old:
                    names[i] = output
    assert output in producer.output
    prune(made)
    return made
