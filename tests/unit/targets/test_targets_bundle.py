"""Nothing of a bundle is believed before its digest is checked, and every refusal says which file and why."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from targets.runtime.bundle import open_manifest, verify_files
from targets.runtime.errors import BundleError, TamperedError
from targets.runtime.predictor import open_bundle
from tests.graphs import make_bundle, write_manifest


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return make_bundle(tmp_path / "bundle", extra={"images/one.png": b"not opened", "report.html": b"<p>"})


def manifest_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
    return found


def test_an_untouched_bundle_opens_and_counts_its_files(bundle: Path) -> None:
    opened = open_manifest(bundle)
    assert verify_files(opened) == 5
    assert (opened.shape, opened.classes, opened.labels[2]) == ((1, 8, 8), 4, "cat")


def test_the_folder_of_a_run_stands_for_the_bundle_in_it(bundle: Path) -> None:
    assert open_manifest(bundle.parent).folder == bundle


def test_a_folder_without_a_manifest_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"not a bundle, it holds no manifest\.json") as caught:
        open_manifest(tmp_path / "nowhere")
    assert caught.value.status == 2


@pytest.mark.parametrize("name", ["model.onnx", "probe.npz", "predict.py", "images/one.png", "report.html"])
def test_one_flipped_bit_in_any_file_is_found(bundle: Path, name: str) -> None:
    path = bundle / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(TamperedError, match=f"{path.name}: bytes differ") as caught:
        open_bundle(bundle)
    assert caught.value.status == 2


def test_without_the_sweep_the_model_itself_is_checked_all_the_same(bundle: Path) -> None:
    path = bundle / "model.onnx"
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(TamperedError, match=r"model\.onnx: bytes differ"):
        open_bundle(bundle, verify=False)


def remove(folder: Path) -> None:
    (folder / "probe.npz").unlink()


def add(folder: Path) -> None:
    (folder / "images" / "two.png").write_bytes(b"")


def link_file(folder: Path) -> None:
    (folder / "elsewhere.html").write_bytes((folder / "report.html").read_bytes())
    (folder / "elsewhere.html").rename(folder.parent / "elsewhere.html")
    (folder / "report.html").unlink()
    (folder / "report.html").symlink_to(folder.parent / "elsewhere.html")


def link_folder(folder: Path) -> None:
    (folder / "images").rename(folder.parent / "images")
    (folder / "images").symlink_to(folder.parent / "images")


def link_extra(folder: Path) -> None:
    (folder / "empty").symlink_to(folder.parent)


def plant_engine(folder: Path) -> None:
    (folder / "device.engine").write_bytes(b"an engine that nobody built here")


def add_folder(folder: Path) -> None:
    (folder / "images" / "more").mkdir()


def rename(folder: Path) -> None:
    (folder / "report.html").rename(folder / "rapport.html")


def folder_for_file(folder: Path) -> None:
    (folder / "report.html").unlink()
    (folder / "report.html").mkdir()


def pipe_for_file(folder: Path) -> None:
    (folder / "report.html").unlink()
    os.mkfifo(folder / "report.html")  # to open it would wait for ever


def engine_gone(folder: Path) -> None:
    finished(folder, verdict=[], engine={"sha256": "0" * 64, "bytes": 3})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (add_folder, "more: not in the manifest"),
        (rename, "report.html: missing"),
        (folder_for_file, "report.html: missing"),
        (pipe_for_file, "report.html: missing"),
        (engine_gone, "device.engine: missing"),
        (remove, "probe.npz: missing"),
        (add, "two.png: not in the manifest"),
        (link_file, "report.html: a link"),
        (link_folder, "images: a link"),
        (link_extra, "empty: a link"),
        (plant_engine, "device.engine: no device.json of this bundle names it"),
    ],
)
def test_missing_added_and_linked_files_are_refused(bundle: Path, change: Callable[[Path], None], words: str) -> None:
    change(bundle)
    with pytest.raises(TamperedError, match=words):
        verify_files(open_manifest(bundle))


@pytest.mark.parametrize(
    "name", ["../outside", "/etc/passwd", "a/../../b", "a\\b", "C:evil", "", "manifest.json", "a\0b"]
)
def test_a_path_that_leaves_the_bundle_is_refused_before_any_file_is_read(bundle: Path, name: str) -> None:
    manifest = manifest_of(bundle)
    manifest["files"][name] = {"sha256": "0" * 64, "bytes": 0}
    write_manifest(bundle, manifest)
    with pytest.raises(TamperedError, match="expected a path inside the bundle"):
        open_manifest(bundle)


def test_what_a_killed_finish_leaves_does_not_lock_the_bundle(bundle: Path) -> None:
    (bundle / "device.json.tmp").write_bytes(b"{")
    verify_files(open_manifest(bundle))


def finished(folder: Path, **found: object) -> None:
    """A `device.json` that names this very bundle."""
    named = {"schema_version": 1, "bundle": open_manifest(folder).digest, **found}
    (folder / "device.json").write_text(json.dumps(named))


@pytest.mark.parametrize(
    ("found", "words"),
    [
        ({}, 'expected "verdict"'),
        ({"verdict": 5}, "verdict: expected list"),
        ({"verdict": [5]}, "verdict: expected a metric"),
        ({"verdict": [{"ok": True}]}, "verdict: expected a metric"),
        ({"verdict": [], "engine": 5}, "engine: expected sha256 and bytes"),
        ({"verdict": [], "engine": {"sha256": 5, "bytes": 3}}, "engine: expected sha256 and bytes"),
    ],
)
def test_a_device_file_of_another_form_names_the_field(bundle: Path, found: dict[str, object], words: str) -> None:
    finished(bundle, **found)
    with pytest.raises(BundleError, match=f"device.json: .*{words}|device.json: {words}") as caught:
        open_bundle(bundle)
    assert caught.value.status == 2


def test_a_device_file_of_another_bundle_says_nothing(bundle: Path) -> None:
    (bundle / "device.json").write_text(json.dumps({"schema_version": 1, "bundle": "0" * 64, "verdict": []}))
    assert open_manifest(bundle).device() is None


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("schema_version",), 2, "schema 2 is newer than this runtime reads"),
        (("schema_version",), True, "expected schema_version 1, got True"),
        (("schema_version",), "1", "expected schema_version 1, got '1'"),
        (("name",), None, "name: expected str, got None"),
        (("model",), "other.onnx", "model 'other.onnx' is not among the files"),
        (("precision",), "int4", "precision: expected fp32, fp16 or int8, got 'int4'"),
        (("runtime",), "magic", "runtime: expected onnxruntime or tensorrt"),
        (("machine",), 3, "machine: expected str"),
        (("input", "shape"), [1, 8], "input.shape: expected three positive whole numbers"),
        (("input", "shape"), [1, 8, True], "input.shape: expected three positive whole numbers"),
        (("input", "layout"), "NHWC", "input.layout: expected 'NCHW', got 'NHWC'"),
        (("input", "range"), [0, 255], "input.range: expected"),
        (("output", "classes"), 1, "at least 2 classes"),
        (("labels",), ["a"], "labels: expected 4 names"),
        (("threat",), {"norm": "linf"}, "threat: expected a norm and a finite eps"),
        (("measurements",), [{"name": "x"}], "measurements: expected a name and a finite value"),
        (("owed",), [{"metric": "latency.p95"}], "owed: expected a metric and at_least or at_most"),
        (("files", "model.onnx"), {"sha256": 1}, "expected sha256 and bytes"),
    ],
)
def test_a_manifest_of_another_form_names_the_field(
    bundle: Path, path: tuple[str, ...], value: object, words: str
) -> None:
    manifest = manifest_of(bundle)
    table = manifest
    for key in path[:-1]:
        table = table[key]
    table[path[-1]] = value
    write_manifest(bundle, manifest)
    with pytest.raises(BundleError, match=words):
        open_manifest(bundle)


@pytest.mark.parametrize(
    ("text", "words"),
    [("{", "not JSON"), ("[]", "expected a table"), ('{"a": NaN}', "not JSON"), ("[" * 9999, "not JSON")],
)
def test_a_manifest_that_is_not_json_is_refused(bundle: Path, text: str, words: str) -> None:
    (bundle / "manifest.json").write_text(text)
    with pytest.raises(BundleError, match=words):
        open_manifest(bundle)
