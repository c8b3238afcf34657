"""Branch and bound with beta-CROWN (Wang et al. 2021): complete on ReLU networks, given time."""

import time
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from stages.bounds import _sweep
from stages.bounds._decide import BENT, decide
from stages.bounds._interval import outward
from stages.bounds._trace import trace
from stages.bounds.base import Box, Certifier
from stages.bounds.ibp import check


class BranchAndBound(Certifier):
    """CROWN first; what it leaves open is attacked, then split at open ReLUs until proved, refuted or out of time.

    `seconds` is the time per image (those that need none leave theirs to the others). The answer for a row is the least
    bound over its domains: above `lead` where proved, if only just where branching was needed; at most `lead` where
    refuted or open. It is never below CROWN's. Answers of rows that run out of time depend on the machine's speed, but
    stay sound; with `limit` domains and time enough they do not depend on it.

    Source: Wang et al., "Beta-CROWN: Efficient Bound Propagation with Per-neuron Split Constraints for Neural Network
    Robustness Verification", 2021; see `_decide` for the method and the departures.
    """

    arithmetic: Literal["real", "float32"] = "float32"
    seconds: float = Field(default=10.0, gt=0)
    limit: int = Field(default=1_000_000, ge=1)
    domains: int = Field(default=64, ge=1)
    steps: int = Field(default=20, ge=1)
    box_steps: int = Field(default=5, ge=0)
    memory: float = Field(default=2.0, gt=0)
    lead: float = Field(default=0.0, ge=0)

    def lower(self, net: nn.Module, box: Box, rows: Tensor) -> Tensor:
        check(box, rows)
        bends = sum(op.kind in BENT for op in trace(net, box.low).ops)
        copies = 4 * (1 + bends) * _sweep.COPIES
        start, done = time.monotonic(), 0

        def lower(some: Box, theirs: Tensor) -> Tensor:
            nonlocal done
            done += len(theirs)
            left = start + self.seconds * done - time.monotonic()
            return self._lower(net, some, theirs, max(left, self.seconds))

        return _sweep.grouped(net, box, rows, lower, self.memory, self.arithmetic == "real", copies)

    def _lower(self, net: nn.Module, box: Box, rows: Tensor, seconds: float) -> Tensor:
        lead = torch.tensor(self.lead, dtype=rows.dtype)
        found = decide(
            net,
            box,
            rows,
            seconds,
            # What is proved is above a number of the rows' own precision, so the answer is no less than that one.
            float(torch.nextafter(lead, torch.full_like(lead, torch.inf))),
            arithmetic=self.arithmetic,
            domains=self.domains,
            limit=self.limit,
            steps=self.steps,
            box_steps=self.box_steps,
            memory=self.memory,
        )
        return outward(found.lower, rows.dtype, -float("inf"))
