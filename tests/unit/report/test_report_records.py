"""Records that cannot be used, each with one message that names the file."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.errors import BadInput
from pipeline.report.records import read_record
from tests.unit.report import sample


def spoiled(spoil: Callable[[dict[str, Any]], object]) -> str:
    data = sample.passed().dump()
    spoil(data)
    return json.dumps(data)


def test_a_record_comes_back_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "record.json").write_text(json.dumps(sample.passed().dump()))
    assert read_record(tmp_path / "record.json") == sample.passed()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the record is not JSON"),
        ("\x00\x01", "the record is not JSON"),
        ('{"schema_version": 1', "the record is not JSON"),
        ("[1, 2]", "not a record of a run: top level"),
        ("{}", "not a record of a run: name: Field required .and 4 more"),
        (
            spoiled(lambda d: d.update(schema_version=2)),
            "has schema version 2, this program reads up to 1; install the",
        ),
        (spoiled(lambda d: d.update(wrong=1)), "not a record of a run: wrong: Extra inputs"),
        (spoiled(lambda d: d["stages"][0].update(seconds="long")), r"stages\.0\.seconds"),
        (
            spoiled(lambda d: d["stages"][5]["outcomes"]["accuracy.clean.test"].update(bits="AAAA")),
            "stage validate, outcomes of accuracy.clean.test: expected 1000 bits",
        ),
        (
            spoiled(lambda d: d["stages"][5]["outcomes"]["accuracy.clean.test"].update(bits="*" * 168)),
            "stage validate, outcomes of accuracy.clean.test: expected 1000 bits",
        ),
    ],
)
def test_what_is_no_record_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "record.json"
    path.write_text(text)
    with pytest.raises(BadInput, match=message) as caught:
        read_record(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert caught.value.status == 2


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"none\.json: expected a baseline here, there is none"):
        read_record(tmp_path / "none.json", "baseline")
    with pytest.raises(BadInput, match="cannot be read: Is a directory"):
        read_record(tmp_path)
    (tmp_path / "latin").write_bytes(b'{"name": "\xff"}')
    with pytest.raises(BadInput, match="not JSON"):
        read_record(tmp_path / "latin")
