"""The stage as a whole, on a real network and the embedded digits: numbers, files, resumption, refusals."""

import io
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from safetensors.torch import load as tensors_of

from pipeline.core.gate import judge
from pipeline.core.stage import Context, Result
from pipeline.report.figures import read_figures
from stages import evidence, validate
from stages.evaluate import correct
from stages.method import InputError
from stages.nn import checkpoint
from stages.nn.arch import Model
from stages.threat import Threat
from tests.trained import TASK, digits, digits_model

PLANTED = Path(__file__).resolve().parents[1] / "planted"
SMALL: dict[str, Any] = {
    "samples": 120,
    "attacks": [{"kind": "pgd", "loss": "margin"}, {"kind": "apgd", "steps": 20}, {"kind": "square", "queries": 100}],
    "validity_samples": 60,
    "curve": [0.5, 1.0, 2.0],
    "images": 3,
}


@dataclass
class Watch:
    """Collects what a stage emits, and stops it like Ctrl-C at the first label that starts with `stop_at`."""

    stop_at: str | None = None
    labels: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __call__(self, kind: str, fields: Mapping[str, object]) -> None:
        if kind == "note":
            self.notes.append(str(fields["text"]))
            return
        label, done, total = str(fields["label"]), fields["done"], fields["total"]
        assert isinstance(done, int)
        assert isinstance(total, int)
        assert 0 < done <= total
        self.labels.append(label)
        if self.stop_at is not None and label.startswith(self.stop_at):
            raise KeyboardInterrupt


def files_of(model: Model, folder: Path) -> dict[str, Path]:
    """As blobs without suffixes, which is how the engine hands them over."""
    folder.mkdir(parents=True)
    checkpoint.save(model, folder)
    (folder / checkpoint.ARCH).rename(folder / "b1")
    (folder / checkpoint.WEIGHTS).rename(folder / "b2")
    return {checkpoint.ARCH: folder / "b1", checkpoint.WEIGHTS: folder / "b2"}


def run(tmp_path: Path, model: Model, watch: Watch, scratch: str = "scratch", **settings: Any) -> Result:
    source = tmp_path / "in" if (tmp_path / "in").exists() else None
    files = (
        {checkpoint.ARCH: source / "b1", checkpoint.WEIGHTS: source / "b2"}
        if source
        else files_of(model, tmp_path / "in")
    )
    ctx = Context(task=TASK, data_root=tmp_path, seed=5, scratch=tmp_path / scratch, emit=watch)
    return validate.run(files, validate.Config.load({**SMALL, **settings}), ctx)


def digests(result: Result) -> dict[str, bytes]:
    return {name: path.read_bytes() for name, path in result.files.items()}


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result, Watch]:
    folder, watch = tmp_path_factory.mktemp("honest"), Watch()
    return folder, run(folder, digits_model(recipe="at"), watch), watch


def test_every_promised_metric_is_measured_with_its_outcomes(honest: tuple[Path, Result, Watch]) -> None:
    _, result, _ = honest
    names = [measurement.name for measurement in result.measurements]
    assert sorted(names) == sorted(validate.measures(validate.Config.load(SMALL), TASK))
    assert set(result.outcomes) == set(names)
    for measurement in result.measurements:
        hits = result.outcomes[measurement.name].hits()
        assert measurement.samples == len(hits) == 120
        assert measurement.value == sum(hits) / 120
    assert len({outcome.examples for outcome in result.outcomes.values()}) == 1


def test_the_numbers_are_ordered_as_they_must_be(honest: tuple[Path, Result, Watch]) -> None:
    value = {measurement.name: measurement.value for measurement in honest[1].measurements}
    each = [value[f"accuracy.robust.{name}.test"] for name in ("pgd", "apgd", "square")]
    assert value["accuracy.certified.test"] <= value["accuracy.robust.test"] <= min(each)
    assert max(each) <= value["accuracy.clean.test"]
    assert 0.3 < value["accuracy.robust.test"] < 0.8 < value["accuracy.clean.test"]


def test_an_honest_network_has_no_findings(honest: tuple[Path, Result, Watch]) -> None:
    _, result, watch = honest
    assert result.findings == ()
    assert sum(note.startswith("ok: ") for note in watch.notes) == 16
    told = [label for label in watch.labels if label.startswith(("attack", "curve"))]
    assert len(told) > 3
    assert all("(quick)" in label for label in told)


def test_inputs_pass_through_and_are_not_written_to(honest: tuple[Path, Result, Watch]) -> None:
    folder, result, _ = honest
    assert result.files[checkpoint.ARCH] == folder / "in" / "b1"
    assert result.files[checkpoint.WEIGHTS] == folder / "in" / "b2"
    assert sorted(path.name for path in (folder / "in").iterdir()) == ["b1", "b2"]


