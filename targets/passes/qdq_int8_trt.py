"""int8 for NVIDIA's TensorRT: symmetric signed activations and weights, biases in float32.

Its parser takes no zero point other than 0 and no int32 bias behind DequantizeLinear. Only the inputs of weighted
operators are quantised, not their outputs, so that TensorRT can fuse what follows them (its own advice).
"""

from collections.abc import Mapping
from typing import Any

import onnx
from onnxruntime.quantization import QuantType

from targets.passes._qdq import quantise
from targets.passes.base import Kit, read_options

EXACT = False
WHOLE = False
OPERATORS = ("Conv", "Gemm", "MatMul")


def lower(model: onnx.ModelProto, options: Mapping[str, Any], kit: Kit) -> onnx.ModelProto:
    """Options: `keep`, nodes in float32 (names, "first", "last")."""
    asked = read_options("qdq_int8_trt", options, {"keep": []})
    extra = {
        "ActivationSymmetric": True,
        "WeightSymmetric": True,
        "QuantizeBias": False,
        "OpTypesToExcludeOutputQuantization": list(OPERATORS),
    }
    return quantise(model, kit, QuantType.QInt8, OPERATORS, asked["keep"], extra)
