"""A Raspberry Pi 4 or 5 (64-bit ARM, 1 GiB and more): int8 on onnxruntime, `.ort` beside the ONNX.

Speed and memory are owed: `finish` measures them on the board. The graph's answers are the same on both architectures
(tests/device/test_aarch64.py runs the bundle under emulation).
"""

from pipeline.core.gate import Limit
from pipeline.core.target import Target

TARGET = Target(
    name="raspberry_pi",
    summary="int8 (else float32) on onnxruntime, 64-bit ARM; speed settled on the board",
    sections={
        "export": {
            "precisions": {
                "int8": ["fold_constants", "qdq_int8_cpu", "ort_format"],
                "int8_kept": ["fold_constants", {"pass": "qdq_int8_cpu", "keep": ["first", "last"]}, "ort_format"],
                "fp32": ["fold_constants", "ort_format"],
            },
            "attempts": [{"precision": "int8"}, {"precision": "int8_kept"}, {"precision": "fp32"}],
            "runtime": "onnxruntime",
            "machine": "aarch64",
        },
    },
    budget={
        "export": (
            Limit(metric="size.model", at_most=32 << 20),
            Limit(metric="latency.p95", at_most=100, on_device=True),
            Limit(metric="memory.peak", at_most=256 << 20, on_device=True),
        )
    },
    needs=("onnxruntime",),
)
