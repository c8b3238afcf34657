"""`audit --certify`: what is proved, estimated or left open, and how it is told apart."""

import json
import re
from pathlib import Path

import pytest

from stages import evidence
from tests.audited import DIGITS, Audit, file
from tests.json_schema import fits
from tests.real_line import ROOT


def test_estimates_and_the_smoothed_classifier_are_told_apart_from_proofs(audit: Audit, tmp_path: Path) -> None:
    given = (file(tmp_path / "m.onnx"), *DIGITS[:4], "--threat", "l2:0.2", "--attack", "apgd", "--limit", 20)
    smooth = ("--certify", "crown,etb,smoothing", "--sigma", 0.1, "--n", 900, "--alpha", 0.01)
    status, said, _ = audit(*given, *smooth, "--json", tmp_path / "o.json", "--evidence", tmp_path / "e.jsonl")
    assert status == 0
    data, told = json.loads((tmp_path / "o.json").read_text()), evidence.read(tmp_path / "e.jsonl")
    schema = json.loads((ROOT / "docs" / "audit.schema.json").read_text())
    assert fits(data, schema, schema) == []
    assert list(told.header.certifiers) == ["crown"]
    assert all(list(row.certified) == ["crown"] for row in told.examples)
    assert data["certified"]["value"] * 20 == sum(row.certified["crown"] for row in told.examples)
    (etb,), smoothed = data["estimates"], data["smoothed"]
    positive = [row for row in told.examples if row.clean == row.label and (row.estimated_margin["etb"] or 0) > 0]
    assert (etb["positive"], etb["broken"]) == (len(positive), sum(row.broken_by is not None for row in positive))
    assert f"etb: an estimate, not a proof: {etb['positive']} of 20" in said
    rows = [(row.label, row.smoothed) for row in told.examples if row.smoothed is not None]
    assert len(rows) == 20
    held = [label == one.answer and one.radius > 0.2 for label, one in rows]
    assert 0 < sum(held) == smoothed["certified"]["value"] * 20 < 20
    assert all(one.abstained is (one.radius == 0) for _, one in rows)
    assert smoothed["abstained"] == sum(one.abstained for _, one in rows)
    assert smoothed["settings"] == {"kind": "smoothing", "sigma": 0.1, "n0": 100, "n": 900, "alpha": 0.01}
    assert told.header.smoothing == smoothed["settings"]
    assert "commonest answer under Gaussian noise of 0.1 (not the file), at confidence 0.99 for each image" in said
    assert "1,000 forward passes for each of 20 images, about" in said


@pytest.mark.parametrize("shortcuts", [(), ("--no-shortcuts",)])
def test_a_planted_unsound_certifier_fails_loudly(
    shortcuts: tuple[str, ...], audit: Audit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a short attack refutes is put to it too, 8 images: it proves them, which refuses --at-least."""
    monkeypatch.syspath_prepend(ROOT / "tests" / "planted")
    given = (file(tmp_path / "m.onnx"), *DIGITS, "--limit", 80, "--attack", "pgd", "--certify", "temper_liar")
    status, said, problem = audit(*given, *shortcuts, "--at-least", 0)
    assert status == 1
    assert problem.startswith("temper: robust accuracy is not to be believed: sound_temper_liar, refuted_temper_liar")
    found = re.search(r"FAILED  sound_temper_liar: (\d+) of (\d+) attacked examples that temper_liar proved", said)
    assert found is not None
    assert 0 < int(found[1]) < int(found[2])
    assert (
        "FAILED  refuted_temper_liar: 8 images that temper_liar proved are read wrongly, as they are or after a few"
        in said
    )


def test_smoothing_says_first_where_no_radius_can_reach_eps(audit: Audit, tmp_path: Path) -> None:
    given = ("--threat", "l2:0.5", "--attack", "fgsm", "--limit", 2, "--certify", "smoothing", "--n", 100)
    status, said, _ = audit(file(tmp_path / "m.onnx"), *DIGITS[:4], *given)
    assert status == 0
    assert "note: no radius beyond 0.3751 can come of 100 copies with sigma 0.25 and alpha 0.001" in said
    assert "nothing can hold at eps 0.5: raise --sigma or --n" in said


def test_an_operation_without_a_rule_is_named_with_its_node_and_the_rest_goes_on(audit: Audit, tmp_path: Path) -> None:
    given = ("--limit", 3, "--attack", "fgsm", "--certify", "ibp,etb", "--json", tmp_path / "o.json")
    status, said, _ = audit(file(tmp_path / "m.onnx", end="modulo"), *DIGITS, *given)
    assert status == 0
    for name, what in (("ibp", "proves nothing about this network"), ("etb", "estimates nothing about this file")):
        assert f'ok      covers_{name}: {name} {what}: bounds: no rule for operation "fmod"' in said
    assert said.count("node Mod giving v4") == 2
    assert said.count("replace it by an operation with one") == 2
    told = json.loads((tmp_path / "o.json").read_text())
    assert told["certified"]["value"] == 0
    assert sum(told["unproved"].values()) == 3
    assert {*told["unproved"]} <= {"uncovered", "broken"}


@pytest.mark.parametrize("names", ["crown", "ibp,crown"])
def test_memory_too_small_for_one_image_is_bad_input(audit: Audit, tmp_path: Path, names: str) -> None:
    given = ("--limit", 3, "--attack", "fgsm", "--certify", names, "--certify-memory", "1e-9", "--json", "o.json")
    status, _, problem = audit(file(tmp_path / "m.onnx"), *DIGITS, *given)
    assert status == 2
    assert "memory: 1e-09 GiB hold no row of coefficients for one image, which takes" in problem
    assert not (tmp_path / "o.json").exists()


def test_no_time_to_certify_leaves_all_open_and_says_so(audit: Audit, tmp_path: Path) -> None:
    given = ("--limit", 3, "--attack", "fgsm", "--certify", "crown", "--certify-seconds", "1e-9")
    status, said, _ = audit(file(tmp_path / "m.onnx"), *DIGITS, *given)
    assert status == 0
    assert "certified 0.0000" in said
    assert "ok      unproved: 3 of 3 images, those read wrongly among them, are not proved: " in said
    assert "3 because the 1e-09 s for certifying were over" in said
