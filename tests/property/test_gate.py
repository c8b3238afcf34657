"""The gate is monotone in every measurement, refuses what is missing, and does not care about order."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from pipeline.core.gate import Limit, beyond, judge
from pipeline.core.measurement import Measurement, exact, fraction, wilson

_COUNTS = st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))
_SHARE = st.floats(0, 1)


@given(_COUNTS, _SHARE)
def test_more_hits_never_turn_a_pass_into_a_refusal(counts: tuple[int, int], bound: float) -> None:
    hits, total = counts
    limit = (Limit(metric="accuracy.clean.test", at_least=bound),)
    passed = judge([fraction("accuracy.clean.test", hits, total)], limit, {}).passed
    better = judge([fraction("accuracy.clean.test", min(hits + 1, total), total)], limit, {}).passed
    assert better or not passed


@given(_COUNTS, _SHARE)
def test_the_low_end_is_what_counts(counts: tuple[int, int], bound: float) -> None:
    measured = fraction("a.b", *counts)
    verdict = judge([measured], (Limit(metric="a.b", at_least=bound),), {})
    assert verdict.passed == (measured.low >= bound)


@given(st.permutations([("a", 0.1), ("b", 0.9), ("c", 0.5)]))
def test_budget_order_is_irrelevant(rows: list[tuple[str, float]]) -> None:
    measured = [fraction(name, 50, 100) for name in "abc"]
    budget = tuple(Limit(metric=name, at_least=bound) for name, bound in rows)
    straight = tuple(Limit(metric=name, at_least=bound) for name, bound in sorted(rows))
    assert judge(measured, budget, {}) == judge(measured, straight, {})


def test_missing_measurement_refuses() -> None:
    verdict = judge([], (Limit(metric="size.model", at_most=10),), {})
    assert not verdict.passed
    assert verdict.reasons[0].text == "size.model was not measured"


def test_missing_baseline_refuses() -> None:
    verdict = judge([exact("size.model", 5, "bytes")], (Limit(metric="size.model", max_loss=1),), {})
    assert "no baseline" in verdict.refusals[0].text


def test_owed_limit_passes_and_says_so() -> None:
    verdict = judge([], (Limit(metric="latency.p95", at_most=5, on_device=True),), {})
    assert verdict.passed
    assert "owed on the device" in verdict.reasons[0].text


@given(_COUNTS, _SHARE, st.sampled_from(["at_least", "at_most", "max_loss"]), st.sampled_from(["higher", "lower"]))
def test_a_reason_holds_the_bound_that_its_margin_is_measured_from(
    counts: tuple[int, int], bound: float, demand: str, better: str
) -> None:
    measured = fraction("a.b", *counts).model_copy(update={"better": better})
    before = measured.model_copy(update={"value": 0.5})
    limit = Limit.model_validate({"metric": "a.b", demand: bound})
    (reason,) = judge([measured], (limit,), {"a.b": before}).reasons
    assert reason.demand == demand
    assert reason.bound is not None
    above = demand == "at_least" or (demand == "max_loss" and better == "higher")
    end = {"at_least": measured.low, "at_most": measured.high, "max_loss": measured.value}[demand]
    assert reason.margin == pytest.approx((end - reason.bound) if above else (reason.bound - end))
    assert judge([], (Limit(metric="a.b", at_most=1, on_device=True),), {}).reasons[0].demand == "owed"


def test_finding_refuses_whatever_the_numbers() -> None:
    assert not judge([], (), {}, findings=["accuracy at eps 1 is 0.9"]).passed


@given(st.floats(0, 100), st.floats(0, 100), st.floats(0, 50), st.sampled_from(["higher", "lower"]))
def test_max_loss_counts_in_the_worse_direction(before: float, after: float, allowed: float, better: str) -> None:
    def of(value: float) -> Measurement:
        return exact("m", value, "ms", "higher" if better == "higher" else "lower")

    verdict = judge([of(after)], (Limit(metric="m", max_loss=allowed),), {"m": of(before)})
    worse = before - after if better == "higher" else after - before
    assert verdict.passed == (worse <= allowed + 1e-12)


@pytest.mark.parametrize(
    ("hits", "total", "low", "high"),
    # Newcombe (1998), table I, method 3: Wilson's score interval.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_against_published_values(hits: int, total: int, low: float, high: float) -> None:
    assert wilson(hits, total) == pytest.approx((low, high), abs=6e-5)


@given(_COUNTS)
def test_wilson_contains_the_share_and_mirrors(counts: tuple[int, int]) -> None:
    hits, total = counts
    low, high = wilson(hits, total)
    mirrored = wilson(total - hits, total)
    assert 0 <= low <= hits / total <= high <= 1
    assert (1 - high, 1 - low) == pytest.approx(mirrored, abs=1e-12)


def test_impossible_counts_are_refused() -> None:
    with pytest.raises(ValueError, match="0 <= hits <= total"):
        wilson(5, 4)


def test_limit_without_a_bound_is_refused() -> None:
    with pytest.raises(ValidationError, match="at_least, at_most or max_loss"):
        Limit(metric="a")


def test_interval_that_misses_its_value_is_refused() -> None:
    with pytest.raises(ValidationError, match="low <= value <= high"):
        Measurement(name="a", value=2, low=0, high=1, unit="ms", samples=1, better="lower")


METRICS = st.sampled_from(["accuracy.robust.test", "parity.top1", "parity.logits", "size.model", "latency.p95"])


@given(METRICS, st.floats(-1e6, 1e6), st.sampled_from(["at_least", "at_most"]))
def test_a_bound_is_beyond_a_metric_exactly_where_no_value_lies_on_it(metric: str, bound: float, key: str) -> None:
    top = 1.0 if metric in ("accuracy.robust.test", "parity.top1") else math.inf
    found = list(beyond(Limit.load({"metric": metric, key: bound})))
    assert [k for k, _ in found] == ([] if 0 <= bound <= top else [key])
