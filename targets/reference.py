"""The reference: the float32 graph as exported, on onnxruntime's processor. Copy this page to add a device."""

from pipeline.core.gate import Limit
from pipeline.core.target import Target

TARGET = Target(
    name="reference",
    summary="float32 on onnxruntime, any processor; nothing is lowered",
    sections={
        "export": {
            "precisions": {"fp32": []},
            "attempts": [{"precision": "fp32"}],
            "runtime": "onnxruntime",
        }
    },
    budget={
        "export": (
            # Of an interval's low end: 0.971 where all 130 held-out digits agree, 0.985 for 256 images.
            Limit(metric="parity.top1", at_least=0.97),
            Limit(metric="size.model", at_most=512 << 20),
            Limit(metric="latency.p95", at_most=1000),
            Limit(metric="memory.peak", at_most=2 << 30),
        )
    },
    needs=("onnxruntime",),
)
