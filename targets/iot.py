"""Any small Linux board: a tight budget of bytes and memory, `.ort` beside the ONNX for a runtime of few operators.

Memory is held here as well as owed: what the model costs beyond the runtime differs little between processors, and a
build that cannot fit should not need a board to say so.
"""

from pipeline.core.gate import Limit
from pipeline.core.target import Target

TARGET = Target(
    name="iot",
    summary="int8 in at most 1 MiB, on onnxruntime or its small build; speed settled on the board",
    sections={
        "export": {
            "precisions": {
                "int8": ["fold_constants", "qdq_int8_cpu", "ort_format"],
                "int8_kept": ["fold_constants", {"pass": "qdq_int8_cpu", "keep": ["first", "last"]}, "ort_format"],
            },
            "attempts": [{"precision": "int8"}, {"precision": "int8_kept"}],
            "runtime": "onnxruntime",
            "machine": "aarch64",
        },
    },
    budget={
        "search": (Limit(metric="cost.macs", at_most=50_000_000),),
        "export": (
            Limit(metric="size.model", at_most=1 << 20),
            Limit(metric="memory.peak", at_most=32 << 20),
            Limit(metric="memory.peak", at_most=32 << 20, on_device=True),
            Limit(metric="latency.p95", at_most=250, on_device=True),
        ),
    },
    needs=("onnxruntime",),
)
