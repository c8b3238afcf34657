"""What a stage is: a module with a typed config and a pure function from files to files and measurements."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

from pydantic import BaseModel

from pipeline.core.measurement import Measurement
from pipeline.core.record import Outcomes

ORDER = ("search", "train", "compress", "validate", "export")

MEASURING = ("attacks", "certify", "holdout_attack", "holdout_samples", "samples")
"""Keys of a stage's config that say how it measures; numbers of two runs compare only where these are equal."""

Files = Mapping[str, Path]
Emit = Callable[[str, Mapping[str, object]], None]
C = TypeVar("C", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class Context:
    """Everything impure that a stage may touch, handed over explicitly.

    `task` is the spec's own section, `data_root` where its files lie, `scratch` a folder that survives a crash and is
    named by the cache key, so that whatever half-done work is found there was made by the same config, data and code.
    `emit("progress", {"label": "epoch 3", "done": 17, "total": 60})` reports; `emit("note", {"text": ...})` tells.
    """

    task: Mapping[str, Any]
    data_root: Path
    seed: int
    scratch: Path
    emit: Emit
    device: str = "cpu"
    rank: int = 0
    world: int = 1


@dataclass(frozen=True, slots=True)
class Result:
    """Files by name (an input file listed again passes through for free), numbers, and what must refuse the gate.

    `outcomes` keeps, per accuracy metric, one bit per example, for paired tests. `findings` are sentences of failed
    validity checks; any one of them refuses the gate.
    """

    files: Files
    measurements: tuple[Measurement, ...] = ()
    outcomes: Mapping[str, Outcomes] = field(default_factory=dict)
    findings: tuple[str, ...] = ()


class Stage(Protocol[C]):
    """Satisfied by a module: `stages/train.py` is one.

    `measures` names every metric that a run with this config will report, so that a plan can refuse a limit on any
    other. `LIBRARIES` are the distributions whose versions are part of the cache key.
    """

    LIBRARIES: tuple[str, ...]

    @property
    def Config(self) -> type[C]: ...
    def measures(self, config: C, task: Mapping[str, Any], /) -> frozenset[str]: ...
    def run(self, files: Files, config: C, ctx: Context, /) -> Result: ...
