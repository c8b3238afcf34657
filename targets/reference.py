"""The reference: the float32 graph as exported, on onnxruntime's processor. Copy this page to add a device.

A limit on a share can only be met by enough images: write down from how many on, as below.
"""

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
            # Held against the low end of Wilson's interval, which for n images that all agree is n / (n + 3.84). 0.9 is
            # within reach from 35 held-out images on, 0.97 would be from 125; of 130 up to 6 may disagree, of 256 up to
            # 16. A float32 file that is not the network is refused before, at a thousandth of a logit.
            Limit(metric="parity.top1", at_least=0.9),
            Limit(metric="size.model", at_most=512 << 20),
            Limit(metric="latency.p95", at_most=1000),
            Limit(metric="memory.peak", at_most=2 << 30),
        )
    },
    needs=("onnxruntime",),
)
