"""Numbers and findings in words; every renderer says them the same way."""

from collections.abc import Sequence

from pipeline.core.gate import show
from pipeline.core.measurement import Measurement

_STEPS = (
    ("bytes", 1 << 30, "GiB"),
    ("bytes", 1 << 20, "MiB"),
    ("bytes", 1 << 10, "KiB"),
    ("count", 1_000_000_000, "G"),
    ("count", 1_000_000, "M"),
)


def quantity(value: float, unit: str) -> str:
    """Short, for tables and axes: 96.1 %, 184 KiB, 0.42 ms, 1.3 M, 42."""
    if unit == "fraction":
        return f"{100 * value:.1f} %"
    for kind, size, name in _STEPS:
        if unit == kind and abs(value) >= size:
            return f"{_three(value / size)} {name}"
    return f"{_three(value)} ms" if unit == "ms" else show(value, unit)


def _three(value: float) -> str:
    """Three digits, more before the point where there are more, and never an exponent: 0.0799, 23.5, 1013."""
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def interval(m: Measurement) -> str:
    """`94.3 to 97.3 %`; empty where the number is exact."""
    if m.low == m.high:
        return ""
    if m.unit == "fraction":
        return share_between(m.low, m.high)
    low, high = quantity(m.low, m.unit), quantity(m.high, m.unit)
    unit = f" {high.rpartition(' ')[2]}"
    return f"{low.removesuffix(unit)} to {high}"  # a unit that both share is said once


def share_between(low: float, high: float) -> str:
    return f"{100 * low:.1f} to {100 * high:.1f} %"


def brief(m: Measurement | None) -> str:
    """The value with its interval, or a dash for what was not measured."""
    if m is None:
        return "-"
    between = interval(m)
    return f"{quantity(m.value, m.unit)} ({between})" if between else quantity(m.value, m.unit)


def margin(value: float, unit: str) -> str:
    """How far inside or outside a bound; shares differ by points, not per cent."""
    size = abs(value)
    amount = f"{100 * size:.1f} points" if unit == "fraction" else quantity(size, unit)
    return f"{amount} inside" if value >= 0 else f"{amount} outside"


def metric_title(name: str) -> str:
    """`accuracy.robust.pgd.test` -> `robust accuracy (pgd), test`; `detector.` likewise."""
    kind, *rest = name.split(".")
    if kind in ("accuracy", "detector") and rest:
        split = [part for part in rest if part in ("holdout", "test")]
        inner = [part for part in rest[1:] if part not in ("holdout", "test")]
        detail = f" ({', '.join(inner)})" if inner else ""
        what = f"{rest[0]} accuracy" if kind == "accuracy" else f"detector: {rest[0].replace('_', ' ')}"
        return f"{what}{detail}{', ' if split else ''}{', '.join(split).replace('holdout', 'hold-out')}"
    known = {
        "cost.params": "parameters",
        "cost.macs": "multiply-adds",
        "size.weights": "weights in training precision",
        "size.model": "model file that runs",
        "size.bundle": "whole bundle",
        "memory.peak": "peak memory",
        "latency.p50": "latency, median",
        "latency.p95": "latency, 95th percentile",
        "parity.logits": "largest change of a logit by export",
        "parity.top1": "same answer after export",
        "gap.certified": "share of images whose proof lowering costs",
    }
    return known.get(name, name.replace(".", " "))


def cell(value: object) -> str:
    """A value of a log row: floats to four digits, the rest as it is."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: ""}[value]
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return settings(value)
    if isinstance(value, list | tuple):
        return ", ".join(cell(item) for item in value)
    return str(value)


def settings(table: dict[str, object], skip: Sequence[str] = ()) -> str:
    """`ratio = 0.75, kind = prune`; empty for an empty table. What is left to the method (None) is not named."""
    return ", ".join(f"{key} = {cell(value)}" for key, value in table.items() if key not in skip and value is not None)


def threat(task: dict[str, object]) -> str:
    """`a change of up to 0.1 in every pixel`, as the norm of the task's threat has it; pixels run from 0 to 1."""
    section = task.get("threat")
    if not isinstance(section, dict) or "eps" not in section:
        return "an attack"
    eps = cell(section["eps"])
    if isinstance(section["eps"], float) and abs(section["eps"] * 255 - round(section["eps"] * 255)) < 1e-6:
        eps = f"{round(section['eps'] * 255)}/255"
    forms = {
        "linf": f"a change of up to {eps} in every pixel",
        "l2": f"a change of Euclidean length up to {eps}",
        "l1": f"a change of at most {eps} summed over all pixels",
    }
    return forms.get(str(section.get("norm")), f"a change of size {eps}")


def duration(seconds: float) -> str:
    if seconds < 1:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s"