def test_evidence_numbers_and_stored_inputs_tell_the_same_story(honest: tuple[Path, Result, Watch]) -> None:
    _, result, _ = honest
    found = evidence.read(result.files["evidence.jsonl"])
    value = {measurement.name: measurement.value for measurement in result.measurements}
    assert found.header.strength == "quick"
    assert list(found.header.attacks) == ["apgd", "pgd", "square"]
    robust = [all(row.survived.values()) for row in found.examples]
    assert sum(robust) / 120 == value["accuracy.robust.test"]
    assert sum(row.certified["ibp"] for row in found.examples) / 120 == value["accuracy.certified.test"]
    stored = tensors_of(result.files["adversarial.safetensors"].read_bytes())
    assert stored["indices"].tolist() == [row.index for row in found.examples]
    assert stored["survived"].tolist() == robust
    assert stored["x_adv"].dtype == torch.float32
    test = digits().test
    place = {index: row for row, index in enumerate(test.indices.tolist())}
    split = test.select(torch.tensor([place[row.index] for row in found.examples]))
    net = digits_model(recipe="at").net
    assert (correct(net, stored["x_adv"], split.labels)).tolist() == robust
    again = evidence.recheck(net, split.floats(), stored["x_adv"], split.labels, Threat.load(TASK["threat"]))
    broken = torch.tensor([row.stored is not None for row in found.examples])
    assert bool(again.holds[broken].all())
    assert torch.equal(stored["x_adv"][~broken], split.floats()[~broken])
    for row in found.examples:
        assert (row.broken_by is None) == all(row.survived.values())
        assert (row.broken_by == evidence.CLEAN) == (row.clean != row.label) == (row.margin < 0)
        assert row.stored is None or (row.margin_attacked < 0 < row.margin and row.distance <= 0.1 + 1e-6)
        assert not (row.certified["ibp"] and row.broken_by)
        assert row.spent.keys() == row.survived.keys()
        for name, spent in row.spent.items():
            # What is wrong from the start enters no attack; a full try of PGD is one pass more than its steps.
            assert (spent.queries == 0) == (row.broken_by == evidence.CLEAN)
            assert spent.gradients == 0 if name == "square" else spent.gradients <= spent.queries


def test_the_sample_is_stratified_in_file_order_and_does_not_depend_on_the_seed(
    honest: tuple[Path, Result, Watch], tmp_path: Path
) -> None:
    rows = evidence.read(honest[1].files["evidence.jsonl"]).examples
    assert [row.index for row in rows] == sorted(row.index for row in rows)
    share = torch.tensor([row.label for row in rows]).bincount() / 120
    assert torch.allclose(share, digits().test.labels.bincount() / len(digits().test), atol=1 / 120)
    ctx = Context(task=TASK, data_root=tmp_path, seed=6, scratch=tmp_path / "scratch", emit=Watch())
    files = files_of(digits_model(recipe="at"), tmp_path / "in")
    brief = {**SMALL, "attacks": ["fgsm"], "certify": [], "validity_samples": 20}
    other = validate.run(files, validate.Config.load(brief), ctx)
    assert other.outcomes["accuracy.clean.test"] == honest[1].outcomes["accuracy.clean.test"]
    assert "accuracy.certified.test" not in other.outcomes


def test_the_report_reads_the_figures(honest: tuple[Path, Result, Watch]) -> None:
    figures = read_figures(honest[1].files)
    assert figures.problems == ()
    assert [point.eps for point in figures.curve] == pytest.approx([0, 0.05, 0.1, 0.2])
    assert all(point.attack == "pgd (quick)" for point in figures.curve)
    assert figures.confusion is not None
    assert sum(map(sum, figures.confusion.clean)) == sum(map(sum, figures.confusion.attacked)) == 120
    assert len(figures.twins) == 3
    assert len(figures.pictures) == 9
    assert all(finding.ok for finding in figures.validity)
    assert [attack["label"] for attack in figures.attacks] == ["quick"] * 3
    for name, path in honest[1].files.items():
        if name.endswith(".png"):
            picture = Image.open(io.BytesIO(path.read_bytes()))
            assert picture.size == (64, 64)
    for twins in figures.twins:
        assert twins.label == twins.clean_prediction != twins.adversarial_prediction


def test_a_rerun_gives_the_same_bytes(honest: tuple[Path, Result, Watch]) -> None:
    folder, result, _ = honest
    assert digests(run(folder, digits_model(recipe="at"), Watch(), "again")) == digests(result)


@pytest.mark.parametrize("stop_at", ["attack: pgd", "attack: square", "certify: ibp", "validity"])
def test_an_interrupted_run_goes_on_to_the_same_bytes(honest: tuple[Path, Result, Watch], stop_at: str) -> None:
    folder, result, _ = honest
    scratch = stop_at.replace(": ", "-")
    with pytest.raises(KeyboardInterrupt):
        run(folder, digits_model(recipe="at"), Watch(stop_at), scratch)
    finished = {path.stem for path in (folder / scratch).glob("attack-*.safetensors")}
    watch = Watch()
    assert digests(run(folder, digits_model(recipe="at"), watch, scratch)) == digests(result)
    for name in ("pgd", "apgd", "square"):
        assert (f"attack: {name} (quick)" in watch.labels) == (f"attack-{name}" not in finished)


