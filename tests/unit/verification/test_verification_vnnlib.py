"""The competition's files, as they are written there and as they should not be."""

from fractions import Fraction

import pytest

from stages.method import InputError
from stages.verification.vnnlib import Row, parse

HEAD = "(declare-const X_0 Real)\n(declare-const X_1 Real)\n(declare-const Y_0 Real)\n(declare-const Y_1 Real)\n"
BOX = "(assert (>= X_0 -1))\n(assert (<= X_0 0.5))\n(assert (<= -2.5e-01 X_1))\n(assert (>= 1E0 X_1))\n"


def rows(text: str) -> tuple[tuple[Row, ...], ...]:
    [region] = parse(HEAD + BOX + text).regions
    return region.unsafe


def test_a_box_is_read_from_either_side_and_in_any_notation() -> None:
    spec = parse(f"; a comment (with a parenthesis\n(set-logic LRA)\n{HEAD}{BOX}(assert (<= Y_0 Y_1)) ; another\n")
    [region] = spec.regions
    assert (spec.inputs, spec.outputs) == (2, 2)
    assert list(map(float, region.low)) == [-1, -0.25]
    assert list(map(float, region.high)) == [0.5, 1]
    assert region.unsafe == ((Row(((0, Fraction(1)), (1, Fraction(-1))), Fraction(0)),),)


@pytest.mark.parametrize(
    ("text", "weights", "bound", "strict"),
    [
        ("(<= Y_0 1.5)", {0: 1}, 1.5, False),
        ("(>= Y_0 1.5)", {0: -1}, -1.5, False),
        ("(< Y_0 (- 1.5))", {0: 1}, -1.5, True),
        ("(> Y_0 Y_1)", {0: -1, 1: 1}, 0, True),
        ("(<= (+ (* 2.0 Y_0) (- Y_1) 1) 3)", {0: 2, 1: -1}, 2, False),
        ("(<= (- Y_0 Y_1 2) (* Y_1 0.5))", {0: 1, 1: -1.5}, 2, False),
        ("(<= (* 2 (+ Y_0 1) 3) (/ Y_1 4))", {0: 6, 1: -0.25}, -6, False),
        ("(<= (+ Y_0 Y_1) Y_1)", {0: 1}, 0, False),
    ],
)
def test_a_constraint_becomes_a_row(text: str, weights: dict[int, float], bound: float, strict: bool) -> None:
    [[row]] = rows(f"(assert {text})")
    assert dict(row.weights) == {k: Fraction(weight) for k, weight in weights.items()}
    assert (row.bound, row.strict) == (Fraction(bound), strict)


def test_an_equality_is_two_rows() -> None:
    assert len(rows("(assert (= Y_0 2))")[0]) == len(rows("(assert (== Y_0 Y_1))")[0]) == 2


def test_disjunctions_multiply_out() -> None:
    found = rows(
        "(assert (or (and (<= Y_0 1) (or (<= Y_1 1) (<= Y_1 2))) (<= Y_0 3)))(assert (or (<= Y_1 4) (<= Y_1 5)))"
    )
    assert [[float(row.bound) for row in cube] for cube in found] == [
        [1, 1, 4],
        [1, 1, 5],
        [1, 2, 4],
        [1, 2, 5],
        [3, 4],
        [3, 5],
    ]


def test_disjunctions_over_boxes_become_regions() -> None:
    text = """(assert (or
        (and (<= X_0 0.5) (>= X_0 0) (<= X_1 1) (>= X_1 0) (<= Y_0 1))
        (and (<= X_0 0.5) (>= X_0 0) (<= X_1 1) (>= X_1 0) (<= Y_0 2) (>= Y_1 2))
        (and (<= X_0 -0.5) (>= X_0 -1) (<= X_1 1) (>= X_1 0) (<= Y_0 3))))"""
    first, second = parse(HEAD + text).regions
    assert ([*map(float, first.low)], [*map(float, first.high)], len(first.unsafe)) == ([0, 0], [0.5, 1], 2)
    assert ([*map(float, second.low)], [*map(float, second.high)], len(second.unsafe)) == ([-1, 0], [-0.5, 1], 1)


def test_regions_are_cut_with_the_outer_box_and_empty_ones_are_left_out() -> None:
    spec = parse(HEAD + BOX + "(assert (or (and (>= X_0 0) (<= Y_0 1)) (and (>= X_0 2) (<= Y_0 1))))")
    [region] = spec.regions
    assert (float(region.low[0]), float(region.high[0])) == (0, 0.5)


@pytest.mark.parametrize(
    "text",
    [
        "(<= 2 1)",
        "(or)",
        "(or (and (>= X_0 0.75) (<= Y_0 1)) (and (<= X_1 -1) (<= Y_0 1)))",
        "(and (< X_0 -1) (<= Y_0 1))",
        "(or (and (<= 1 0) (<= Y_0 1)) (< 1 1))",
    ],
)
def test_a_formula_that_nothing_satisfies_has_no_region(text: str) -> None:
    assert parse(f"{HEAD}{BOX}(assert {text})").regions == ()


def test_fractions_and_decimals_are_compared_exactly() -> None:
    third = "(/ 1 3)"
    [region] = parse(f"{HEAD}{BOX}(assert (<= X_0 {third}))(assert (<= X_0 0.333333333333333333333333334))").regions
    assert region.high[0] == Fraction(1, 3)
    [region] = parse(f"{HEAD}{BOX}(assert (<= X_0 {third}))(assert (<= X_0 0.333333333333333333333333333))").regions
    assert Fraction(region.high[0]) == Fraction("0.333333333333333333333333333")


