"""`report`: from a run, its name, its record elsewhere, with figures, without, and with damaged ones."""

import json
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from pipeline.cli import main
from pipeline.cli.report import rendered
from pipeline.core.canonical import file_digest
from pipeline.core.record import RunRecord
from tests.unit.report import sample


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run whose figures lie in the store next to it, as blobs."""
    monkeypatch.chdir(tmp_path)
    folder, record = sample.figures(tmp_path / "figures"), sample.passed()
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest = file_digest(path)
        files[path.relative_to(folder).as_posix()] = digest
        blob = tmp_path / "runs" / "store" / "blobs" / digest[:2] / digest
        blob.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(path.read_bytes())
    last = record.stages[-1]
    artifact = last.artifact.model_copy(update={"files": {**last.artifact.files, **files}})
    stages = (*record.stages[:-1], last.model_copy(update={"artifact": artifact}))
    save(record.model_copy(update={"stages": stages}), tmp_path / "runs" / "digits-jetson" / "record.json")
    return tmp_path / "runs"


def save(record: RunRecord, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record.dump()))


@pytest.mark.parametrize("name", ["digits-jetson", "runs/digits-jetson", "runs/digits-jetson/record.json"])
def test_a_run_is_found_by_name_folder_or_file(runs: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", name]) == 0
    said = capsys.readouterr()
    assert said.out.startswith("<!doctype html>")
    assert said.out.count("data:image/png;base64,") == 18
    assert said.err == ""


def test_the_suffix_of_the_output_names_the_format(runs: Path, tmp_path: Path) -> None:
    for suffix in ("html", "md", "xml"):
        assert main(["report", "digits-jetson", "--out", f"r.{suffix}"]) == 0
    assert (tmp_path / "r.html").read_text().startswith("<!doctype html>")
    assert (tmp_path / "r.md").read_text().startswith("# digits for jetson")
    assert ET.parse(tmp_path / "r.xml").getroot().tag == "testsuites"


def test_a_record_alone_on_another_machine_will_do(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    far = tmp_path / "mail" / "attachment.json"
    far.parent.mkdir()
    far.write_bytes((runs / "digits-jetson" / "record.json").read_bytes())
    assert main(["report", str(far), "--runs", "elsewhere", "--out", "r.html"]) == 0
    assert "21 figure files are not beside the record" in capsys.readouterr().err
    assert "Passed: every gate held" in (tmp_path / "r.html").read_text()


@pytest.mark.parametrize("form", ["html", "markdown", "junit"])
@pytest.mark.parametrize("record", [sample.refused(), sample.unfinished()], ids=["refused", "unfinished"])
def test_a_run_that_ended_early_has_a_report(form: str, record: RunRecord) -> None:
    assert "compress" in rendered(form, record) or record.refused is None


def test_a_flipped_byte_in_a_figure_exits_2(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    digest = json.loads((runs / "digits-jetson" / "record.json").read_text())["stages"][-1]["artifact"]["files"]
    blob = runs / "store" / "blobs" / digest["figures.json"][:2] / digest["figures.json"]
    blob.write_bytes(b"[" + blob.read_bytes()[1:])
    assert main(["report", "digits-jetson"]) == 2
    assert "figures.json is not what the record says" in capsys.readouterr().err


def test_an_unknown_run_lists_those_there_are(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "digit"]) == 2
    assert "runs in runs: digits-jetson" in capsys.readouterr().err
    assert main(["report", "x", "--runs", "void"]) == 2
    assert "there is no run in void" in capsys.readouterr().err


def test_a_folder_is_no_place_for_the_output(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "digits-jetson", "--out", str(tmp_path)]) == 2
    assert "expected a file to write, this is a folder" in capsys.readouterr().err
