"""A record as rows, series and prose."""

import json
from pathlib import Path

import pytest

from pipeline.core.gate import Limit, judge
from pipeline.core.measurement import Measurement, exact, fraction
from pipeline.core.record import RunRecord
from pipeline.report import words
from pipeline.report.figures import figure_names, read_figures
from pipeline.report.view import view
from tests.unit.report import sample


def test_a_passed_run_says_so_with_its_numbers_and_what_is_owed(tmp_path: Path) -> None:
    shown = view(sample.passed(), sample.figures(tmp_path))
    assert shown.status == "passed"
    assert shown.headline == "Passed: every gate held. Some limits are still owed on the device."
    assert "right on 96.0 % of 1,000 test images, and stays right on 78.3 %" in shown.sentences[0]
    assert "a change of up to 0.1 in every pixel" in shown.sentences[0]
    assert [tile.value for tile in shown.tiles[:3]] == ["96.0 %", "78.3 %", "41.2 %"]
    assert len(shown.owed) == 1
    assert [stage.status for stage in shown.stages] == ["passed"] * 5
    assert len(shown.twins) == 6
    assert shown.twins[0].fooled
    assert not shown.twins[3].fooled
    assert shown.problems == ()


def test_what_is_proved_of_the_shipped_file_is_said_beside_the_network(tmp_path: Path) -> None:
    record = sample.passed()
    assert "the proof does not cover the rounding of a lowered file" in view(record).sentences[1]
    last = record.stages[-1]
    more = (*last.measurements, fraction("accuracy.certified.shipped.test", 31, 1000))
    stages = (*record.stages[:-1], last.model_copy(update={"measurements": more}))
    shown = view(record.model_copy(update={"stages": stages}), sample.figures(tmp_path))
    assert (
        "For 41.2 % it is proved that no such change can fool the float network; for 3.1 % it is" in shown.sentences[1]
    )
    assert [tile.value for tile in shown.tiles[:3]] == ["96.0 %", "78.3 %", "3.1 %"]
    assert [row.of for row in shown.verdicts] == ["the float32 network", "model.onnx", "model.int8.onnx"]


def test_a_refused_run_names_gate_reason_and_closest_attempt() -> None:
    shown = view(sample.refused())
    assert shown.headline == "Refused: the gate after compress did not open."
    assert shown.sentences[0].startswith("None of 2 attempts passed. The closest was attempt 2 of 2 (ratio = 0.6): ")
    assert "a loss of 0.062 must be <= 0.03" in shown.sentences[0]
    assert [s.status for s in shown.stages] == ["passed", "passed", "refused", "not reached", "not reached"]
    assert [a.status for a in shown.stages[2].attempts] == ["set aside", "refused"]


def test_an_unfinished_run_says_where_it_stopped() -> None:
    assert view(sample.unfinished()).headline == "Unfinished: the line stopped before train ended."


def test_attempts_that_were_set_aside_keep_their_reasons_and_their_points() -> None:
    shown = view(sample.passed())
    assert [a.status for a in shown.stages[2].attempts] == ["set aside", "set aside", "passed"]
    assert "a loss of 0.17" in shown.stages[2].attempts[0].refusals[0]
    by_size = shown.scatters[0]
    assert {p.label for p in by_size.points if not p.counted} == {"compress ratio = 0.75", "compress ratio = 0.6"}
    certified = [p for p in by_size.points if p.series == "certified"]
    assert [(p.label, p.x) for p in certified] == [("validate", 330_248)]  # the size that compression left


def test_bars_show_the_end_that_was_held_against_the_limit() -> None:
    demands = {d.metric: d for s in view(sample.passed()).stages if s.counted for d in s.counted.demands}
    at_least, at_most = demands["accuracy.clean.test"].bar, demands["size.model"].bar
    assert at_least is not None
    assert at_least.bound == pytest.approx(0.93)
    assert (at_least.allowed, at_least.ok) == ("above", True)
    assert at_most is not None
    assert (at_most.bound, at_most.allowed, at_most.low) == (250_000, "below", at_most.high)


def test_a_loss_is_drawn_against_what_was_there_before() -> None:
    compress = view(sample.passed()).stages[2]
    assert compress.counted is not None
    bar = compress.counted.demands[0].bar
    assert bar is not None
    assert bar.value == pytest.approx(0.806)
    assert bar.bound == pytest.approx(0.824 - 0.03)
    assert bar.low == bar.value == bar.high


def test_a_limit_with_two_bounds_gives_each_its_own_bar() -> None:
    record = sample.passed()
    two = {"export": (Limit(metric="size.model", at_least=1, at_most=250_000),)}
    stages = list(record.stages)
    stages[-1] = stages[-1].model_copy(update={"verdict": judge(stages[-1].measurements, two["export"], {})})
    spec = record.spec.model_copy(update={"budget": two})
    shown = view(record.model_copy(update={"spec": spec, "stages": tuple(stages)}))
    counted = shown.stages[-1].counted
    assert counted is not None
    assert {d.bar.bound for d in counted.demands if d.bar} == {1, 250_000}


