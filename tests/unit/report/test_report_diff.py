"""What counts as a regression between two records, and which baselines are refused."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from pipeline.core.errors import BadInput
from pipeline.core.gate import Budget, Limit
from pipeline.core.measurement import Measurement, exact, fraction
from pipeline.core.record import Outcomes, RunRecord, StageRecord
from pipeline.report.diff import Change, Comparison, check_baseline, compare
from tests.unit.report import sample

ROBUST, SHIPPED = "accuracy.robust.test", "accuracy.robust.shipped.test"
WHERE = Path("record.json")


def changed(comparison: Comparison, stage: str, metric: str) -> Change:
    return next(c for c in comparison.changes if (c.stage, c.metric) == (stage, metric))


def without_limits(record: RunRecord) -> RunRecord:
    return with_limits(record, {})


def with_limits(record: RunRecord, regression: dict[str, Budget]) -> RunRecord:
    return record.model_copy(update={"spec": record.spec.model_copy(update={"regression": regression})})


def with_stage(record: RunRecord, name: str, **update: object) -> RunRecord:
    stages = tuple(s.model_copy(update=update) if s.name == name and s.chosen else s for s in record.stages)
    return record.model_copy(update={"stages": stages})


def stage(record: RunRecord, name: str) -> StageRecord:
    return next(s for s in record.chosen() if s.name == name)


def dropped(record: RunRecord, name: str, metric: str) -> RunRecord:
    old = stage(record, name)
    numbers = tuple(m for m in old.measurements if m.name != metric)
    outcomes = {key: value for key, value in old.outcomes.items() if key != metric}
    return with_stage(record, name, measurements=numbers, outcomes=outcomes)


def scored(record: RunRecord, hits: Sequence[bool], examples: Sequence[int]) -> RunRecord:
    """The record with another outcome of robust test accuracy, and nothing shipped that could be tested too."""
    numbers = (fraction(ROBUST, sum(hits), len(hits)),)
    record = with_stage(record, "export", outcomes={})
    return with_stage(record, "validate", measurements=numbers, outcomes={ROBUST: Outcomes.of(examples, hits)})


def test_a_record_is_no_regression_of_itself() -> None:
    comparison = compare(sample.passed(), sample.passed())
    assert comparison.verdict.passed
    assert {change.word for change in comparison.changes} == {"same"}
    assert changed(comparison, "validate", ROBUST).paired is not None


def test_a_loss_beyond_the_limit_is_a_regression_that_shows_both_numbers_and_p() -> None:
    change = changed(compare(sample.passed(0.79), sample.passed(0.74)), "validate", ROBUST)
    assert change.regressed
    assert change.reasons[0].text == f"{ROBUST} 0.74 was 0.79: a loss of 0.05 must be <= 0.02"
    assert change.paired is not None
    assert (change.paired.lost, change.paired.won) == (50, 0)


def test_the_limit_rules_where_there_is_one_however_significant_the_loss() -> None:
    wide: dict[str, Budget] = {
        "validate": (Limit(metric=ROBUST, max_loss=0.1),),
        "export": (Limit(metric=SHIPPED, max_loss=0.1),),
    }
    comparison = compare(sample.passed(0.79), with_limits(sample.passed(0.74), wide))
    paired = changed(comparison, "validate", ROBUST).paired
    assert comparison.verdict.passed
    assert paired is not None
    assert paired.adjusted < 1e-6


def test_a_significant_loss_without_a_limit_is_a_regression() -> None:
    comparison = compare(sample.passed(0.79), without_limits(sample.passed(0.74)))
    assert {change.metric for change in comparison.regressions} == {ROBUST, SHIPPED}
    assert "exact McNemar" in changed(comparison, "export", SHIPPED).reasons[0].text


def test_a_loss_that_chance_explains_is_none() -> None:
    base = without_limits(sample.passed())
    right = [True] * 90 + [False] * 10
    lost_six = [False] * 6 + [True] * 84 + [False] * 10
    lost_eight = [False] * 8 + [True] * 82 + [False] * 10
    start = scored(base, right, range(100))
    # 2^-6 = 0.016 is not below 0.01, 2^-8 = 0.004 is; the second tested metric doubles p by Holm.
    assert compare(start, scored(base, lost_six, range(100))).verdict.passed
    comparison = compare(start, scored(base, lost_eight, range(100)))
    assert [change.metric for change in comparison.regressions] == [ROBUST]
    paired = comparison.regressions[0].paired
    assert paired is not None
    assert paired.p == 2**-8


def test_holm_counts_every_tested_metric() -> None:
    comparison = compare(sample.passed(), sample.passed(0.785))
    tested = [change.paired for change in comparison.changes if change.paired]
    smallest = min(tested, key=lambda paired: paired.p)
    assert len(tested) == 4
    assert smallest.adjusted == pytest.approx(min(1.0, 4 * smallest.p))


def test_other_examples_are_unpaired_and_said_to_be() -> None:
    before = sample.passed(examples=range(1, sample.N + 1))
    change = changed(compare(before, without_limits(sample.passed(0.5))), "validate", ROBUST)
    assert change.paired is None
    assert not change.regressed
    assert change.note.startswith("unpaired")


def test_new_and_vanished_metrics_are_listed() -> None:
    less = dropped(sample.passed(), "validate", "accuracy.certified.test")
    assert changed(compare(less, sample.passed()), "validate", "accuracy.certified.test").word == "new"
    gone = changed(compare(sample.passed(), less), "validate", "accuracy.certified.test")
    assert (gone.word, gone.regressed) == ("vanished", False)


def test_a_vanished_metric_with_a_limit_is_a_regression() -> None:
    change = changed(compare(sample.passed(), dropped(sample.passed(), "validate", ROBUST)), "validate", ROBUST)
    assert change.regressed
    assert change.reasons[0].text == f"{ROBUST} was not measured"


def test_a_limit_compares_the_same_stage_even_where_a_later_one_measures_again() -> None:
    limits: dict[str, Budget] = {"train": (Limit(metric="accuracy.robust.holdout", max_loss=0.01),)}
    worse = with_stage(sample.passed(), "train", measurements=(fraction("accuracy.robust.holdout", 390, 500),))
    comparison = compare(sample.passed(), with_limits(worse, limits))
    assert [(c.stage, c.metric) for c in comparison.regressions] == [("train", "accuracy.robust.holdout")]


def test_only_the_chosen_attempt_counts() -> None:
    other = sample.passed()
    stages = tuple(s.model_copy(update={"measurements": ()}) if not s.chosen else s for s in other.stages)
    assert compare(sample.passed(), other.model_copy(update={"stages": stages})).verdict.passed


@pytest.mark.parametrize(("value", "word"), [(0.7, "worse"), (0.5, "better"), (0.62, "same")])
def test_lower_is_better_where_the_measurement_says_so(value: float, word: str) -> None:
    numbers: tuple[Measurement, ...] = (exact("latency.p95", value, "ms"),)
    before = with_stage(sample.passed(), "export", measurements=(exact("latency.p95", 0.62, "ms"),), outcomes={})
    after = with_stage(sample.passed(), "export", measurements=numbers, outcomes={})
    assert changed(compare(before, after), "export", "latency.p95").word == word


def test_a_baseline_of_the_same_task_is_taken() -> None:
    record = sample.passed()
    check_baseline(record, record.spec, record.data_digest, WHERE)


def test_equal_radii_written_in_two_ways_are_one_task() -> None:
    record = sample.passed()
    task = {**record.spec.task, "threat": {**record.spec.task["threat"], "eps": "1/10"}}
    check_baseline(record, record.spec.model_copy(update={"task": task}), record.data_digest, WHERE)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("threat", {"norm": "l2", "eps": 0.1, "low": 0.0, "high": 1.0}, 'task.threat.norm: the baseline has "linf"'),
        (
            "threat",
            {"norm": "linf", "eps": 0.2, "low": 0.0, "high": 1.0},
            "task.threat.eps: the baseline has 0.1, this",
        ),
        ("data", {"kind": "mnist"}, 'task.data.kind: the baseline has "digits", this build "mnist"'),
        ("train_samples", 500, "task.train_samples: the baseline has none, this build 500"),
    ],
)
def test_a_baseline_of_another_task_is_refused_by_name(key: str, value: object, message: str) -> None:
    record = sample.passed()
    spec = record.spec.model_copy(update={"task": {**record.spec.task, key: value}})
    with pytest.raises(BadInput, match=f"record.json: a foreign baseline; {message}"):
        check_baseline(record, spec, record.data_digest, WHERE)


def test_a_baseline_of_other_data_or_another_target_is_refused() -> None:
    record = sample.passed()
    with pytest.raises(BadInput, match=r"data files: the baseline was measured on data .*, here lies 000000000000"):
        check_baseline(record, record.spec, "0" * 64, WHERE)
    with pytest.raises(BadInput, match=r'target: the baseline has "jetson", this build "x86_cpu"'):
        check_baseline(record, record.spec.model_copy(update={"target": "x86_cpu"}), record.data_digest, WHERE)


def test_a_weaker_attack_is_not_compared_with_a_stronger_one() -> None:
    record = sample.passed()
    same = {stage.name: stage.config for stage in record.chosen()}
    check_baseline(record, record.spec, record.data_digest, WHERE, same)
    weaker = {**same, "validate": {**same["validate"], "attacks": ["fgsm"]}}
    with pytest.raises(BadInput, match=r"validate.attacks: the baseline has .*square.*, this build .*fgsm"):
        check_baseline(record, record.spec, record.data_digest, WHERE, weaker)
    other_precision = {**same, "export": {**same["export"], "precision": "fp32"}}
    check_baseline(record, record.spec, record.data_digest, WHERE, other_precision)


def test_a_baseline_that_lacks_a_limited_metric_is_refused_before_work_starts() -> None:
    record = sample.passed()
    with pytest.raises(
        BadInput, match=r"has no accuracy.robust.test of stage validate \(its run was refused at compress"
    ):
        check_baseline(sample.refused(), record.spec, record.data_digest, WHERE)
