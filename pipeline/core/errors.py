"""Everything that can go wrong, with the exit status it ends in.

    TemperError             1..4
    ├── GateRefused         1  a measurement did not meet the budget
    ├── BadInput            2  the user gave something that cannot be used (spec, data, bundle, baseline, store, disk)
    │   ├── SpecError       2  several findings in a spec, reported together
    │   └── Tampered        2  bytes differ from their recorded digest
    ├── StageFailed         3  a stage raised, crashed or timed out
    └── Regressed           4  `ci` found a metric worse than the baseline allows

Libraries in `stages` and `targets` raise their own `ValueError`, `FileNotFoundError` or a subclass of `InputError`
(`stages/method.py`); the engine turns an `InputError` into `BadInput`, anything else into `StageFailed`.
"""

import difflib
from collections.abc import Iterable, Sequence

PASSED = 0


class TemperError(Exception):
    """Root of the tree; `status` is the exit status of the process."""

    status = 1


class GateRefused(TemperError):
    status = 1


class BadInput(TemperError):
    status = 2


class SpecError(BadInput):
    """All findings of a plan at once; each line says where, what was expected and what came."""

    def __init__(self, findings: Sequence[str]) -> None:
        self.findings = tuple(findings)
        super().__init__("\n".join(self.findings))


class Tampered(BadInput):
    """A file whose bytes are not the recorded ones."""


class StageFailed(TemperError):
    status = 3


class Regressed(TemperError):
    status = 4


def nearest(name: str, valid: Iterable[str]) -> str:
    """`'; did you mean "pgd"?'` where a valid name is close, else the list of all valid ones."""
    names = sorted(valid)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if close:
        return f'; did you mean "{close[0]}"?'
    return f"; there is {', '.join(names)}" if names else "; there is none"
