"""The gate: measurements, budget and baseline in, verdict with reasons out. A pure function."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Literal, Self

from pydantic import Field, model_validator

from pipeline.core.measurement import Measurement
from pipeline.core.value import Value


class Limit(Value):
    """A demand on one metric; at least one of the three bounds is set.

    `at_least` is held against the low end of the interval, `at_most` against the high end, `max_loss` against the
    baseline's value in the worse direction, in the metric's own unit. A limit that is `on_device` is owed: it is not
    judged here but carried by the bundle and settled by `finish` on the device.
    """

    metric: str
    at_least: float | None = None
    at_most: float | None = None
    max_loss: float | None = Field(default=None, ge=0)
    on_device: bool = False

    @model_validator(mode="after")
    def _demands_something(self) -> Self:
        if self.at_least is None and self.at_most is None and self.max_loss is None:
            raise ValueError(f'limit on "{self.metric}": expected at_least, at_most or max_loss, got none of them')
        if self.on_device and self.max_loss is not None:
            raise ValueError(f'limit on "{self.metric}": max_loss has no baseline on the device; use at_most')
        return self

    @property
    def reads_test(self) -> bool:
        """True where the metric was measured on the test split, so that no choice may depend on it."""
        return self.metric.endswith(".test")


Budget = tuple[Limit, ...]

_UNITS = {
    "accuracy.": "fraction",
    "detector.": "fraction",
    "parity.top1": "fraction",
    "parity.logits": "logit",
    "latency.": "ms",
    "memory.": "bytes",
    "size.": "bytes",
    "cost.": "count",
}


class Reason(Value):
    """One sentence of a verdict. `margin` is how far inside (positive) or outside the bound, in the metric's unit.

    `bound` is the number that was held against: the limit's own or, for `max_loss`, the worst value that the baseline
    leaves. `demand` says which of the limit's demands this is; it is None for findings and for what was not measured.
    """

    metric: str
    ok: bool
    text: str
    margin: float | None = None
    bound: float | None = None
    demand: Literal["at_least", "at_most", "max_loss", "owed"] | None = None


class Verdict(Value):
    reasons: tuple[Reason, ...] = ()

    @property
    def passed(self) -> bool:
        return all(reason.ok for reason in self.reasons)

    @property
    def refusals(self) -> tuple[Reason, ...]:
        return tuple(reason for reason in self.reasons if not reason.ok)


def judge(
    measured: Iterable[Measurement],
    budget: Budget,
    baseline: Mapping[str, Measurement],
    findings: Iterable[str] = (),
) -> Verdict:
    """Hold measurements against a budget.

    A limit whose metric was not measured refuses, and so does a `max_loss` without a baseline. Every finding of a
    stage (a validity check that failed, say) refuses too, whatever the numbers. Reasons come in sorted order, so the
    order of the budget does not matter.
    """
    by_name = {m.name: m for m in measured}
    reasons = [Reason(metric="validity", ok=False, text=text) for text in findings]
    for limit in budget:
        if limit.on_device:
            reasons.append(Reason(metric=limit.metric, ok=True, text=_owed(limit), demand="owed"))
            continue
        found = by_name.get(limit.metric)
        if found is None:
            reasons.append(Reason(metric=limit.metric, ok=False, text=f"{limit.metric} was not measured"))
            continue
        if limit.at_least is not None:
            reasons.append(_at_least(found, limit.at_least))
        if limit.at_most is not None:
            reasons.append(_at_most(found, limit.at_most))
        if limit.max_loss is not None:
            reasons.append(_max_loss(found, baseline.get(limit.metric), limit.max_loss))
    return Verdict(reasons=tuple(sorted(reasons, key=lambda r: (r.metric, r.text))))


def show(value: float, unit: str) -> str:
    """A number as people write it: four digits, with the unit where it has one."""
    if unit in ("bytes", "count") and value == int(value):
        return f"{int(value):,}" + (" bytes" if unit == "bytes" else "")
    return f"{value:.4g}" + ("" if unit in ("fraction", "logit", "count") else f" {unit}")


def bounds(limit: Limit) -> str:
    """`>= 0.5 and <= 20 ms`: the absolute bounds, in the unit that the metric's name implies."""
    unit = _unit(limit.metric) or "fraction"
    ends = ((">=", limit.at_least), ("<=", limit.at_most))
    return " and ".join(f"{sign} {show(end, unit)}" for sign, end in ends if end is not None)


def beyond(limit: Limit) -> Iterator[tuple[str, str]]:
    """The bounds that every value meets or none can: key and sentence.

    Shares lie in [0, 1], everything else that is measured is at least 0. The ends themselves are legal bounds: a limit
    of 0 asks that a number be measured, one of 1 is hard and not impossible.
    """
    unit = _unit(limit.metric)
    for key, bound in (("at_least", limit.at_least), ("at_most", limit.at_most), ("max_loss", limit.max_loss)):
        if bound is None or unit is None:
            continue
        if unit == "fraction" and not 0 <= bound <= 1:
            hint = f"; did you mean {bound / 100:g}?" if 1 < bound <= 100 else ""
            yield key, f"expected 0 to 1, since {limit.metric} is a share, got {bound:g}{hint}"
        elif bound < 0:
            yield key, f"expected at least 0, since {limit.metric} is never below, got {bound:g}"
    if limit.at_least is not None and limit.at_most is not None and limit.at_least > limit.at_most:
        yield (
            "at_most",
            (
                f"expected at least {limit.at_least:g}, which is at_least of the same limit on {limit.metric}, "
                f"got {limit.at_most:g}; no value meets both"
            ),
        )


def _unit(metric: str) -> str | None:
    return next((unit for prefix, unit in _UNITS.items() if metric.startswith(prefix)), None)


def _owed(limit: Limit) -> str:
    return f"owed on the device: {limit.metric} must be {bounds(limit)} (settled by `finish`)"


def _end(found: Measurement, end: float, word: str) -> str:
    if found.low == found.high:
        return show(end, found.unit)
    return f"{show(end, found.unit)} (95 % {word} of {show(found.value, found.unit)}, {found.samples} samples)"


def _at_least(found: Measurement, bound: float) -> Reason:
    margin = found.low - bound
    text = f"{found.name} {_end(found, found.low, 'low')} must be >= {show(bound, found.unit)}"
    return Reason(metric=found.name, ok=margin >= 0, text=text, margin=margin, bound=bound, demand="at_least")


def _at_most(found: Measurement, bound: float) -> Reason:
    margin = bound - found.high
    text = f"{found.name} {_end(found, found.high, 'high')} must be <= {show(bound, found.unit)}"
    return Reason(metric=found.name, ok=margin >= 0, text=text, margin=margin, bound=bound, demand="at_most")


def _max_loss(found: Measurement, before: Measurement | None, allowed: float) -> Reason:
    if before is None:
        return Reason(metric=found.name, ok=False, text=f"{found.name} has no baseline to compare with")
    loss = before.value - found.value if found.better == "higher" else found.value - before.value
    worst = before.value - allowed if found.better == "higher" else before.value + allowed
    text = (
        f"{found.name} {show(found.value, found.unit)} was {show(before.value, found.unit)}: "
        f"a loss of {show(loss, found.unit)} must be <= {show(allowed, found.unit)}"
    )
    # Values of a share differ by multiples of 1/n; the last bits of the subtraction must not decide a verdict.
    ok, margin = loss <= allowed + 1e-12, allowed - loss
    return Reason(metric=found.name, ok=ok, text=text, margin=margin, bound=worst, demand="max_loss")
