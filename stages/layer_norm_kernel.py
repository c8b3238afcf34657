"""Which formula the installed onnxruntime forms the variance of a layer normalisation by: bounds cover but one.

mean x^2 - (mean x)^2 loses the variance where it is small beside the mean, and then gives anything, or NaN; the mean of
(x - mean x)^2 does not. Nothing documents which one a kernel takes, so it is asked: entries of 1000 +- 0.001, whose
squares agree in all 24 bits of float32. Seen: 1.31 takes the differences, as a node of its own or fused from others.
"""

from functools import cache

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from targets.runtime.ort import OrtEngine

_ENTRIES, _EPS = 64, 1e-5


@cache
def loses_variance() -> bool:
    """Whether the probe's answer is further from the exact one than differences of float32 numbers explain."""
    wanted = np.random.default_rng(0).normal(size=(8, _ENTRIES)) * 1e-3 + 1e3
    x = wanted.astype(np.float32)
    apart = x.astype(np.float64) - x.mean(1, keepdims=True, dtype=np.float64)
    exact = apart / np.sqrt((apart**2).mean(1, keepdims=True) + _EPS)
    return not bool(np.abs(OrtEngine(probe())(x) - exact).max() < 0.1)


def probe() -> bytes:
    """One LayerNormalization of [N, 64]."""
    constants = {"scale": np.ones(_ENTRIES, np.float32), "shift": np.zeros(_ENTRIES, np.float32)}
    node = helper.make_node("LayerNormalization", ["input", *constants], ["logits"], epsilon=_EPS)
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", _ENTRIES]) for name in ("input", "logits")]
    held = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph([node], "probe", ends[:1], ends[1:], held)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return bytes(model.SerializeToString())


def normalises(network: bytes) -> bool:
    """Whether an ONNX file normalises layers: by a node, or by the nodes that onnxruntime fuses to one."""
    kinds = {node.op_type for node in onnx.load_from_string(network).graph.node}
    return "LayerNormalization" in kinds or {"ReduceMean", "Sqrt"} <= kinds
