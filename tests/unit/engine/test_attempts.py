from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.gate import Reason, Verdict
from pipeline.engine.attempts import acceptable, choice, closeness, following
from pipeline.engine.step import Step
from tests.fake_line.plans import at_least, at_most, step

GOOD = Verdict(reasons=(Reason(metric="size.model", ok=True, text="fine", margin=1.0),))
BAD = Verdict(reasons=(Reason(metric="size.model", ok=False, text="too big", margin=-1.0),))
TEST = Verdict(reasons=(Reason(metric="accuracy.robust.test", ok=False, text="too low", margin=-0.1),))
BOTH = Verdict(reasons=(*BAD.reasons, *TEST.reasons))
INVALID = Verdict(reasons=(Reason(metric="validity", ok=False, text="masked"),))

THREE = step("compress", attempts=[{"ratio": 0.9}, {"ratio": 0.5}, {"ratio": 0.1}])


def ratio(step_: Step, verdicts: list[Verdict]) -> float | None:
    attempt = following(step_, verdicts)
    return None if attempt is None else attempt.config["ratio"]


def test_attempts_run_from_the_boldest_until_one_passes() -> None:
    assert ratio(THREE, []) == 0.9
    assert ratio(THREE, [BAD]) == 0.5
    assert ratio(THREE, [BAD, GOOD]) is None
    assert ratio(THREE, [BAD, BAD, BAD]) is None


def test_a_refusal_on_the_test_split_never_triggers_another_attempt() -> None:
    assert ratio(THREE, [TEST]) is None
    assert choice([BAD, TEST], ()) == 1


def test_the_test_split_has_no_say_where_the_hold_out_asks_for_another_attempt() -> None:
    assert ratio(THREE, [BOTH]) == ratio(THREE, [BAD]) == 0.5
    assert not acceptable(BOTH)


def test_an_invalid_result_is_refused_whatever_its_numbers_and_the_next_attempt_is_made() -> None:
    assert ratio(THREE, [INVALID]) == 0.5
    assert not acceptable(INVALID)
    assert choice([INVALID, GOOD], ()) == 1
    assert choice([INVALID, BAD], ()) == choice([BAD, INVALID], ()) + 1 == 1  # the farthest off of all
    masked = Verdict(reasons=(*GOOD.reasons, *INVALID.reasons))
    assert not acceptable(masked)


def test_where_the_checks_themselves_are_run_an_invalid_result_ends_the_step() -> None:
    weaker = step("validate", attempts=[{"hits": 40}, {"hits": 90}])
    assert following(weaker, [INVALID]) is None
    assert choice([INVALID], ()) == 0


def bisected(boldest: float, gentlest: float, probes: int, integer: bool) -> Step:
    knob = {"knob": "ratio", "boldest": boldest, "gentlest": gentlest, "probes": probes, "integer": integer}
    return step("compress", bisect=knob)


def search(step_: Step, passes: Callable[[float], bool]) -> tuple[list[float], float | None]:
    """All values tried, and the one that counts if any passed."""
    tried: list[float] = []
    verdicts: list[Verdict] = []
    while (attempt := following(step_, verdicts)) is not None:
        tried.append(attempt.config["ratio"])
        verdicts.append(GOOD if passes(tried[-1]) else BAD)
        assert len(tried) <= 100
    index = choice(verdicts, ())
    return tried, tried[index] if verdicts[index].passed else None


@given(
    ends=st.tuples(st.floats(-10, 10), st.floats(-10, 10)).filter(lambda e: abs(e[0] - e[1]) > 1e-6),
    edge=st.floats(-11, 11),
    probes=st.integers(2, 12),
)
def test_bisection_closes_in_on_the_boldest_value_that_passes(
    ends: tuple[float, float], edge: float, probes: int
) -> None:
    boldest, gentlest = ends
    up = boldest > gentlest

    def passes(value: float) -> bool:
        return value <= edge if up else value >= edge

    tried, best = search(bisected(boldest, gentlest, probes, False), passes)
    assert len(tried) <= probes
    assert len(set(tried)) == len(tried)
    passing = [value for value in tried if passes(value)]
    assert best == ((max(passing) if up else min(passing)) if passing else None)
    if passes(boldest):
        assert tried == [boldest]
    elif not passes(gentlest):
        assert tried == [boldest, gentlest]
        assert best is None
    else:
        assert best is not None
        reach = abs(boldest - gentlest) / 2 ** (len(tried) - 2)
        assert abs(best - edge) <= reach + 1e-9


@given(low=st.integers(-20, 20), span=st.integers(1, 40), edge=st.integers(-25, 65), up=st.booleans())
def test_integer_bisection_finds_the_boldest_whole_number(low: int, span: int, edge: int, up: bool) -> None:
    boldest, gentlest = (low + span, low) if up else (low, low + span)

    def passes(value: float) -> bool:
        return value <= edge if up else value >= edge

    tried, best = search(bisected(boldest, gentlest, 40, True), passes)
    assert all(isinstance(value, int) for value in tried)
    fitting = [value for value in range(low, low + span + 1) if passes(value)]
    assert best == ((max(fitting) if up else min(fitting)) if fitting else None)


def test_bisection_is_the_same_again_given_the_same_outcomes() -> None:
    one = search(bisected(0.9, 0.1, 6, False), lambda value: value < 0.37)
    assert one == search(bisected(0.9, 0.1, 6, False), lambda value: value < 0.37)
    assert one[0] == pytest.approx([0.9, 0.1, 0.5, 0.3, 0.4, 0.35])
    assert one[1] == pytest.approx(0.35)


def test_the_closest_attempt_has_the_largest_worst_margin_relative_to_its_bound() -> None:
    budget = (at_least("accuracy.robust.holdout", 0.5), at_most("size.model", 1000.0))

    def verdict(accuracy: float, size: float) -> Verdict:
        margins = {"accuracy.robust.holdout": accuracy, "size.model": size}
        return Verdict(reasons=tuple(Reason(metric=n, ok=m >= 0, text=n, margin=m) for n, m in margins.items()))

    far, near, tie = verdict(-0.25, 10.0), verdict(-0.05, -300.0), verdict(-0.15, 1.0)
    assert [round(closeness(v, budget), 12) for v in (far, near, tie)] == [-0.5, -0.3, -0.3]
    assert choice([far, near, tie], budget) == 1  # of equals the bolder


def test_what_was_not_measured_is_the_farthest_and_a_bound_of_zero_counts_absolutely() -> None:
    missing = Verdict(reasons=(Reason(metric="size.model", ok=False, text="not measured"),))
    off = Verdict(reasons=(Reason(metric="size.model", ok=False, text="off", margin=-7.0),))
    assert closeness(missing, ()) == float("-inf")
    assert closeness(off, (at_most("size.model", 0.0),)) == -7.0
    assert choice([missing, off], ()) == 1
