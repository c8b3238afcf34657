"""Branch and bound over ReLUs for the cases of a specification, with rounds of the search for a witness in between."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stages.bounds._decide import decide
from stages.bounds.base import Box
from stages.verification.cases import Array, Cases
from stages.verification.clock import Clock
from stages.verification.falsify import Hunt

_REGIONS = 16
_DOMAINS = 256
_BOX_STEPS, _STEPS = 10, 3
_MEMORY = 1.0  # GiB of coefficients
_SHARE = 8  # one part in so many of the time is the search's


@dataclass(slots=True)
class Branching:
    """Every row that an open case asks for is put to `decide`; a case is refuted where one of its rows is proved.

    Regions are taken `_REGIONS` at a time. A point that refutes the bounds of a case's only row is a witness if
    onnxruntime says so.
    """

    net: nn.Module
    cases: Cases
    hunt: Hunt
    hunted: float = 0.0
    witness: Array | None = None

    def run(self, still: Tensor, clock: Clock) -> tuple[Tensor, Array | None]:
        """The cases of int64 `still` that stay open, and a witness if the search met one on the way."""
        parts = torch.split(torch.unique(self.cases.region[still]), _REGIONS)
        for done, regions in enumerate(parts):
            if self.witness is None and clock.left() > 0:
                still = self._refute(regions, still, clock.share(1 / (len(parts) - done)))
        return still, self.witness

    def _refute(self, regions: Tensor, still: Tensor, clock: Clock) -> Tensor:
        case, row = self._asked(regions, still)  # [B, R], -1 where a region asks for fewer rows
        real = case >= 0
        goal = torch.where(real, self.cases.bounds[case.clamp(min=0), row], -torch.inf)
        alone = real & (self.cases.bounds.isfinite().sum(1)[case.clamp(min=0)] == 1)
        tried = torch.zeros_like(real)

        def pause(open_: Tensor, broken: Tensor, points: Tensor) -> Tensor:
            for place in (broken & alone & ~tried).nonzero().tolist():
                tried[tuple(place)] = True
                self._confirm(points[tuple(place)], int(case[tuple(place)]))
            begun, proved = torch.unique(case[real]), real & ~open_ & ~broken
            closed = torch.unique(case[proved])
            self._hunt(begun[~torch.isin(begun, closed)], clock)
            return torch.isin(case, closed) if self.witness is None and clock.left() > 0 else torch.ones_like(open_)

        rows = self.cases.rows.to(self.cases.low.dtype)[row]
        box = Box(self.cases.low[regions], self.cases.high[regions])
        found = decide(
            self.net,
            box,
            rows,
            max(clock.left(), 1e-3),
            goal,
            domains=_DOMAINS,
            steps=_STEPS,
            box_steps=_BOX_STEPS,
            memory=_MEMORY,
            pause=pause,
        )
        refuted = torch.unique(case[real & (found.lower > goal)])
        return still[~torch.isin(still, refuted)]

    def _asked(self, regions: Tensor, still: Tensor) -> tuple[Tensor, Tensor]:
        """For every region its open cases and the rows of each, as pairs."""
        pairs = []
        for region in regions:
            mine = still[self.cases.region[still] == region]
            at, row = self.cases.bounds[mine].isfinite().nonzero(as_tuple=True)
            pairs.append((mine[at], row))
        case = torch.full((len(pairs), max(len(row) for _, row in pairs)), -1)
        rows = torch.zeros_like(case)
        for i, (cases, row) in enumerate(pairs):
            case[i, : len(row)], rows[i, : len(row)] = cases, row
        return case, rows

    def _confirm(self, point: Tensor, case: int) -> None:
        region = int(self.cases.region[case])
        x: Array = point.clamp(self.cases.inner_low[region], self.cases.inner_high[region]).numpy()
        if self.witness is None and self.hunt.check(x):
            self.witness = x

    def _hunt(self, cases: Tensor, clock: Clock) -> None:
        if self.witness is None and self.hunted < clock.spent() / _SHARE:
            began = clock.spent()
            self.witness = self.hunt.round(cases, clock)
            self.hunted += clock.spent() - began
