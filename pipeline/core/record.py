"""What a run leaves behind: all that a report, a comparison or a rerun needs, as JSON."""

import base64
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field

from pipeline.core.canonical import digest
from pipeline.core.gate import Verdict
from pipeline.core.measurement import Measurement
from pipeline.core.spec import Spec
from pipeline.core.value import Value

SCHEMA: Literal[1] = 1


class Artifact(Value):
    """Name -> SHA-256; equal digests mean equal bytes."""

    stage: str
    files: dict[str, str]


class Outcomes(Value):
    """One bit per example behind an accuracy, so that two records can be compared example by example.

    `examples` is the digest of the list of example numbers; two outcomes pair up only where it is equal. `bits` is
    base64 of the hits packed eight to a byte, first example in the highest bit.
    """

    examples: str
    count: int = Field(ge=1)
    bits: str

    @staticmethod
    def of(examples: Sequence[int], hits: Sequence[bool]) -> "Outcomes":
        """`examples` are indices within the split; `hits[i]` says whether `examples[i]` was right."""
        if len(examples) != len(hits):
            raise ValueError(f"outcomes: expected one hit per example, got {len(hits)} for {len(examples)}")
        packed = bytearray((len(hits) + 7) // 8)
        for i, hit in enumerate(hits):
            if hit:
                packed[i // 8] |= 0x80 >> (i % 8)
        return Outcomes(
            examples=digest([int(i) for i in examples]), count=len(hits), bits=base64.b64encode(packed).decode()
        )

    def hits(self) -> tuple[bool, ...]:
        packed = base64.b64decode(self.bits)
        return tuple(bool(packed[i // 8] & (0x80 >> (i % 8))) for i in range(self.count))


class StageRecord(Value):
    """One attempt at one stage; of several attempts the one with `chosen` counts."""

    name: str
    attempt: int = 0
    overrides: dict[str, Any] = {}
    chosen: bool = True
    key: str
    reused: bool
    seconds: float
    config: dict[str, Any]
    artifact: Artifact
    measurements: tuple[Measurement, ...]
    outcomes: dict[str, Outcomes] = {}
    verdict: Verdict


class RunRecord(Value):
    """All a report, a comparison or a rerun needs. `refused` is the stage whose gate ended the run, if one did."""

    schema_version: Literal[1] = SCHEMA
    name: str
    spec: Spec
    spec_digest: str
    data_digest: str
    environment: dict[str, str]
    stages: tuple[StageRecord, ...] = ()
    complete: bool = False
    refused: str | None = None

    def chosen(self) -> tuple[StageRecord, ...]:
        return tuple(stage for stage in self.stages if stage.chosen)

    def latest(self) -> dict[str, Measurement]:
        """The newest measurement of every metric, from the attempts that count."""
        return {m.name: m for stage in self.chosen() for m in stage.measurements}

    def outcomes(self) -> dict[str, Outcomes]:
        return {name: bits for stage in self.chosen() for name, bits in stage.outcomes.items()}
