"""A CUDA server: half precision in the graph; `finish` builds the TensorRT engine where TensorRT is, else onnxruntime's
CUDA provider runs the same graph. int8 is on offer and proved with NVIDIA's parser, but not tried by default.
"""

from pipeline.core.gate import Limit
from pipeline.core.target import Target

TARGET = Target(
    name="cuda",
    summary="float16 (else float32) on a CUDA server; NVIDIA's parser and builder take the graph",
    sections={
        "export": {
            "precisions": {
                "int8": ["fold_constants", "qdq_int8_trt", "tensorrt_check"],
                "fp16": ["fold_constants", "fp16", "tensorrt_check"],
                "fp32": ["fold_constants", "tensorrt_check"],
            },
            "attempts": [{"precision": "fp16"}, {"precision": "fp32"}],
            "runtime": "tensorrt",
            "provider": "CUDAExecutionProvider",
            "machine": "x86_64",
        }
    },
    budget={
        "export": (
            Limit(metric="size.model", at_most=1 << 30),
            Limit(metric="latency.p95", at_most=20, on_device=True),
            Limit(metric="memory.peak", at_most=4 << 30, on_device=True),
        )
    },
    needs=("onnxruntime",),
)
