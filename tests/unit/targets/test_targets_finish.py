"""`finish` settles what is owed on the device, says what is not, and leaves one file behind, whole or not at all."""

import argparse
import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from targets.runtime import finish
from targets.runtime.bundle import open_manifest, verify_files
from targets.runtime.errors import BundleError, TamperedError
from targets.runtime.finish import Row, settle
from targets.runtime.options import finish_options
from tests.graphs import make_bundle, tiny

NUMBERS = [
    Row("latency.p95", 4.0, 3.0, 5.0, "ms", 200, "lower"),
    Row("parity.top1", 0.9, 0.8, 1.0, "fraction", 9, "higher"),
]


def run(folder: Path, *more: str) -> int:
    parser = argparse.ArgumentParser()
    finish_options(parser)
    return finish.run(parser.parse_args([str(folder), "--runs", "30", "--warmup", "2", *more]))


def device_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "device.json").read_text())
    return found


def test_limits_are_held_against_the_end_of_the_interval_that_hurts() -> None:
    assert settle({"metric": "latency.p95", "at_most": 5.0}, NUMBERS, None)["ok"] is True
    assert settle({"metric": "latency.p95", "at_most": 4.5}, NUMBERS, None)["ok"] is False
    assert settle({"metric": "parity.top1", "at_least": 0.8}, NUMBERS, None)["ok"] is True
    assert settle({"metric": "parity.top1", "at_least": 0.85}, NUMBERS, None)["ok"] is False


def test_a_limit_on_another_device_stays_owed_and_an_unknown_metric_fails() -> None:
    owed = settle({"metric": "latency.p95", "at_most": 5.0}, NUMBERS, "measured on x86_64, not on aarch64")
    assert owed["ok"] is None
    assert "still owed: measured on x86_64" in owed["text"]
    assert settle({"metric": "accuracy.clean.test", "at_least": 0.5}, NUMBERS, None)["ok"] is False


@pytest.mark.parametrize(("limit", "status"), [(60_000.0, 0), (1e-6, 1)])
def test_finish_settles_what_is_owed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], limit: float, status: int
) -> None:
    folder = make_bundle(tmp_path / "b", owed=[{"metric": "latency.p95", "at_most": limit, "on_device": True}])
    assert open_manifest(folder).still_owed() == ("latency.p95",)
    assert run(folder) == status
    shown = capsys.readouterr().out
    assert ("FAILED" in shown) is (status == 1)
    assert len(shown.splitlines()) < 15
    device = device_of(folder)
    assert {m["name"] for m in device["measurements"]} == {
        "latency.p50", "latency.p95", "memory.peak", "parity.logits", "parity.top1", "size.model",
    }  # fmt: skip
    assert device["verdict"][0]["ok"] is (status == 0)
    bundle = open_manifest(folder)
    verify_files(bundle)
    assert bundle.still_owed() == (() if status == 0 else ("latency.p95",))


def test_another_machine_measures_but_settles_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = "aarch64" if platform.machine() != "aarch64" else "x86_64"
    folder = make_bundle(tmp_path, machine=other, owed=[{"metric": "latency.p95", "at_most": 1e9}])
    assert run(folder) == 1
    assert f"measured on {platform.machine()}, not on {other}" in capsys.readouterr().out
    assert open_manifest(folder).still_owed() == ("latency.p95",)


def test_a_tensorrt_bundle_without_tensorrt_runs_on_onnxruntime_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from targets.runtime import trt, trt_build

    if trt_build.installed() and trt.driver_answers():
        pytest.skip("this machine has TensorRT and a driver")
    folder = make_bundle(tmp_path, runtime="tensorrt", owed=[{"metric": "latency.p95", "at_most": 1e9}])
    assert run(folder) == 1
    assert "still owed: " in capsys.readouterr().out
    with pytest.raises(BundleError, match="with --runtime onnxruntime"):
        run(folder, "--runtime", "tensorrt")
    assert run(folder, "--runtime", "onnxruntime") == 0


def test_a_probe_that_does_not_come_out_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_bundle(tmp_path / "other", tiny(seed=8))
    stored = (folder / "probe.npz").read_bytes()
    wrong = make_bundle(tmp_path / "wrong", extra={"probe.npz": stored})
    assert run(wrong) == 1
    assert "probe outputs differ by" in capsys.readouterr().out
    assert device_of(wrong)["failures"]


def test_tampering_is_found_before_anything_is_measured(tmp_path: Path) -> None:
    folder = make_bundle(tmp_path)
    with (folder / "model.onnx").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(TamperedError, match="bytes differ"):
        run(folder)
    assert not (folder / "device.json").exists()


def test_the_report_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "device.json"
    finish.write_json(path, {"a": 1})

    def fail(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(BundleError, match="cannot be written: No space left on device"):
        finish.write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}


def test_nan_from_the_engine_is_a_failure_not_a_number(tmp_path: Path) -> None:
    bundle = open_manifest(make_bundle(tmp_path))
    from targets.runtime.predictor import Predictor

    broken = Predictor(bundle, lambda x: {"logits": np.full((len(x), 4), np.nan, np.float32)}, "none")
    rows, failures = finish._parity(broken, 0.1)
    assert (rows, failures) == ([], ["the probe outputs hold NaN or infinity"])


def test_the_table_shows_intervals_and_verdicts() -> None:
    rows: Sequence[Row] = NUMBERS
    text = finish.table(rows, [{"ok": None, "text": "later"}], ["worse"], "ort")
    assert "latency.p95" in text
    assert "(3 ms .. 5 ms)" in text
    assert "owed    later" in text
    assert "FAILED  worse" in text
