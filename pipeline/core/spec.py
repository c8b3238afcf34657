"""The spec: one file says everything. Sections stay opaque here; `plan` has their owners parse them."""

from typing import Any

from pydantic import Field

from pipeline.core.gate import Budget
from pipeline.core.value import Value


class Spec(Value):
    """`stages` holds one section per stage, `budget` and `regression` limits per stage.

    Budgets are in no cache key: a tighter one judges the stored measurements again and reruns nothing.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    seed: int = Field(default=0, ge=0)
    target: str = "reference"
    task: dict[str, Any]
    stages: dict[str, dict[str, Any]] = {}
    budget: dict[str, Budget] = {}
    regression: dict[str, Budget] = {}
