from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from pipeline.core.errors import GateRefused
from pipeline.core.gate import Limit
from pipeline.core.record import RunRecord
from pipeline.core.stage import ORDER, Files, Result
from pipeline.engine.launch import Launch
from pipeline.engine.runner import line
from pipeline.engine.step import Attempt, Plan, Step
from pipeline.engine.store import Damaged, Store
from tests.fake_line.plans import at_least, at_most, plan, step


def ignore(kind: str, fields: Mapping[str, object]) -> None:
    del kind, fields


class Rig:
    """A store, and which steps really ran in it."""

    def __init__(self, root: Path) -> None:
        self.store = Store(root / "store")
        self.launch = Launch({}, root, root, root / "spare", ignore)
        self.ran: list[tuple[str, dict[str, object]]] = []
        self.saved: list[RunRecord] = []

    def __call__(self, plan_: Plan) -> RunRecord:
        self.ran, self.saved = [], []
        return line(plan_, self.store, self._launched, self.saved.append, ignore, {"cpu": "x"}, set())

    def _launched(self, step_: Step, attempt: Attempt, files: Files, scratch: Path) -> Result:
        self.ran.append((step_.name, attempt.overrides))
        return self.launch(step_, attempt, files, scratch)

    def stages(self) -> list[str]:
        return [name for name, _ in self.ran]


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    made = Rig(tmp_path)
    with made.store.shared():
        yield made


def test_a_first_build_runs_all_five_in_order_and_saves_the_record_after_each(rig: Rig) -> None:
    record = rig(plan())
    assert rig.stages() == list(ORDER)
    assert [len(saved.stages) for saved in rig.saved] == [1, 2, 3, 4, 5, 5]
    assert [saved.complete for saved in rig.saved] == [False] * 5 + [True]
    assert record == rig.saved[-1]
    assert record.refused is None
    assert not any(stage.reused for stage in record.stages)


def test_an_unchanged_build_runs_nothing_and_gives_the_same_record(rig: Rig) -> None:
    first = rig(plan())
    second = rig(plan())
    assert rig.ran == []
    assert all(stage.reused for stage in second.stages)
    assert [s.model_copy(update={"reused": False}) for s in second.stages] == list(first.stages)


def test_a_changed_config_reruns_its_stage_and_those_behind_it(rig: Rig) -> None:
    rig(plan())
    rig(plan(step("compress", {"ratio": 0.25})))
    assert rig.stages() == ["compress", "validate", "export"]


def test_a_changed_config_whose_files_come_out_equal_reruns_only_its_own_stage(rig: Rig) -> None:
    rig(plan())
    rig(plan(step("compress", {"pause": 0.001})))
    assert rig.stages() == ["compress"]


def test_changed_code_data_task_or_seed_reruns(rig: Rig) -> None:
    rig(plan())
    rig(plan(step("validate", code="other")))
    assert rig.stages() == ["validate"]
    rig(plan(data="other"))
    assert rig.stages() == list(ORDER)
    rig(plan(seed=1))
    assert rig.stages() == list(ORDER)


def test_a_budget_change_judges_again_and_reruns_nothing(rig: Rig) -> None:
    rig(plan())
    with pytest.raises(GateRefused, match=r"train was refused by its gate: accuracy.robust.holdout .* must be >= 0.95"):
        rig(plan(step("train", budget=(at_least("accuracy.robust.holdout", 0.95),))))
    assert rig.ran == []
    assert rig(plan(step("train", budget=(at_least("accuracy.robust.holdout", 0.8),)))).complete
    assert rig.ran == []


def test_a_second_target_reruns_only_what_its_sections_alter(rig: Rig) -> None:
    rig(plan(target="x86_cpu"))
    record = rig(plan(step("export", {"precision": "int8"}), target="jetson"))
    assert rig.stages() == ["export"]
    assert record.spec.target == "jetson"


def test_a_refusal_stops_the_line_and_names_the_stage_and_both_numbers(rig: Rig) -> None:
    with pytest.raises(GateRefused, match=r"compress was refused by its gate: size.weights 1,024 bytes must be <= 10"):
        rig(plan(step("compress", budget=(at_most("size.weights", 10),))))
    assert rig.stages() == ["search", "train", "compress"]
    assert rig.saved[-1].refused == "compress"
    assert not rig.saved[-1].complete
    assert rig.store.find(rig.saved[-1].stages[-1].key) is not None  # the evidence stays


def test_a_metric_that_no_stage_measured_refuses(rig: Rig) -> None:
    with pytest.raises(GateRefused, match=r"memory\.peak was not measured"):
        rig(plan(step("export", budget=(at_most("memory.peak", 1),))))


def test_attempts_stop_at_the_first_that_passes_and_it_feeds_the_rest(rig: Rig) -> None:
    repair = step(
        "compress",
        attempts=[{"ratio": 0.75}, {"ratio": 0.25}, {"ratio": 0.0}],
        budget=(at_least("accuracy.robust.holdout", 0.65),),
    )
    record = rig(plan(repair))
    tried = [stage for stage in record.stages if stage.name == "compress"]
    assert [(s.overrides, s.chosen, s.verdict.passed, s.attempt) for s in tried] == [
        ({"ratio": 0.75}, False, False, 0),
        ({"ratio": 0.25}, True, True, 1),
    ]
    assert record.chosen()[3].artifact.files["weights.safetensors"] == tried[1].artifact.files["weights.safetensors"]
    assert [stage.name for stage in record.chosen()] == list(ORDER)
    assert record.complete
    rig(plan(repair))
    assert rig.ran == []


