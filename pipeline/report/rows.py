"""What renderers read: a record as rows, series and prose, ready to be shown."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pipeline.report.figures import Confusion, CurvePoint, Finding, Shares

Status = Literal["passed", "refused", "set aside", "not reached"]


@dataclass(frozen=True, slots=True)
class Bar:
    """What was held against a bound: an interval, or one value where the number or the comparison is exact.

    `allowed` is the side of the bound that passes.
    """

    low: float
    value: float
    high: float
    bound: float
    unit: str
    allowed: Literal["above", "below"]
    ok: bool


@dataclass(frozen=True, slots=True)
class Demand:
    """One reason of a verdict. An owed one is settled on the device."""

    metric: str
    ok: bool
    owed: bool
    text: str
    margin: str
    bar: Bar | None


@dataclass(frozen=True, slots=True)
class Number:
    """One measurement as people read it; `name` is the metric's dotted name."""

    name: str
    title: str
    value: str
    interval: str
    samples: str


@dataclass(frozen=True, slots=True)
class AttemptView:
    number: int
    status: Status
    overrides: str
    reused: bool
    seconds: str
    key: str
    demands: tuple[Demand, ...]
    numbers: tuple[Number, ...]

    @property
    def refusals(self) -> tuple[str, ...]:
        return tuple(demand.text for demand in self.demands if not demand.ok)


@dataclass(frozen=True, slots=True)
class StageView:
    """A stage of the line; `counted` is the attempt whose numbers stand, None where the line never came so far."""

    name: str
    purpose: str
    method: str
    status: Status
    attempts: tuple[AttemptView, ...]
    counted: AttemptView | None


@dataclass(frozen=True, slots=True)
class Point:
    """One attempt in the plane of cost and accuracy; `counted` is False where its gate set it aside."""

    label: str
    series: str
    x: float
    y: float
    low: float
    high: float
    counted: bool


@dataclass(frozen=True, slots=True)
class Scatter:
    title: str
    unit: str
    points: tuple[Point, ...]


@dataclass(frozen=True, slots=True)
class Tile:
    """One of the big numbers on top."""

    title: str
    value: str
    note: str
    kind: str


@dataclass(frozen=True, slots=True)
class TwinView:
    """Three data URIs and the class names under them."""

    clean: str
    adversarial: str
    difference: str
    label: str
    clean_prediction: str
    adversarial_prediction: str

    @property
    def fooled(self) -> bool:
        return self.adversarial_prediction != self.label


@dataclass(frozen=True, slots=True)
class Table:
    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True)
class ChangeRow:
    """One metric against the baseline; `detail` says what ruled."""

    metric: str
    stage: str
    before: str
    after: str
    word: str
    regressed: bool
    detail: str


@dataclass(frozen=True, slots=True)
class View:
    name: str
    target: str
    status: Literal["passed", "refused", "unfinished"]
    headline: str
    sentences: tuple[str, ...]
    owed: tuple[str, ...]
    tiles: tuple[Tile, ...]
    stages: tuple[StageView, ...]
    scatters: tuple[Scatter, ...]
    curve: tuple[CurvePoint, ...]
    eps: float | None
    confusion: Confusion | None
    confused: tuple[str, ...]
    twins: tuple[TwinView, ...]
    validity: tuple[Finding, ...]
    verdicts: tuple[Shares, ...]
    attacks: Table | None
    training: tuple[Mapping[str, Any], ...]
    tables: tuple[Table, ...]
    meaning: tuple[tuple[str, str], ...]
    environment: tuple[tuple[str, str], ...]
    digests: tuple[tuple[str, str], ...]
    artifacts: tuple[tuple[str, str, str], ...]
    problems: tuple[str, ...]
    changes: tuple[ChangeRow, ...] | None
