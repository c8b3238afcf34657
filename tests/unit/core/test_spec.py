"""One case per message that a user can see while a spec is read."""

from pathlib import Path

import pytest

from pipeline.core.errors import BadInput, SpecError
from pipeline.core.spec import merge_into, presets, read


def _write(folder: Path, text: str) -> Path:
    path = folder / "my spec.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_no_spec_means_the_digits_preset() -> None:
    draft = read()
    assert draft.data["name"] == "digits"
    assert draft.data["task"]["data"] == "digits"


def test_every_preset_reads() -> None:
    for preset in presets():
        assert read(preset=preset).data["name"] == preset


def test_file_lies_over_preset_and_settings_over_both(tmp_path: Path) -> None:
    path = _write(tmp_path, 'preset = "digits"\nseed = 7\n[stages.train]\nepochs = 3\n')
    draft = read(path, settings=["train.lr=0.5", "stages.train.kind=at", "task.data=mnist"])
    assert draft.data["seed"] == 7
    assert draft.data["name"] == "my-spec"
    assert draft.data["stages"]["train"] == {"kind": "at", "epochs": 3, "lr": 0.5}
    assert draft.data["task"]["data"] == "mnist"
    assert draft.data["stages"]["search"]["kind"] == "fixed"


def test_another_kind_replaces_the_whole_table() -> None:
    base = {"train": {"kind": "at", "steps": 7}}
    merge_into(base, {"train": {"kind": "natural", "epochs": 2}})
    assert base == {"train": {"kind": "natural", "epochs": 2}}


def test_places_name_file_and_line(tmp_path: Path) -> None:
    path = _write(
        tmp_path, '[task]\ndata = "mnist"\n\n[stages.train] # recipe\nattempts = [\n  { lr = 1 },\n]\nepochs = 3\n'
    )
    draft = read(path)
    assert draft.where(("task", "data")).endswith("my spec.toml:2: task.data")
    assert draft.where(("stages", "train", "epochs")).endswith(":8: stages.train.epochs")
    assert draft.where(("stages", "train", "attempts", "0", "lr")).endswith(":5: stages.train.attempts.0.lr")
    assert draft.where(("stages", "export")) == "stages.export"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the spec is empty"),
        ("a = = 1", "not TOML"),
        ('preset = "digit"', 'did you mean "digits"'),
        ("preset = 3", "expected a name"),
    ],
)
def test_unusable_files(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        read(_write(tmp_path, text))


def test_missing_file_and_binary_file(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no such file"):
        read(tmp_path / "absent.toml")
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BadInput, match="UTF-8"):
        read(tmp_path / "bytes.toml")


@pytest.mark.parametrize(
    ("setting", "message"),
    [("train", "expected a.b=value"), ("=3", "expected a.b=value"), ("trian.epochs=3", 'did you mean "train"')],
)
def test_bad_settings(setting: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        read(settings=[setting])


def test_setting_values_are_toml_or_text() -> None:
    data = read(settings=["train.a=[1, 2]", "train.b=8/255", "train.c=true", "name=x-1"]).data
    assert data["stages"]["train"]["a"] == [1, 2]
    assert data["stages"]["train"]["b"] == "8/255"
    assert data["stages"]["train"]["c"] is True
    assert data["name"] == "x-1"


def test_a_knob_that_a_later_layer_sets_is_not_turned_by_the_attempts_of_an_earlier_one(tmp_path: Path) -> None:
    assert [a["ratio"] for a in read(None, "digits").data["stages"]["compress"]["attempts"]] == [0.5, 0.25]
    alone = read(None, "digits", ["compress.ratio=0.3"]).data["stages"]["compress"]
    assert (alone["ratio"], "attempts" in alone) == (0.3, False)
    other = read(None, "digits", ["compress.tune_epochs=3"]).data["stages"]["compress"]
    assert (other["tune_epochs"], len(other["attempts"])) == (3, 2)
    (tmp_path / "spec.toml").write_text(
        'preset = "digits"\n[stages.compress]\nattempts = { bisect = "ratio", from = 0.9, to = 0.1 }\n'
    )
    assert "attempts" in read(tmp_path / "spec.toml").data["stages"]["compress"]
    last = read(tmp_path / "spec.toml", None, ["compress.ratio=0.3"]).data["stages"]["compress"]
    assert "attempts" not in last
