"""An x86 server or PC: int8 with unsigned activations, which is the fast recipe there; measured on this machine."""

from pipeline.core.gate import Limit
from pipeline.core.target import Target

TARGET = Target(
    name="x86_cpu",
    summary="int8 (else float32) on onnxruntime, x86 processors",
    sections={
        "export": {
            "precisions": {
                "int8": ["fold_constants", "qdq_int8_cpu"],
                "int8_kept": ["fold_constants", {"pass": "qdq_int8_cpu", "keep": ["first", "last"]}],
                "fp32": ["fold_constants"],
            },
            "attempts": [{"precision": "int8"}, {"precision": "int8_kept"}, {"precision": "fp32"}],
            "runtime": "onnxruntime",
        }
    },
    budget={
        "export": (
            Limit(metric="size.model", at_most=256 << 20),
            Limit(metric="latency.p95", at_most=200),
            Limit(metric="memory.peak", at_most=1 << 30),
        )
    },
    needs=("onnxruntime",),
)