def test_of_two_limits_on_one_metric_only_the_one_on_the_device_is_owed() -> None:
    record = sample.passed()
    here, there = Limit(metric="size.model", at_most=250_000), Limit(metric="size.model", at_most=9, on_device=True)
    stages = list(record.stages)
    for budget in ((here, there), (there, here)):
        verdict = judge(stages[-1].measurements, budget, {})
        last = stages[-1].model_copy(update={"verdict": verdict})
        shown = view(record.model_copy(update={"stages": (*stages[:-1], last)}))
        counted = shown.stages[-1].counted
        assert counted is not None
        assert [(d.owed, d.bar.bound if d.bar else None) for d in counted.demands] in (
            [(False, 250_000), (True, None)],
            [(True, None), (False, 250_000)],
        )
        assert len(shown.owed) == 1


@pytest.mark.parametrize("record", [sample.passed(), sample.refused(), sample.unfinished()])
def test_missing_figures_are_no_fault(record: RunRecord) -> None:
    shown = view(record, {})
    assert (shown.curve, shown.confusion, shown.twins, shown.validity) == ((), None, (), ())


def test_figures_that_do_not_fit_are_named_and_left_out(tmp_path: Path) -> None:
    sample.figures(tmp_path)
    data = json.loads((tmp_path / "figures.json").read_text())
    data["curve"][0]["eps"] = "big"
    data["confusion"]["clean"] = [[1, 2]]
    (tmp_path / "figures.json").write_text(json.dumps(data))
    (tmp_path / "training.json").write_text("{")
    shown = view(sample.passed(), tmp_path)
    assert (shown.curve, shown.confusion, shown.training) == ((), None, ())
    named = ["figures.json", "figures.json", "training.json could not be read"]
    assert [problem.partition(":")[0] for problem in shown.problems] == named
    assert len(shown.validity) == 4


def test_only_png_files_of_modest_size_become_pictures(tmp_path: Path) -> None:
    sample.figures(tmp_path)
    (tmp_path / "images" / "0_clean.png").write_text("<svg onload=alert(1)>")
    (tmp_path / "images" / "1_clean.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(3 << 20))
    found = read_figures(tmp_path)
    assert len(found.pictures) == 16
    assert len(view(sample.passed(), tmp_path).twins) == 4


def test_figures_are_those_of_the_latest_chosen_stage() -> None:
    record = sample.passed()
    stages = list(record.stages)
    for i, mark in ((4, "e"), (5, "f")):
        artifact = stages[i].artifact
        files = {**artifact.files, "figures.json": mark * 64, "images/0.png": mark * 64, "evidence.jsonl": mark * 64}
        stages[i] = stages[i].model_copy(update={"artifact": artifact.model_copy(update={"files": files})})
    found = figure_names(record.model_copy(update={"stages": tuple(stages)}))
    assert found == {"figures.json": "f" * 64, "images/0.png": "f" * 64}


def test_strength_is_called_standard_only_where_an_attack_says_so(tmp_path: Path) -> None:
    sample.figures(tmp_path)
    assert "were quick ones" in dict(view(sample.passed(), tmp_path).meaning)["Strength of the attacks"]
    data = json.loads((tmp_path / "figures.json").read_text())
    data["attacks"][0]["label"] = "standard"
    (tmp_path / "figures.json").write_text(json.dumps(data))
    assert "That ensemble was run" in dict(view(sample.passed(), tmp_path).meaning)["Strength of the attacks"]


def test_words() -> None:
    assert words.quantity(0.9613, "fraction") == "96.1 %"
    assert words.quantity(188_416, "bytes") == "184 KiB"
    assert words.quantity(1 << 30, "bytes") == "1 GiB"
    assert words.quantity(1013 << 20, "bytes") == "1013 MiB"  # no exponents
    assert words.quantity(0.0798512, "ms") == "0.0799 ms"
    assert words.quantity(-0.4, "logit") == "-0.4"
    late = Measurement(name="latency.p95", value=2.0, low=1.5, high=2.5, unit="ms", samples=50, better="lower")
    assert words.interval(late) == "1.5 to 2.5 ms"
    memory = late.model_copy(update={"unit": "bytes", "low": 1000.0, "value": 1024.0, "high": 2048.0})
    assert words.interval(memory) == "1,000 bytes to 2 KiB"
    assert words.settings({"steps": 5, "step": None}) == "steps = 5"
    assert words.interval(exact("size.model", 3, "bytes")) == ""
    assert words.interval(fraction("accuracy.clean.test", 50, 100)) == "40.4 to 59.6 %"
    assert words.margin(-0.012, "fraction") == "1.2 points outside"
    assert words.threat({"threat": {"norm": "linf", "eps": 8 / 255}}) == "a change of up to 8/255 in every pixel"
    assert words.threat({}) == "an attack"
    assert words.metric_title("accuracy.robust.pgd.test") == "robust accuracy (pgd), test"
    assert words.metric_title("detector.false_alarms.test") == "detector: false alarms, test"
    assert words.metric_title("detector.detected.plain.shipped.test") == "detector: detected (plain, shipped), test"
    assert words.duration(400) == "6 min 40 s"
