"""Constant folding, batch-normalisation folding and dead-code removal, by onnxruntime's basic level.

The basic level is the one whose rewrites stay within standard ONNX and fit every device; `_graph.clean` checks that.
"""

from collections.abc import Mapping
from typing import Any

import onnx
import onnxruntime

from targets.passes._graph import clean
from targets.passes.base import Kit, read_options

EXACT = True
WHOLE = False


def lower(model: onnx.ModelProto, options: Mapping[str, Any], kit: Kit) -> onnx.ModelProto:
    """The same function with fewer nodes; no options."""
    read_options("fold_constants", options, {})
    wanted = onnxruntime.SessionOptions()
    wanted.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    wanted.optimized_model_filepath = str(kit.work / "folded.onnx")
    wanted.log_severity_level = 3
    wanted.intra_op_num_threads = wanted.inter_op_num_threads = 1
    onnxruntime.InferenceSession(model.SerializeToString(), wanted, providers=["CPUExecutionProvider"])
    return clean(onnx.load(wanted.optimized_model_filepath), "fold_constants")
