"""`.ort` beside the ONNX: the same graph in onnxruntime's own format, which loads faster and in less memory.

Optimised to the level whose rewrites hold on every processor (the layouts of the highest level fit one kind only). The
graph itself passes through unchanged; the file goes to `kit.extras[".ort"]`. Its bytes are not the same twice:
onnxruntime writes one table of it in the order of a hash table with a random seed.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnxruntime

from targets.passes.base import Kit, LoweringError, read_options
from targets.runtime.ort import OrtEngine

EXACT = True
WHOLE = True


def lower(model: onnx.ModelProto, options: Mapping[str, Any], kit: Kit) -> onnx.ModelProto:
    """No options. Raises `LoweringError` where the file, loaded again, disagrees with the graph.

    Float32 sums come in another order (1e-3 of the largest logit at most); in front of a Quantize node that can turn a
    rounding the other way, which moves an activation by a whole step (5e-2 at most).
    """
    read_options("ort_format", options, {})
    target = kit.work / "model.ort"
    wanted = onnxruntime.SessionOptions()
    wanted.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    wanted.optimized_model_filepath = str(target)
    wanted.log_severity_level = 3
    wanted.intra_op_num_threads = wanted.inter_op_num_threads = 1
    wanted.add_session_config_entry("session.save_model_format", "ORT")
    onnxruntime.InferenceSession(model.SerializeToString(), wanted, providers=["CPUExecutionProvider"])
    data = target.read_bytes()
    images = kit.calibration[:16]
    expected, got = (OrtEngine(graph)(images) for graph in (model.SerializeToString(), data))
    gap, scale = float(np.abs(expected - got).max()), float(np.abs(expected).max())
    share = 5e-2 if any(node.op_type == "QuantizeLinear" for node in model.graph.node) else 1e-3
    if not gap <= share * max(1.0, scale):
        raise LoweringError(f'pass "ort_format": the .ort file differs from the graph by {gap:.3g} in a logit')
    kit.extras[".ort"] = data
    return model
