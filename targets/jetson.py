"""Jetson Orin under JetPack 6 (TensorRT 10.3): a portable ONNX whose precision is in the graph, built strongly typed.

TensorRT 11 removed the builder's precision flags and JetPack 6 ships 10.3, so the graph itself says what is int8 or
float16: symmetric signed int8 with float32 biases, or half precision between casts. An engine fits the GPU it was built
on: `finish` builds it on the board. NVIDIA's parser and builder (extra `rtx`) prove here that they take the graph.
"""

from pipeline.core.gate import Limit
from pipeline.core.target import Target

TARGET = Target(
    name="jetson",
    summary="int8, else float16 or float32, on TensorRT; the engine is built on the board",
    sections={
        "export": {
            "precisions": {
                "int8": ["fold_constants", "qdq_int8_trt", "tensorrt_check"],
                "int8_kept": ["fold_constants", {"pass": "qdq_int8_trt", "keep": ["first", "last"]}, "tensorrt_check"],
                "fp16": ["fold_constants", "fp16", "tensorrt_check"],
                "fp32": ["fold_constants", "tensorrt_check"],
            },
            "attempts": [
                {"precision": "int8"},
                {"precision": "int8_kept"},
                {"precision": "fp16"},
                {"precision": "fp32"},
            ],
            "runtime": "tensorrt",
            "machine": "aarch64",
        },
    },
    budget={
        "export": (
            Limit(metric="size.model", at_most=128 << 20),
            Limit(metric="latency.p95", at_most=20, on_device=True),
            Limit(metric="memory.peak", at_most=1 << 30, on_device=True),
        )
    },
    needs=("onnxruntime",),
)