def test_a_planted_unsound_certifier_is_refused_by_the_gate(
    honest: tuple[Path, Result, Watch], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever it proves needs no attack but for 50 of them at random, and these are enough."""
    monkeypatch.syspath_prepend(PLANTED)
    files = {name: honest[1].files[name] for name in (checkpoint.ARCH, checkpoint.WEIGHTS)}
    config = validate.Config.load({**SMALL, "certify": ["temper_liar"]})
    ctx = Context(task=TASK, data_root=tmp_path, seed=5, scratch=tmp_path / "s", emit=Watch())
    result = validate.run(files, config, ctx)
    assert any(text.startswith("refuted_temper_liar: 8 images that temper_liar proved") for text in result.findings)
    (told,) = (text for text in result.findings if text.startswith("sound_temper_liar"))
    assert re.search(r": [1-9]\d* of \d+ examples that temper_liar proved were broken by an attack", told)
    (bar,) = json.loads(result.files["figures.json"].read_bytes())["verdicts"]
    assert bar["open"] == 0 < bar["broken"] - bar["wrong"]
    assert bar["proved"] + bar["broken"] == bar["images"] == 120


def test_the_bar_of_the_report_counts_what_the_evidence_says(honest: tuple[Path, Result, Watch]) -> None:
    files = honest[1].files
    rows = evidence.read(files["evidence.jsonl"]).examples
    (bar,) = read_figures(dict(files)).verdicts
    assert (bar.of, bar.images) == ("the float32 network", 120)
    assert bar.proved == sum(any(row.certified.values()) for row in rows)
    assert bar.broken == sum(row.broken_by is not None for row in rows)
    assert bar.wrong == sum(row.broken_by == "clean" for row in rows)


def test_a_planted_masked_network_is_refused_by_the_gate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(PLANTED)
    result = run(tmp_path, digits_model("masked_cnn"), Watch(), attacks=["pgd", {"kind": "square", "queries": 300}])
    names = {finding.partition(":")[0] for finding in result.findings}
    assert {"gradients_present", "black_box"} <= names
    verdict = judge(result.measurements, (), {}, result.findings)
    assert not verdict.passed
    assert any("gradient of exactly zero" in reason.text for reason in verdict.refusals)
    figures = json.loads(result.files["figures.json"].read_text("utf-8"))
    assert {check["name"] for check in figures["validity"] if not check["ok"]} == names


def test_a_network_without_a_rule_for_bounds_is_proved_nowhere_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(PLANTED)
    watch = Watch()
    result = run(tmp_path, digits_model("masked_cnn"), watch, attacks=["fgsm"], validity_samples=20)
    value = {measurement.name: measurement.value for measurement in result.measurements}
    assert value["accuracy.certified.test"] == 0
    assert any(
        'ibp proves nothing about this network: bounds: no rule for operation "remainder"' in n for n in watch.notes
    )
    assert not any(finding.startswith("covers_ibp") for finding in result.findings)
    rows = evidence.read(result.files["evidence.jsonl"]).examples
    assert all(
        row.certified["ibp"] == ((row.certified_margin["ibp"] or 0) > 0 and row.clean == row.label) for row in rows
    )


def test_the_default_set_is_quick_and_may_be_named_so() -> None:
    default = validate.Config()
    assert [attack.kind for attack in default.attacks] == ["pgd", "apgd", "square"]
    assert validate.Config.load({"attacks": "quick"}) == default
    assert validate.Config.load({"attacks": ["quick"]}) == default
    assert [a.kind for a in validate.Config.load({"attacks": ["quick", "fgsm"]}).attacks][-1] == "fgsm"
    assert validate.Config.load(default.dump()) == default
    assert {attack["kind"] for attack in default.dump()["attacks"]} == {"pgd", "apgd", "square"}


def test_two_of_one_kind_have_two_names() -> None:
    config = validate.Config.load({"attacks": ["pgd", {"kind": "pgd", "steps": 50}, "fgsm"], "certify": []})
    assert validate.measures(config, TASK) == {
        "accuracy.clean.test",
        "accuracy.robust.test",
        "accuracy.robust.pgd.test",
        "accuracy.robust.pgd_2.test",
        "accuracy.robust.fgsm.test",
    }


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"attacks": ["pdg"]}, 'no method "pdg" in attacks; did you mean "pgd"?'),
        ({"attacks": []}, "attacks"),
        ({"certify": ["ipb"]}, 'no method "ipb" in bounds'),
        ({"curve": [1.0, -2.0]}, "curve"),
        ({"sample": 3}, "sample"),
    ],
)
def test_a_bad_section_is_refused(section: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message.replace("?", r"\?")):
        validate.Config.load(section)


def test_an_attack_without_a_version_for_the_norm_is_refused_by_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(PLANTED)
    task = {**TASK, "threat": {"norm": "l1", "eps": 1.0}}
    with pytest.raises(InputError, match="temper_one_sided: expected a threat in linf, got l1"):
        validate.measures(validate.Config.load({"attacks": ["temper_one_sided"]}), task)
    assert validate.measures(validate.Config(), task)


def test_too_few_samples_for_the_classes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"stages.validate.samples: expected 10 \(one per class\) or more, got 7"):
        run(tmp_path, digits_model(recipe="at"), Watch(), samples=7)