def test_the_tighter_end_stays_and_an_open_one_is_tighter() -> None:
    text = "(assert (<= X_0 0.25))(assert (< X_0 0.25))(assert (<= X_0 0.25))(assert (> X_0 -1))(assert (>= X_0 -2))"
    [region] = parse(HEAD + BOX + text).regions
    assert (float(region.low[0]), float(region.high[0])) == (-1, 0.25)
    assert region.open_sides == {(0, True), (0, False)}


def test_an_open_side_is_remembered() -> None:
    [region] = parse(HEAD + BOX + "(assert (< X_0 0.5))(assert (<= Y_0 1))").regions
    assert region.open_sides == {(0, True)}


def test_version_2_counts_row_by_row() -> None:
    spec = parse(
        """(vnnlib-version <2.0>)
        (declare-network f (declare-input X float32 [1,2,2]) (declare-output Y float32 [1, 2]))
        (assert (and (>= X[0,0,0] 0.0) (<= X[0, 0, 0] 1.0) (>= X[0,0,1] 1) (<= X[0,0,1] 2)))
        (assert (and (>= X[0,1,0] 2.0) (<= X[0,1,0] 3.0) (>= X[0,1,1] 3) (<= X[0,1,1] 4)))
        (assert (or (<= Y[0,1] 0.5) (> Y[0,0] 100.0)))"""
    )
    assert [*map(float, spec.regions[0].low)] == [0, 1, 2, 3]
    assert [cube[0].weights for cube in spec.regions[0].unsafe] == [((1, Fraction(1)),), ((0, Fraction(-1)),)]


def test_version_2_has_numbers_without_a_shape() -> None:
    declared = "(declare-network f (declare-input X real [2]) (declare-output Y real []))"
    box = "(assert (and (<= (* -1.0 X[0]) 0) (<= X[0] 1) (>= X[1] 0) (<= X[1] 1)))"
    found = parse(f"{declared}{box}(assert (<= Y[0] -3.0))")
    assert (found.outputs, float(found.regions[0].low[0]), len(found.regions[0].unsafe)) == (1, 0.0, 1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected inputs X_0, X_1, ... and outputs Y_0, ... to be declared"),
        ("X_0 <= 1", 'line 1: expected "(assert ...", got "X_0"; is this VNN-LIB?'),
        (HEAD + "(assert (<= Y_0 1)", "line 5: a parenthesis is never closed"),
        (HEAD + BOX + "(assert (<= Y_7 1))", 'line 9: unknown variable "Y_7"; declared are X_0 to X_1 and Y_0 to Y_1'),
        (HEAD + BOX + "(assert (<= Z 1))", 'unknown variable "Z"'),
        (HEAD + BOX + "(assert (<= (* Y_0 Y_1) 1))", "(* Y_0 Y_1): a product of variables; only linear"),
        (HEAD + BOX + "(assert (<= (/ 1 Y_0) 1))", "division by a variable"),
        (HEAD + BOX + "(assert (<= (sin Y_0) 1))", 'function "sin": unknown function'),
        (HEAD + BOX + "(assert (=> Y_0 1))", 'operator "=>": unknown operator; did you mean'),
        (HEAD + BOX + "(assert (<= X_0 X_1))", "expected a bound of one input, or a constraint of outputs alone"),
        (HEAD + BOX + "(assert (<= X_0 Y_1))", "expected a bound of one input"),
        (HEAD + BOX + "(asert (<= Y_0 1))", 'form "asert": unknown form; did you mean "assert"?'),
        (HEAD + BOX + "(assert (<= Y_0 1) (<= Y_1 1))", "assert takes one formula, got 2"),
        (HEAD + BOX + "(assert (<= Y_0 1e99999))", 'cannot read the number "1e99999"; expected 0.5'),
        (HEAD + BOX + "(assert (<= Y_0 -0x1p3))", 'cannot read the number "-0x1p3"'),
        (
            "(declare-const X_99999999999 Real)(declare-const Y_0 Real)(assert (<= Y_0 1))",
            "input X_0 has no lower bound",
        ),
        (HEAD + BOX + "(assert Y_0)", "expected a constraint such as"),
        (HEAD + BOX + "(assert (<= Y_0 1 2))", "<= compares two terms"),
        (HEAD + BOX + "(assert (<= Y_0 inf))", 'unknown variable "inf"'),
        (HEAD + "(assert (<= X_0 1))(assert (<= Y_0 1))", "input X_0 has no lower bound, so the box is infinite"),
        (
            HEAD + BOX + "(assert (>= X_0 0.75))(assert (<= Y_0 1))",
            "inverted: input X_0 has lower bound 0.75 and upper",
        ),
        ("(declare-const X_0 Int)", "line 1: expected (declare-const X_0 Real)"),
        ("(declare-network f (declare-input X real [2]))(declare-network g)", "expected one network"),
        ("(declare-network f (declare-input X real [2]) (declare-input Z real [2]))", "one input and one output"),
        ("(" * 300, "more than 200 parentheses inside each other"),
        ("()", "expected a word after the first parenthesis"),
        ("(<= X_0 1)", 'line 1: expected "(assert ...", got "(<= X_0 1)"'),
        (HEAD + BOX + "(assert (or (<= Y_0 1) (<= Y_1 1)))" * 18, "multiply to 262144 cases; at most 200000"),
    ],
)
def test_what_cannot_be_used_is_refused(text: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        parse(text, "s.vnnlib")
    assert str(caught.value).startswith("s.vnnlib")
    assert message in str(caught.value)


def test_variables_may_be_functions_of_nothing() -> None:
    declared = "(declare-fun X_0 () Real)(declare-fun Y_0 () Real)"
    found = parse(f"{declared}(assert (and (<= X_0 1) (>= X_0 0) (<= Y_0 2)))")
    assert (found.inputs, found.outputs, [float(high) for high in found.regions[0].high]) == (1, 1, [1.0])
