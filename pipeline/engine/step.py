"""What a plan consists of; the runner reads nothing else."""

from typing import Any, Literal

from pipeline.core.canonical import digest
from pipeline.core.gate import Budget
from pipeline.core.spec import Spec
from pipeline.core.value import Value


class Attempt(Value):
    """One full config of a stage, defaults included; `overrides` are what this attempt changed.

    `code` is the digest of every module that a run with this config can reach.
    """

    overrides: dict[str, Any]
    config: dict[str, Any]
    code: str


class Bisect(Value):
    """Look for the boldest value of one knob that passes: `boldest` and `gentlest` first, then halving between.

    `path` leads to the knob within the full config, which may nest what the spec writes flat.
    """

    knob: str
    path: tuple[str, ...]
    boldest: float
    gentlest: float
    probes: int
    integer: bool
    base: Attempt

    def attempt(self, value: float) -> Attempt:
        """The base attempt with the knob at `value` (a whole number for integer knobs)."""
        turned = round(value) if self.integer else value
        return Attempt(
            overrides={self.knob: turned}, config=_with(self.base.config, self.path, turned), code=self.base.code
        )


def _with(config: dict[str, Any], path: tuple[str, ...], value: float) -> dict[str, Any]:
    inner = value if len(path) == 1 else _with(config[path[0]], path[1:], value)
    return {**config, path[0]: inner}


class Step(Value):
    """One stage of the line, ready to run. `attempts` go from the boldest to the gentlest; empty with `bisect`."""

    name: str
    module: str
    attempts: tuple[Attempt, ...]
    bisect: Bisect | None = None
    budget: Budget
    libraries: dict[str, str]
    seed: int
    timeout_seconds: float | None = None
    procs: int = 1

    def key(self, attempt: Attempt, task: dict[str, Any], data: str, inputs: dict[str, str]) -> str:
        """The cache key: everything that the outcome depends on, and nothing else (no budget, path, target or time)."""
        return digest(
            [
                "outcome",
                self.name,
                attempt.config,
                attempt.code,
                task,
                data,
                sorted(inputs.items()),
                sorted(self.libraries.items()),
                self.seed,
            ]
        )


class Plan(Value):
    """Everything decided before anything expensive starts. `spec` has the target's sections and budgets merged in."""

    schema_version: Literal[1] = 1
    spec: Spec
    spec_digest: str
    data_digest: str
    steps: tuple[Step, ...]
