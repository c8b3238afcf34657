"""Bounds of a quantised graph as it runs: rounding to codes is one more monotone operation."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from stages.bounds._trace import trace
from stages.bounds.base import AnyCertifier, Box, Certifier
from stages.bounds.crown_ibp import CrownIBP
from stages.bounds.ibp import check
from stages.method import InputError


class Quantised(Certifier):
    """`inner` on a graph with Q/DQ nodes, imported as `stages.nn.imported` does, whatever kernels run it.

        q(x) = clip(round(x / s) + z, lo, hi),   x' = s (q - z)

    Clipping and rounding are monotone and exact, so an interval goes through them end by end, and x' lies within one
    step of any value that x may take. An integer kernel fuses several nodes, and sums and rescales in another order
    than the graph: where its value before a rounding is off by a unit in the last place, the code may be off by one,
    and with it everything after. That is covered, not assumed away: every value is widened, before it is rounded, by
    what float32 can lose in a sum of its length (`arithmetic = "float32"` of `inner`, which is required) and by 2^-10
    of a step more, for kernels that fold zero points into their sums; integer sums lose nothing, and a fused rescaling
    rounds no more often than the nodes it replaces.

    Not covered: graphs that onnxruntime rewrites to others before it runs them; nothing counts as proved of files that
    hold one (`stages.engine_kernels`). x86 without VNNI adds pairs of 8-bit products in 16 bits and saturates, which no
    rounding bounds. Sessions that set `session.x64quantprecision`, as `targets/runtime/ort.py` does, and weights of 7
    bits, the default of `qdq_int8_cpu`, do not. Half precision has no rule. A graph without rounding is bounded like
    any other.

    Source: none that we follow; interval arithmetic on quantised networks is folklore.
    """

    inner: AnyCertifier = CrownIBP()
    covers_rounding: ClassVar[bool] = True

    def lower(self, net: nn.Module, box: Box, rows: Tensor) -> Tensor:
        """Raises `InputError` where `inner` covers exact arithmetic only, or the graph holds half precision."""
        if getattr(self.inner, "arithmetic", "float32") != "float32":
            raise InputError(
                'quantised: expected an inner certifier with arithmetic = "float32"; codes flip by rounding'
            )
        check(box, rows)
        for op in trace(net, box.low).ops:
            if op.kind == "_to_copy" and op.kwargs.get("dtype") in (torch.float16, torch.bfloat16):
                raise InputError("quantised: the graph holds half precision, which has no rule; certify the int8 file")
        return self.inner.lower(net, box, rows)
