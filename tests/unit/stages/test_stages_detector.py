"""A detector through validate and export, on a real network and the embedded digits: fitted, attacked, attached."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load as tensors_of

from pipeline.core.stage import Context, Files, Result
from stages import attachment, detection, doubted, export, validate
from stages.attacks.square import Square
from stages.evaluate import correct
from stages.method import InputError
from stages.nn import checkpoint
from stages.nn.fold import fold
from targets.runtime.ort import OrtEngine
from tests.trained import TASK, digits, digits_model

DETECTOR = {
    "kind": "feature_squeezing",
    "squeezers": ["bit_2", "nlm_3_3_20"],
    "adaptive": {"steps": 12, "weights": [0, 10]},
}
HOW: dict[str, Any] = {
    "samples": 60,
    "validity_samples": 20,
    "curve": [0.5, 1.0],
    "attacks": [{"kind": "pgd", "steps": 10, "loss": "margin"}, {"kind": "square", "queries": 20}],
    "images": 0,
    "detector": DETECTOR,
}
EXPORT: dict[str, Any] = {
    "exporter": "legacy",
    "attacks": [{"kind": "pgd", "steps": 3}],
    "calibration": 32,
    "holdout_samples": 40,
    "runs": 20,
}
INT8 = {"precision": "int8", "precisions": {"int8": ["fold_constants", "qdq_int8_cpu", "ort_format"]}}


@dataclass
class Told:
    """The notes of a stage."""

    notes: list[str]

    def __call__(self, kind: str, fields: Mapping[str, object]) -> None:
        if kind == "note":
            self.notes.append(str(fields["text"]))


def context(folder: Path, told: Told) -> Context:
    folder.mkdir(parents=True, exist_ok=True)
    return Context(task=TASK, data_root=folder, seed=3, scratch=folder, emit=told)


def numbers(result: Result) -> dict[str, float]:
    return {m.name: m.value for m in result.measurements}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Result, list[str]]]:
    folder, made = tmp_path_factory.mktemp("detector"), {}
    checkpoint.save(digits_model(), folder)
    files: Files = {name: folder / name for name in (checkpoint.ARCH, checkpoint.WEIGHTS)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(doubted, "_SQUARE", Square(queries=30))  # most of the time otherwise
        told = Told([])
        validated = validate.run(files, validate.Config.load(HOW), context(folder / "validate", told))
        made["validate"] = (validated, told.notes)
        for name, settings in (("fp32", EXPORT), ("int8", {**EXPORT, **INT8})):
            told = Told([])
            result = export.run(validated.files, export.Config.load(settings), context(folder / name, told))
            made[name] = (result, told.notes)
    return made


def test_every_promised_metric_is_measured_and_the_numbers_are_ordered(
    made: dict[str, tuple[Result, list[str]]],
) -> None:
    result = made["validate"][0]
    assert set(numbers(result)) == validate.measures(validate.Config.load(HOW), TASK)
    assert result.findings == ()
    checks = {note.split(": ")[1] for note in made["validate"][1] if note.startswith("ok: detector")}
    assert checks == {f"detector_{name}" for name in ("rechecked", "black_box", "twins", "falls")}
    assert checks <= {found["name"] for found in json.loads(result.files["figures.json"].read_bytes())["validity"]}
    assert made["fp32"][0].findings == made["int8"][0].findings == ()
    for stage, part in (("validate", "test"), ("fp32", "shipped.test"), ("int8", "shipped.test")):
        value = numbers(made[stage][0])
        plain = value["accuracy.clean.test" if part == "test" else "accuracy.clean.shipped.test"]
        assert value[f"accuracy.robust.detected.{part}"] <= value[f"accuracy.robust.detected.plain.{part}"]
        assert value[f"accuracy.robust.detected.plain.{part}"] <= value[f"accuracy.clean.detected.{part}"] <= plain
        assert value[f"detector.detected.adaptive.{part}"] < value[f"detector.detected.plain.{part}"]
        assert 0 < value[f"detector.false_alarms.{part}"] < 0.2
    better = {m.name: m.better for m in result.measurements}
    assert better["detector.false_alarms.test"] == "lower"
    assert set(numbers(made["fp32"][0])) == export.measures(export.Config.load(EXPORT), TASK)


def test_the_written_table_and_arrays_tell_the_same_story(made: dict[str, tuple[Result, list[str]]]) -> None:
    result = made["validate"][0]
    fitted = attachment.Fitted.model_validate_json(result.files["detector.json"].read_bytes())
    arrays = tensors_of(result.files["detector.safetensors"].read_bytes())
    net = fold(digits_model().net)
    scores = fitted.detector.scores(net, digits().holdout.images)
    assert torch.allclose(arrays["holdout_scores"], scores, atol=1e-6)
    assert fitted.threshold == fitted.detector.fit(arrays["holdout_scores"])
    indices = tensors_of(result.files["adversarial.safetensors"].read_bytes())["indices"]
    test = digits().test
    split = test.select(torch.searchsorted(test.indices, indices))
    x, y, threshold = split.floats(), split.labels, fitted.threshold.value
    found = {name: arrays[name] for name in ("misled", "evaded", "flagged")}
    assert torch.equal(found["flagged"], fitted.detector.scores(net, x) > threshold)
    assert float((arrays["x_adaptive"] - x).abs().max()) <= 0.1 + 1e-6
    evaded = found["evaded"]
    assert not correct(net, arrays["x_adaptive"], y)[evaded].any()
    assert (fitted.detector.scores(net, arrays["x_adaptive"])[evaded] <= threshold + 1e-5).all()
    right = correct(net, x, y)
    value = numbers(result)
    assert value["detector.false_alarms.test"] == pytest.approx(float(found["flagged"].float().mean()))
    assert value["accuracy.robust.detected.test"] == pytest.approx(
        float((right & ~found["flagged"] & ~evaded).float().mean())
    )
    misled = int(found["misled"].sum())
    assert value["detector.detected.adaptive.test"] == pytest.approx(1 - int(evaded.sum()) / misled)
    assert fitted.adaptive["misled"] == misled
    assert fitted.adaptive["evaded"] == int(evaded.sum())
    assert sum(n for key, n in fitted.adaptive.items() if key.startswith("evaded by")) == int(evaded.sum())
    assert any(note.startswith("detector: ") and "without it" in note for note in made["validate"][1])


@pytest.mark.parametrize("name", ["fp32", "int8"])
def test_the_shipped_graph_scores_and_flags_as_torch_does_around_the_same_network(
    made: dict[str, tuple[Result, list[str]]], name: str
) -> None:
    files, notes = made[name][0].files, made[name][1]
    contract = json.loads(files["bundle/contract.json"].read_bytes())
    engine = OrtEngine(files[f"bundle/{contract['model']}"].read_bytes())
    detector = attachment.Fitted.model_validate_json(made["validate"][0].files["detector.json"].read_bytes())
    threshold = contract["detector"]["threshold"]
    x = digits().test.floats(slice(0, 100))
    found = engine.outputs(x.numpy())
    scores = detector.detector.scores(lambda p: torch.from_numpy(engine(p.numpy())), x).numpy()
    assert np.abs(found["score"] - scores).max() < 1e-3
    assert (found["flag"] == (scores > threshold)).mean() > 0.999
    assert contract["detector"]["outputs"] == ["score", "flag"]
    assert contract["detector"]["kind"] == "feature_squeezing"
    assert contract["detector"]["false_alarms"] == 0.05
    again = [note for note in notes if "fitted again" in note]
    assert bool(again) == (name == "int8")
    assert (threshold == detector.threshold.value) == (name == "fp32")
    held = engine.outputs(digits().holdout.floats().numpy())
    assert held["flag"].mean() <= 0.05
    probe = np.load(files["bundle/probe.npz"])
    assert np.array_equal(probe["score"], engine.outputs(probe["inputs"])["score"])


def test_the_same_inputs_give_the_same_bytes_and_what_was_finished_is_not_done_again(
    made: dict[str, tuple[Result, list[str]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = made["validate"][0].files
    kept = before["detector.json"].parent.parent
    files = {name: before[name] for name in (checkpoint.ARCH, checkpoint.WEIGHTS)}

    def again(*_: object, **__: object) -> None:
        raise AssertionError("the adaptive attack ran again")

    monkeypatch.setattr(detection, "judge", again)
    monkeypatch.setattr(doubted, "_SQUARE", Square(queries=30))
    old = {name: path.read_bytes() for name, path in before.items()}
    result = validate.run(files, validate.Config.load(HOW), context(kept, Told([])))
    assert {name: path.read_bytes() for name, path in result.files.items()} == old


def test_an_early_verdict_and_a_detector_are_refused_together() -> None:
    config = validate.Config.load({**HOW, "early": 0.99, "stop_at": 0.5})
    with pytest.raises(InputError, match="early: a detector asks for every image under every attack"):
        validate.measures(config, TASK)


def test_without_a_detector_nothing_of_it_is_written_or_promised() -> None:
    names = validate.measures(validate.Config.load({**HOW, "detector": None}), TASK)
    assert not [name for name in names if "detect" in name]
    assert validate.Config.load({}).detector is None
    assert validate.Config.load({"detector": "feature_squeezing"}).dump()["detector"]["kind"] == "feature_squeezing"