def test_where_no_attempt_passes_the_closest_is_named_and_counts(rig: Rig) -> None:
    hopeless = step(
        "compress",
        attempts=[{"ratio": 0.9}, {"ratio": 0.5}, {"ratio": 0.75}],
        budget=(at_least("accuracy.robust.holdout", 0.95),),
    )
    with pytest.raises(
        GateRefused, match=r"none of 3 attempts .* closest was attempt 2 of 3 \(ratio = 0.5\): accuracy"
    ):
        rig(plan(hopeless))
    tried = rig.saved[-1].stages[2:]
    assert [stage.chosen for stage in tried] == [False, True, False]
    assert rig.saved[-1].refused == "compress"


def test_bisection_probes_are_cached_steps_and_the_boldest_that_passes_goes_on(rig: Rig) -> None:
    knob = {"knob": "ratio", "boldest": 0.9, "gentlest": 0.1, "probes": 5, "integer": False}
    search = step("compress", bisect=knob, budget=(at_least("accuracy.robust.holdout", 0.65),))
    record = rig(plan(search))
    tried = [stage for stage in record.stages if stage.name == "compress"]
    assert [stage.config["ratio"] for stage in tried] == pytest.approx([0.9, 0.1, 0.5, 0.3, 0.4])
    passing = [stage.config["ratio"] for stage in tried if stage.verdict.passed]
    chosen = next(stage for stage in tried if stage.chosen)
    assert chosen.config["ratio"] == max(passing)
    weights = chosen.artifact.files["weights.safetensors"]
    assert all(s.artifact.files["weights.safetensors"] == weights for s in record.chosen() if s.name == "validate")
    rig(plan(search))
    assert rig.ran == []


def test_a_refused_test_limit_ends_the_build_and_triggers_no_other_attempt(rig: Rig) -> None:
    tempted = step("validate", attempts=[{"hits": 40}, {"hits": 90}], budget=(at_least("accuracy.robust.test", 0.7),))
    with pytest.raises(GateRefused, match=r"validate was refused by its gate: accuracy.robust.test"):
        rig(plan(tempted))
    assert [overrides for name, overrides in rig.ran if name == "validate"] == [{"hits": 40}]


def test_a_finding_refuses_whatever_the_numbers_and_triggers_no_other_attempt(rig: Rig) -> None:
    masked = step("validate", attempts=[{"findings": ("gradients are masked",)}, {"hits": 99}])
    with pytest.raises(GateRefused, match="validate was refused by its gate: gradients are masked"):
        rig(plan(masked))
    assert len(rig.ran) == 4


def test_a_file_that_is_found_out_is_set_aside_with_its_reason_and_the_next_precision_is_tried(
    rig: Rig,
) -> None:
    masked = {"precision": "int8", "findings": ("its gradients are masked",)}
    record = rig(plan(step("export", attempts=[masked, {"precision": "fp32"}])))
    assert record.complete
    assert [(s.overrides["precision"], s.chosen) for s in record.stages[4:]] == [("int8", False), ("fp32", True)]
    assert [reason.text for reason in record.stages[4].verdict.refusals] == ["its gradients are masked"]
    with pytest.raises(GateRefused, match=r"none of 2 attempts .* its gradients are masked"):
        rig(plan(step("export", attempts=[masked, {**masked, "precision": "fp32"}])))


def test_max_loss_compares_with_the_attempt_that_counts_of_an_earlier_stage(rig: Rig) -> None:
    keep = (Limit(metric="accuracy.robust.holdout", max_loss=0.1),)
    record = rig(plan(step("compress", attempts=[{"ratio": 0.5}, {"ratio": 0.25}], budget=keep)))
    # 0.90 after training; 0.70 and 0.80 after compression. The refused 0.70 must not become the baseline of 0.80.
    assert [stage.chosen for stage in record.stages[2:4]] == [False, True]
    assert "0.8 was 0.9" in record.stages[3].verdict.reasons[0].text


def test_limits_on_the_device_are_owed_and_do_not_refuse(rig: Rig) -> None:
    record = rig(plan(step("export", budget=(at_most("latency.p95", 0.001, on_device=True),))))
    assert record.complete
    assert "owed on the device" in record.stages[-1].verdict.reasons[0].text


def test_a_damaged_input_is_never_fed_to_a_stage(rig: Rig) -> None:
    record = rig(plan())
    path = rig.store.blob(record.stages[1].artifact.files["weights.safetensors"])
    data = path.read_bytes()
    path.chmod(0o644)
    path.write_bytes(b"\0" + data[1:])
    changed = plan(step("compress", {"ratio": 0.25}))
    with pytest.raises(Damaged, match="weights"):
        rig(changed)
    assert rig.ran == []
    rig(changed)
    assert rig.stages() == ["train", "compress", "validate", "export"]
    assert path.read_bytes() == data
