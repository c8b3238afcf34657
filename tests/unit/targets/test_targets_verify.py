"""`verify` and the other device commands through the command line: exit status and one line of reason."""

from pathlib import Path

import pytest

from pipeline.cli import main
from tests.graphs import make_bundle, tiny


def test_an_untouched_bundle_passes_and_shows_its_digest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_bundle(tmp_path, owed=[{"metric": "latency.p95", "at_most": 3}])
    assert main(["verify", str(folder)]) == 0
    shown = capsys.readouterr().out
    assert "3 files as recorded" in shown
    assert "manifest sha256 " in shown
    assert "owed on the device: latency.p95" in shown


@pytest.mark.parametrize("command", ["verify", "finish", "serve"])
def test_a_changed_byte_ends_in_2_with_one_clear_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    folder = make_bundle(tmp_path)
    data = bytearray((folder / "probe.npz").read_bytes())
    data[-1] ^= 255
    (folder / "probe.npz").write_bytes(bytes(data))
    assert main([command, str(folder)]) == 2
    error = capsys.readouterr().err
    assert "probe.npz: bytes differ from the recorded ones" in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize("command", ["verify", "finish", "serve"])
def test_no_bundle_ends_in_2(tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str) -> None:
    assert main([command, str(tmp_path)]) == 2
    assert "not a bundle" in capsys.readouterr().err


def test_a_model_that_computes_something_else_than_was_recorded_ends_in_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    probe = (make_bundle(tmp_path / "other", tiny(seed=3)) / "probe.npz").read_bytes()
    folder = make_bundle(tmp_path / "b", extra={"probe.npz": probe})
    assert main(["verify", str(folder)]) == 2
    assert "the probe outputs differ by" in capsys.readouterr().err


def test_a_broken_probe_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_bundle(tmp_path, extra={"probe.npz": b"PK nonsense"})
    assert main(["verify", str(folder)]) == 2
    assert "probe.npz: expected arrays inputs and logits" in capsys.readouterr().err
