"""What every attack and certifier did to every example: one file in JSON lines, documented in docs/evidence.md.

The first line is the header, every other line one example. Equal evidence gives equal bytes.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from pydantic import Field, ValidationError
from torch import Tensor

from stages.attacks.auto import standard
from stages.attacks.base import Attack
from stages.evaluate import outputs
from stages.method import InputError, Value
from stages.nn import _atomic
from stages.oracle import Logits
from stages.threat import Threat
from stages.unproved import Reason

CLEAN = "clean"
"""`broken_by` of an example that is wrong without any attack."""

T = TypeVar("T", bound=Value)

Strength = Literal["quick", "standard"]


def strength(attacks: Sequence[Attack]) -> Strength:
    """Standard is a set that holds the reference ensemble at its reference settings; any other is quick."""
    return "standard" if standard(attacks) else "quick"


class Header(Value):
    """What was asked. `attacks`, `certifiers` and `estimators` map a name to the full settings, `smoothing` is an
    audit's; `model` is the SHA-256 of the weights file's bytes after those of the architecture's; `examples` counts the
    lines that follow."""

    schema_version: Literal[3] = 3
    threat: dict[str, Any]
    split: str
    strength: Strength
    attacks: dict[str, dict[str, Any]]
    certifiers: dict[str, dict[str, Any]]
    estimators: dict[str, dict[str, Any]] = {}
    smoothing: dict[str, Any] | None = None
    seed: int
    model: str
    examples: int


class Spending(Value):
    """Forward and backward passes of one attack for one example; the checks around the attack are not counted."""

    queries: int = Field(ge=0)
    gradients: int = Field(ge=0)


class OfSmoothed(Value):
    """What holds for the smoothed classifier, not for the file: its answer, how many noisy copies were given it, the l2
    radius within which it stays (at the confidence in the header), and whether it abstained."""

    answer: int
    count: int = Field(ge=0)
    radius: float = Field(ge=0)
    abstained: bool


class Example(Value):
    """One example. `survived` and `spent` name the attacks that had a try: an attack that comes after a proof or an
    attack that settled the answer may have none. Margins are the true class's lead in logits, negative where the answer
    is wrong.

    `margin_attacked`, `distance` (in the threat's norm) and `attacked` (the prediction) belong to the stored
    adversarial input, which is the one with the lowest margin of all that broke it; an unbroken example is stored as
    it is. `certified` holds sound lower bounds of the margin within the threat, null where a certifier says nothing;
    `unproved` says in a word why none proves the example (`stages.unproved`), null where one does or none was asked.
    `estimated_margin` is no bound, and `smoothed` speaks of another classifier; an audit fills them in if asked.
    `open` marks an example without a verdict: the gate's was certain before its turn came.
    """

    index: int
    label: int
    clean: int
    attacked: int
    survived: dict[str, bool]
    spent: dict[str, Spending]
    broken_by: str | None
    stored: str | None
    margin: float
    margin_attacked: float
    distance: float
    certified: dict[str, bool]
    certified_margin: dict[str, float | None]
    unproved: Reason | None = None
    estimated_margin: dict[str, float | None] = {}
    smoothed: OfSmoothed | None = None
    open: bool = False


@dataclass(frozen=True, slots=True)
class Evidence:
    header: Header
    examples: tuple[Example, ...]


def write(path: Path, header: Header, examples: Iterable[Example]) -> None:
    """Atomically; raises `InputError` where the header counts other than the examples given."""
    rows = list(examples)
    if header.examples != len(rows):
        raise InputError(f"evidence: the header counts {header.examples} examples, got {len(rows)}")
    _atomic.write(path, b"".join(_line(row.dump()) for row in (header, *rows)))


def read(path: Path) -> Evidence:
    """Raises `InputError` naming the line that does not fit, a newer schema, or a file that is cut short."""
    try:
        lines = path.read_bytes().decode().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as evidence: {error}") from error
    if not lines:
        raise InputError(f"{path}: expected a header line, got an empty file")
    first = _json(path, 1, lines[0])
    version = first.get("schema_version")
    if version != 3:
        raise InputError(f"{path}: line 1: expected evidence of schema 3, got {version!r}; use its Temper")
    header = _load(path, 1, Header, first)
    examples = tuple(_load(path, n, Example, _json(path, n, line)) for n, line in enumerate(lines[1:], 2))
    if len(examples) != header.examples:
        raise InputError(
            f"{path}: the header counts {header.examples} examples, got {len(examples)}; is the file cut short?"
        )
    return Evidence(header, examples)


@dataclass(frozen=True, slots=True)
class Recheck:
    """bool [N] each: within the ball, within the range, and not classified as y."""

    in_ball: Tensor
    in_range: Tensor
    wrong: Tensor

    @property
    def holds(self) -> Tensor:
        return self.in_ball & self.in_range & self.wrong


def recheck(logits: Logits, x: Tensor, x_adv: Tensor, y: Tensor, threat: Threat, tolerance: float = 1e-6) -> Recheck:
    """Judge adversarial examples [N, C, H, W] without the code that made them, and in float64.

    The ball is allowed `tolerance` and, for the sums of l2 and l1, one part in 100,000 of eps; the range nothing.
    """
    distance = _distance(x_adv, x, threat)
    slack = tolerance if threat.norm == "linf" else tolerance + 1e-5 * threat.eps
    flat = x_adv.flatten(1)
    return Recheck(
        in_ball=distance <= threat.eps + slack,
        in_range=(flat.amin(1) >= threat.low) & (flat.amax(1) <= threat.high),
        wrong=outputs(logits, x_adv).argmax(1) != y,
    )


def on_grid(x_adv: Tensor, x: Tensor, threat: Threat, levels: int = 255) -> Tensor:
    """What an image file of `levels` + 1 steps a channel can hold of `x_adv` [N, C, H, W], within the ball around x.

    The nearest such image; where that leaves the ball, every pixel is rounded towards x instead, which cannot. Raises
    `InputError` where x itself is not on the grid. `recheck` on the result says which examples survive a file.
    """
    off = float((x.double() * levels - (x.double() * levels).round()).abs().max()) if x.numel() else 0.0
    if off > 1e-3:
        raise InputError(f"grid: expected images on the grid of {levels} steps, got one {off:.3g} steps off it")
    origin, wanted = (x.double() * levels).round(), x_adv.double() * levels
    nearest = (wanted.round() / levels).to(x.dtype)
    towards = ((origin + (wanted - origin).trunc()) / levels).to(x.dtype)
    inside = _distance(nearest, x, threat) <= threat.eps + 1e-6
    return torch.where(inside.view((-1,) + (1,) * (x.dim() - 1)), nearest, towards)


def _distance(x_adv: Tensor, x: Tensor, threat: Threat) -> Tensor:
    """[N] in float64."""
    delta = (x_adv.double() - x.double()).flatten(1)
    if threat.norm == "linf":
        return delta.abs().amax(1)
    return delta.square().sum(1).sqrt() if threat.norm == "l2" else delta.abs().sum(1)


def lead(z: Tensor, y: Tensor) -> Tensor:
    """z_y - max_{k != y} z_k, [N]."""
    true = z.gather(1, y.unsqueeze(1)).squeeze(1)
    rest: Tensor = z.scatter(1, y.unsqueeze(1), float("-inf")).amax(1)
    return true - rest


def worst(x: Tensor, found: dict[str, Tensor], logits: Logits, y: Tensor) -> tuple[Tensor, list[str | None]]:
    """Per example the adversarial input of lowest lead [N, C, H, W], and the name of its attack.

    `found` maps an attack's name to inputs that equal x where it broke nothing. Of equal ones the first counts.
    """
    best = x.clone()
    chosen: list[str | None] = [None] * len(x)
    lowest = torch.full((len(x),), float("inf"), device=x.device)
    for name, x_adv in found.items():
        rows = (x_adv != x).flatten(1).any(1).nonzero().flatten()
        if len(rows) == 0:
            continue
        leads = lead(outputs(logits, x_adv[rows]), y[rows])
        lower = leads < lowest[rows]
        best[rows[lower]], lowest[rows[lower]] = x_adv[rows[lower]], leads[lower]
        for row in rows[lower].tolist():
            chosen[row] = name
    return best, chosen


def _line(data: dict[str, Any]) -> bytes:
    return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode() + b"\n"


def _json(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except ValueError as error:
        raise InputError(f"{path}: line {number}: expected JSON: {error}") from error
    if not isinstance(found, dict):
        raise InputError(f"{path}: line {number}: expected a table, got {type(found).__name__}")
    return found


def _load(path: Path, number: int, kind: type[T], data: dict[str, Any]) -> T:
    try:
        return kind.load(data)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in problem["loc"])
        raise InputError(f"{path}: line {number}: {where}: {problem['msg']}") from error
