"""Half precision with a float32 keep-list: weights and sums in float16, input and logits in float32.

Operators whose sums overflow or cancel in float16 stay in float32 (`keep_ops`), between casts in the graph. The
conversion is onnxruntime's; weights beyond float16's range are clamped by it, so `apply` measures what that costs.
"""

from collections.abc import Mapping
from typing import Any

import onnx
from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16

from targets.passes._graph import clean
from targets.passes.base import Kit, LoweringError, read_options

EXACT = False
WHOLE = False
KEEP_OPS = ("Softmax", "LayerNormalization", "InstanceNormalization", "ReduceMean", "GlobalAveragePool")


def lower(model: onnx.ModelProto, options: Mapping[str, Any], kit: Kit) -> onnx.ModelProto:
    """Options: `keep_ops` (operator types) and `keep_nodes` (names) that stay in float32.

    Raises `LoweringError` for a node that the graph does not hold.
    """
    del kit
    asked = read_options("fp16", options, {"keep_ops": list(KEEP_OPS), "keep_nodes": []})
    unknown = set(asked["keep_nodes"]) - {node.name for node in model.graph.node}
    if unknown:
        raise LoweringError(f'pass "fp16": keep_nodes: the graph has no node {", ".join(sorted(unknown))}')
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    half = convert_float_to_float16(
        copy,
        keep_io_types=True,
        op_block_list=[*DEFAULT_OP_BLOCK_LIST, *asked["keep_ops"]],
        node_block_list=asked["keep_nodes"],
    )
    return clean(half, "fp16")
