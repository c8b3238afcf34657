"""`audit` on real files: what it prints, writes and refuses."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from pipeline.core.measurement import wilson
from stages import evidence
from stages.data.digits import Digits
from tests.audited import DIGITS, FORMS, Audit, file
from tests.json_schema import fits
from tests.real_line import ROOT, pipeline


def test_the_standard_audit_says_the_same_in_print_json_and_evidence(tmp_path: Path) -> None:
    """In a process of its own, with the defaults: the reference ensemble and interval bounds."""
    model, out, told = file(tmp_path / "m.onnx"), tmp_path / "o.json", tmp_path / "e.jsonl"
    done = pipeline("audit", model, *DIGITS, "--limit", "8", "--json", out, "--evidence", told)
    assert done.returncode == 0, done.stderr
    assert "attacks: standard" in done.stdout
    data, schema = json.loads(out.read_text()), json.loads((ROOT / "docs/audit.schema.json").read_text())
    assert fits(data, schema, schema) == []
    broken = {**data, "robust": {**data["robust"], "value": 1.5}, "extra": 1, "attacks": [{}], "seconds": "1"}
    assert len(fits(broken, schema, schema)) >= 4
    assert data["strength"] == "standard"
    assert [line["name"] for line in data["attacks"]] == ["apgd_ce", "apgd_dlr_targeted", "fab_targeted", "square"]
    assert data["attacks"][3]["settings"]["queries"] == 5000
    found = evidence.read(told)
    assert found.header.strength == "standard"
    assert found.header.model == data["model"]["sha256"]
    assert [example.index for example in found.examples] == list(range(8))
    shares = {
        "clean": [e.clean == e.label for e in found.examples],
        "robust": [e.broken_by is None for e in found.examples],
        "certified": [e.certified["ibp"] for e in found.examples],
    }
    for name, hits in shares.items():
        low, high = wilson(sum(hits), 8)
        assert data[name] == {"value": sum(hits) / 8, "low": low, "high": high, "samples": 8}
        assert f"{name:<10}{sum(hits) / 8:.4f}  95 % {low:.4f} to {high:.4f}, {sum(hits)} of 8" in done.stdout
    assert shares["clean"] > shares["certified"]
    assert all(finding["ok"] for finding in data["findings"])
    assert {"repeatable", "batch_free", "imported", "black_box", "rechecked", "sound_ibp"} <= {
        finding["name"] for finding in data["findings"]
    }


def test_listed_images_keep_their_order_and_their_numbers(audit: Audit, tmp_path: Path) -> None:
    model = file(tmp_path / "m.onnx")
    quick = (*DIGITS, "--attack", "fgsm", "--certify", "none", "--evidence", tmp_path / "e.jsonl")
    assert audit(model, *quick, "--limit", 9)[0] == 0
    first = {e.index: e for e in evidence.read(tmp_path / "e.jsonl").examples}
    (tmp_path / "list").write_text("7\n3\n\n8\n")
    status, said, _ = audit(model, *quick, "--indices", tmp_path / "list", "--json", tmp_path / "o.json")
    assert status == 0
    assert "digits test, 3 of 510 images" in said
    again = evidence.read(tmp_path / "e.jsonl").examples
    assert [e.index for e in again] == [7, 3, 8]
    assert all(
        (e.label, e.clean, e.margin) == (first[e.index].label, first[e.index].clean, first[e.index].margin)
        for e in again
    )
    assert json.loads((tmp_path / "o.json").read_text())["certified"] is None


def test_what_the_file_wants_is_told_on_the_command_line(audit: Audit, tmp_path: Path) -> None:
    shares = []
    for form in ("pixels", "normal", "bytes"):
        options = (*DIGITS, "--limit", 40, "--attack", "pgd", "--certify", "none", "--json", tmp_path / "o.json")
        assert audit(file(tmp_path / "m.onnx", form), *options, *FORMS[form][2])[0] == 0
        data = json.loads((tmp_path / "o.json").read_text())
        shares.append((data["clean"], data["robust"], data["attacks"][0]["broke"]))
    assert shares[1:] == shares[:1] * 2
    assert shares[0][2] > 0


def test_what_cannot_be_imported_is_attacked_by_black_box_and_says_so(audit: Audit, tmp_path: Path) -> None:
    model = file(tmp_path / "m.onnx", end="foreign")
    options = (*DIGITS, "--limit", 3, "--attack", "pgd,square", "--json", tmp_path / "o.json")
    status, said, problem = audit(model, *options, "--at-least", 0)
    assert (status, problem) == (1, "temper: robust accuracy is not to be believed: imported failed\n")
    assert 'BLACK BOX ONLY: it has no torch twin: node "Shrink4": operator Shrink has no torch twin' in said
    assert "note: without gradients pgd cannot run; what runs is square" in said
    assert "(quick, black box only)" in said
    data = json.loads((tmp_path / "o.json").read_text())
    assert data["black_box_only"] is True
    assert data["strength"] == "quick"
    assert data["certified"]["value"] == 0
    assert {finding["name"]: finding["ok"] for finding in data["findings"]}["imported"] is False


def test_at_least_is_a_gate(audit: Audit, tmp_path: Path) -> None:
    options = (file(tmp_path / "m.onnx"), *DIGITS, "--limit", 40, "--attack", "fgsm", "--certify", "none")
    status, said, problem = audit(*options, "--at-least", 0.5)
    assert (status, problem) == (0, "")
    status, said, problem = audit(*options, "--at-least", 0.99)
    assert status == 1
    assert re.fullmatch(r"temper: robust accuracy is 0\.\d{4} \(quick\), at least 0\.99 was asked\n", problem)
    assert "robust " in said


@pytest.mark.parametrize(
    ("end", "failed"),
    [("noise", {"repeatable", "batch_free", "imported"}), ("position", {"batch_free"})],
)
def test_outputs_that_depend_on_chance_or_on_the_batch_are_found(
    end: str, failed: set[str], audit: Audit, tmp_path: Path
) -> None:
    options = (*DIGITS, "--limit", 2, "--attack", "square", "--certify", "none", "--json", tmp_path / "o.json")
    status, said, _ = audit(file(tmp_path / "m.onnx", end=end), *options)
    assert status == 0
    findings = json.loads((tmp_path / "o.json").read_text())["findings"]
    assert failed <= {finding["name"] for finding in findings if not finding["ok"]}
    assert "the robust accuracy is not to be believed as it stands" in said


def test_a_file_that_hides_its_gradients_is_called_out_and_refused(audit: Audit, tmp_path: Path) -> None:
    """Pixels rounded to four levels on the way in: no gradient, no find, and a black box that knows better."""
    options = ("--data", "digits", "--threads", 1, "--threat", "linf:0.2", "--limit", 30, "--attack", "pgd,apgd")
    status, said, problem = audit(
        file(tmp_path / "m.onnx", "rounded"), *options, "--certify", "none", "--at-least", 0.1
    )
    assert status == 1
    assert problem.startswith("temper: robust accuracy is not to be believed: gradients_present")
    assert 'flat between jumps: Round giving "v1": attack a copy with smooth stand-ins for these' in said
    failed = {line.split()[1] for line in said.splitlines() if line.startswith("FAILED")}
    assert {"gradients_present:", "gradients_explain:", "black_box:"} <= failed


@pytest.mark.parametrize(
    ("eps", "note"),
    [
        ("0", "note: eps is 0: nothing can be changed, so robust accuracy is clean accuracy"),
        ("1", "note: eps reaches from every image to every other: only a constant answer could stand"),
    ],
)
def test_the_smallest_and_the_largest_eps(eps: str, note: str, audit: Audit, tmp_path: Path) -> None:
    options = ("--data", "digits", "--threads", 1, "--limit", 20, "--attack", "pgd", "--json", tmp_path / "o.json")
    status, said, _ = audit(file(tmp_path / "m.onnx"), *options, "--threat", f"linf:{eps}")
    assert status == 0
    assert note in said
    data = json.loads((tmp_path / "o.json").read_text())
    if eps == "0":
        assert data["robust"] == data["clean"] == data["certified"]
    else:
        assert data["robust"]["value"] == data["certified"]["value"] == 0


def test_the_8_bit_grid_on_request(audit: Audit, tmp_path: Path) -> None:
    """Images of 17 grey levels lie on the grid; at eps 0.03 = 7.65/255 rounding leaves room to fool the file."""
    test = Digits().read(Path()).test
    np.savez(tmp_path / "own.npz", images=test.images[:40].numpy(), labels=test.labels[:40].numpy())
    given = (file(tmp_path / "m.onnx"), "--data", "own.npz", *DIGITS[2:], "--attack", "pgd", "--certify", "none")
    status, said, _ = audit(*given, "--grid", "--json", tmp_path / "o.json")
    assert status == 0
    data = json.loads((tmp_path / "o.json").read_text())
    (found,) = (finding for finding in data["findings"] if finding["name"] == "on_grid")
    held, total = (int(word) for word in re.findall(r"^(\d+) of (\d+)", found["text"])[0])
    assert 0 < held <= total == sum(attack["broke"] for attack in data["attacks"])
    assert "still fool the file when rounded" in said
    assert "on_grid" not in audit(*given)[1]


@pytest.mark.parametrize("at_least", ["0.2", "0.99"])
def test_an_early_verdict_is_the_full_one_and_leaves_images_open(at_least: str, audit: Audit, tmp_path: Path) -> None:
    given = (file(tmp_path / "m.onnx"), *DIGITS, "--attack", "apgd,square", "--at-least", at_least)
    full, _, _ = audit(*given, "--json", tmp_path / "full.json")
    status, said, error = audit(
        *given, "--early", "0.99", "--json", tmp_path / "o.json", "--evidence", tmp_path / "e.jsonl"
    )
    assert status == full == (0 if at_least == "0.2" else 1)
    found, whole = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("o", "full"))
    schema = json.loads((ROOT / "docs" / "audit.schema.json").read_text())
    assert fits(found, schema, schema) == []
    early, rows = found["early"], evidence.read(tmp_path / "e.jsonl").examples
    assert whole["early"] is None
    assert early["met"] is (status == 0)
    assert early["open"] == sum(row.open for row in rows) == len(rows) - found["robust"]["samples"] > 0
    assert early["low"] <= whole["robust"]["value"] * len(rows) <= early["high"]
    assert f"{early['open']} of them open: the verdict was certain  (quick)" in said
    assert "at most" in error or status == 0


def test_a_file_of_images_without_a_test_part_is_taken_whole(audit: Audit, tmp_path: Path) -> None:
    test = Digits().read(Path()).test
    np.savez(tmp_path / "own.npz", images=test.images[:30].numpy(), labels=test.labels[:30].numpy())
    options = ("--threads", 1, "--threat", "linf:3/255", "--attack", "fgsm", "--certify", "none")
    status, said, _ = audit(
        file(tmp_path / "m.onnx"), "--data", "own.npz", *options, "--limit", 25, "--evidence", "e.jsonl"
    )
    assert status == 0
    assert "own.npz, 25 of 30 images" in said
    assert "note: own.npz has no test part of its own: all of it is taken" in said
    found = evidence.read(tmp_path / "e.jsonl").examples
    assert [e.label for e in found] == test.labels[:25].tolist()


def test_data_outside_the_range_and_labels_beyond_the_outputs(audit: Audit, tmp_path: Path) -> None:
    test = Digits().read(Path()).test
    images, labels = test.floats(slice(0, 30)).numpy(), test.labels[:30].numpy()
    np.savez(tmp_path / "loud.npz", images=images * 255, labels=labels)
    np.savez(tmp_path / "many.npz", images=images, labels=labels + 1)
    np.savez(tmp_path / "large.npz", images=np.zeros((30, 9, 9), np.uint8), labels=labels)
    model = file(tmp_path / "m.onnx")
    options = ("--threat", "linf:0.1", "--threads", 1)
    wanted = {
        "loud.npz": "images: expected floats in [0, 1], got 0..255",
        "large.npz": "which does not fit images of [1, 9, 9]",
    }
    np.savez(tmp_path / "many.npz", images=images, labels=labels + 1, classes=np.array([f"c{k}" for k in range(11)]))
    wanted["many.npz"] = "it has 10 outputs, but the data holds labels up to 10"
    for name, message in wanted.items():
        status, _, said = audit(model, "--data", name, *options)
        assert status == 2, said
        assert message in said


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["none.onnx"], "none.onnx: cannot be read: No such file or directory"),
        (["."], ".: cannot be read: Is a directory"),
        (["text.onnx"], "text.onnx: onnxruntime cannot load the model"),
        (["nan.onnx"], "nan.onnx: its outputs are NaN or infinite for 48 of 48 images; repair the model"),
        (["pictures.onnx"], "expected a classifier, which answers 2 images with 2 rows of two scores or more"),
        (["score.onnx"], 'its output "v4" is [2, 1]'),
        (["m.onnx", "--layout", "nhwc"], "does not fit images of [1, 8, 8] (C x H x W) as nhwc"),
        (["m.onnx", "--threat", "0.1"], "--threat: expected NORM:EPS such as linf:8/255"),
        (["m.onnx", "--threat", "linf:8"], 'a white image, got 8; pixels lie in [0, 1], did you mean "8/255"?'),
        (["m.onnx", "--threat", "linf:-1"], "eps: Input should be greater than or equal to 0"),
        (["m.onnx", "--threat", "l3:1"], "norm: Input should be 'linf', 'l2' or 'l1'"),
        (["m.onnx", "--attack", "pdg"], 'no method "pdg" in attacks; did you mean "pgd"?'),
        (["m.onnx", "--attack", "transfer"], "transfer: path: Field required; audit takes attacks as they stand"),
        (["m.onnx", "--attack", "carlini_wagner", "--threat", "linf:0.1"], "carlini_wagner: expected a threat in l2"),
        (["m.onnx", "--certify", "ipb"], 'no method "ipb" in bounds; did you mean "ibp"?'),
        (["m.onnx", "--certify", "smoothing"], "smoothing: expected a threat in l2, in which Gaussian noise gives"),
        (["m.onnx", "--certify", "smoothing", "--sigma", "0"], "--certify: sigma: Input should be greater than 0"),
        (["m.onnx", "--n", "500"], "--n: expected --certify smoothing too, whose setting it is"),
        (["m.onnx", "--certify", "ibp,ibp"], "--certify: ibp is named twice"),
        (["m.onnx", "--certify-seconds", "0"], "--certify-seconds: expected a number above 0"),
        (["m.onnx", "--certify", "crown", "--certify-memory", "-1"], "--certify-memory: expected a number above 0"),
        (["m.onnx", "--certify-memory", "1"], "--certify-memory: none of ibp has a memory to cap"),
        (["m.onnx", "--threat", "linf:inf"], 'eps: expected a number or a fraction such as "8/255", got "inf"'),
        (["m.onnx", "--data", "digit"], 'no data set "digit", and no such file or folder; did you mean "digits"?'),
        (["m.onnx", "--data", "mnist"], "MNIST/raw/train-images-idx3-ubyte.gz: do"),
        (["m.onnx", "--limit", "0"], "argument --limit: expected a whole number of at least 1"),
        (["m.onnx", "--limit", "1", "--indices", "list"], "not allowed with argument"),
        (["m.onnx", "--indices", "list"], 'list: line 2: expected a whole number from 0 to 509, got "510"'),
        (["m.onnx", "--indices", "twice"], "twice: line 3: 4 stands on line 1 already"),
        (["m.onnx", "--indices", "empty"], "empty: expected one 0-based index a line, got none"),
        (["m.onnx", "--indices", "none"], "none: cannot be read as text"),
        (["m.onnx", "--mean", "0.5", "--pixels", "0:255"], "expected --pixels or --mean and --std, got both"),
        (["m.onnx", "--mean", "0.5,0.5"], "--mean: expected 1 or 1 numbers, one per channel, got 2"),
        (["m.onnx", "--std", "0"], "--std: expected numbers other than 0"),
        (["m.onnx", "--pixels", "255"], "expected LOW:HIGH such as 0:255"),
        (["m.onnx", "--at-least", "50"], "expected a fraction from 0 to 1"),
        (["m.onnx", "--early", "0.99"], "--early: expected --at-least F too"),
        (["m.onnx", "--early", "0.5", "--at-least", "0.5"], "--early: expected a confidence above 0.5 and below 1"),
        (["m.onnx", "--early", "0.9", "--at-least", "0.5", "--no-shortcuts"], "early verdicts are shortcuts"),
        (["m.onnx", "--json", "nowhere/o.json"], "nowhere/o.json: expected a file in a folder that exists"),
        (["m.onnx", "--evidence", "m.onnx"], "m.onnx: this is the model; writing there would destroy it"),
        ([], "the following arguments are required: MODEL.onnx"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_refused_in_one_message(
    argv: list[str], message: str, audit: Audit, tmp_path: Path
) -> None:
    for name in ("m", "nan", "pictures", "score"):
        if f"{name}.onnx" in argv:
            file(tmp_path / f"{name}.onnx", end="logits" if name == "m" else name)
    for name, text in {"text.onnx": "hello", "list": "1\n510\n", "twice": "4\n\n4\n", "empty": "\n"}.items():
        (tmp_path / name).write_text(text)
    before = {path.name for path in tmp_path.iterdir()}
    options = [
        "--data",
        "digits",
        "--threads",
        "1",
        "--threat",
        "linf:0.03",
        "--json",
        "o.json",
        "--evidence",
        "e.jsonl",
    ]
    status, said, problem = audit(*argv[:1], *options, *argv[1:])
    assert status == 2, said
    assert message in problem
    assert said == ""
    assert problem.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} == before
