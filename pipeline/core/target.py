"""A device, as data: `targets/jetson.py` holds one."""

from typing import Any

from pipeline.core.gate import Budget
from pipeline.core.value import Value


class Target(Value):
    """Defaults for spec sections, demands for the gate, and what must be installed before the line starts.

    `sections` lie under the spec's own (the spec wins, key by key). `budget` is added to the spec's; a limit of the
    spec on the same stage and metric replaces the target's. `needs` are distributions, such as `onnxruntime`.
    """

    name: str
    summary: str
    sections: dict[str, dict[str, Any]] = {}
    budget: dict[str, Budget] = {}
    needs: tuple[str, ...] = ()
