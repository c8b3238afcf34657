"""From fractions to float32: what a search may use lies inside, what a proof covers lies outside."""

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from stages.method import InputError
from stages.verification.cases import Cases
from stages.verification.clock import Clock
from stages.verification.model import Model
from stages.verification.verdict import Trial
from stages.verification.vnnlib import Region, Row, Spec, parse
from tests.specs import any_of, layers, mlp, spec

F = Fraction
ROW = Row(((0, F(1)),), F(0))


def cases(
    low: Fraction, high: Fraction, row: Row = ROW, open_sides: frozenset[tuple[int, bool]] = frozenset()
) -> Cases:
    return Cases.of(Spec(1, 2, (Region((low,), (high,), ((row,),), open_sides),)), 2)


@pytest.mark.parametrize(
    ("low", "high"), [(F(1, 10), F(1, 5)), (F(-1, 3), F(2, 3)), (F(0), F(1, 2)), (F(-7), F(-1, 7))]
)
def test_the_inner_box_is_the_largest_and_the_outer_one_the_smallest(low: Fraction, high: Fraction) -> None:
    found = cases(low, high)
    a, b = F(float(found.inner_low)), F(float(found.inner_high))
    c, d = F(float(found.low)), F(float(found.high))
    assert c <= low <= a <= b <= high <= d
    for end, side in ((a, -np.inf), (b, np.inf)):
        beyond = F(float(np.nextafter(np.float32(float(end)), np.float32(side))))
        assert not low <= beyond <= high
    assert a == low or c < low
    assert b == high or d > high


def test_an_interval_without_a_float32_gets_the_nearest_and_the_proof_covers_it() -> None:
    found = cases(F(1, 10), F(1, 10))
    assert float(found.inner_low) == float(found.inner_high) == np.float32(0.1)
    assert float(found.low) < float(found.high) == np.float32(0.1)


def test_an_open_side_has_no_end_point() -> None:
    found = cases(F(0), F(1), open_sides=frozenset({(0, True)}))
    assert float(found.inner_high) < 1 == float(found.high)
    assert float(found.inner_low) == 0


@pytest.mark.parametrize("open_sides", [{(0, False), (0, True)}, {(0, False)}, {(0, True)}])
@pytest.mark.parametrize("low", [F(1, 2), F(1, 2) + F(1, 10**9)])
def test_an_open_interval_without_a_float32_has_no_witness(low: Fraction, open_sides: set[tuple[int, bool]]) -> None:
    region = Region((low,), (F(1, 2) + F(1, 10**8),), ((ROW,),), frozenset(open_sides))
    held = low == F(1, 2) and open_sides == {(0, True)}  # 1/2 itself is inside then
    found = Cases.of(Spec(1, 2, (region,)), 2)
    assert found.witnessed(np.array([0.5], np.float32), np.zeros(2, np.float32)) is held
    assert found.low <= 0.5 < float(low + F(1, 10**9)) < found.high


def test_rows_become_whole_numbers_and_bounds_are_rounded_up() -> None:
    found = cases(F(0), F(1), Row(((0, F(1, 10)), (1, F(-3, 10))), F(1, 30)))
    assert found.rows.tolist() == [[1.0, -3.0]]
    assert 0 <= F(float(found.bounds)) - F(1, 3) < F(1, 10**15)


def test_equal_rows_are_kept_once() -> None:
    rows = [Row(((1, F(1)),), F(2)), Row(((1, F(2)),), F(3)), ROW]
    found = Cases.of(Spec(1, 2, (Region((F(0),), (F(1),), ((rows[0],), (rows[1], rows[2]))),)), 2)
    assert found.rows.tolist() == [[0, 1], [1, 0]]
    assert found.bounds.tolist() == [[2, torch.inf], [1.5, 0]]
    assert found.region.tolist() == [0, 0]


def test_a_witness_counts_only_inside_and_without_rounding() -> None:
    found = cases(F(0), F(1), Row(((0, F(1)),), F(1, 10)))
    inside, y = np.array([0.5], np.float32), np.array([0.1, 0.0], np.float32)
    assert not found.witnessed(inside, y)  # the float32 next to 0.1 lies above it
    assert found.witnessed(inside, np.nextafter(y, np.float32(-1)))
    assert not found.witnessed(np.array([1.5], np.float32), -y)
    assert not found.witnessed(inside, np.array([np.nan, 0.0], np.float32))


def test_a_strict_constraint_is_not_met_at_its_bound() -> None:
    inside, y = np.array([0.5], np.float32), np.zeros(2, np.float32)
    assert cases(F(0), F(1), ROW).witnessed(inside, y)
    assert not cases(F(0), F(1), Row(ROW.weights, ROW.bound, strict=True)).witnessed(inside, y)


@pytest.mark.parametrize(
    ("row", "message"),
    [(Row(((0, F(10**20 + 1, 10**19)),), F(0)), "has more digits than float64 holds"), (ROW, "2 outputs .* has 3")],
)
def test_what_cannot_be_exact_or_does_not_fit_is_refused(row: Row, message: str) -> None:
    spec = Spec(1, 2, (Region((F(0),), (F(1),), ((Row((*row.weights, (1, F(1))), row.bound),),)),))
    with pytest.raises(InputError, match=message):
        Cases.of(spec, 3 if "3" in message else 2)


def test_factors_that_float32_does_not_hold_prove_nothing(tmp_path: Path) -> None:
    """Bounds are formed of factors in float32; one that is rounded there would be another constraint."""
    model = Model(mlp(tmp_path / "net.onnx", layers([2, 3, 2], 0), (1, 2)), 2)
    for factor, word in ((0.5, "unsat"), (0.123456789, "unknown")):
        text = spec([0.0, 0.0], [1.0, 1.0], 2, any_of([[([factor, 1.0], -1e4)]]))
        answer = Trial(model, Cases.of(parse(text), 2), Clock(1.0), lambda _: None).answer()
        assert answer.word == word
    assert "more digits than float32 holds" in answer.reason


@pytest.mark.parametrize(("unsafe", "word"), [("(>= Y_0 1e400)", "unsat"), ("(<= Y_0 1e400)", "sat")])
def test_outputs_may_be_bounded_by_numbers_beyond_float64(unsafe: str, word: str, tmp_path: Path) -> None:
    net = [(np.eye(2), np.zeros(2))]
    model = Model(mlp(tmp_path / "net.onnx", net, (1, 2)), 2)
    text = spec([0.0, 0.0], [1.0, 1.0], 2, f"(assert {unsafe})")
    assert Trial(model, Cases.of(parse(text), 2), Clock(1.0), lambda _: None).answer().word == word


@pytest.mark.parametrize(
    ("box", "message"),
    [
        ("(>= X_0 0)(<= X_0 1e400)", "infinite in float32"),
        ("(>= X_0 1e400)(<= X_0 1)", r"lower bound 1.0*e\+400"),
        ("(>= X_0 0)(<= X_0 1)(<= (+ (* 1e400 Y_0) Y_1) 0)", r"factor 1.0*e\+400"),
    ],
)
def test_numbers_that_are_too_large_are_told(box: str, message: str) -> None:
    declared = "(declare-const X_0 Real)(declare-const Y_0 Real)(declare-const Y_1 Real)(assert (<= Y_0 0))"
    with pytest.raises(InputError, match=message):
        Cases.of(parse(f"{declared}(assert (and {box}))"), 2)
