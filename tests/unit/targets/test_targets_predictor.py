"""Images in, logits, labels and margins out; anything but images is refused in words."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from targets.lowering.parity import logits_of
from targets.runtime.errors import BadImages, BundleError, MissingRuntime
from targets.runtime.predictor import Predictor, decide, open_bundle
from tests.graphs import images, make_bundle, tiny, write_manifest


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("predictor") / "bundle")


@pytest.fixture(scope="module")
def predictor(folder: Path) -> Predictor:
    return open_bundle(folder)


def test_bytes_and_their_floats_give_the_same_logits(predictor: Predictor) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 1, 8, 8), dtype=np.uint8)
    floats = pixels.astype(np.float64) / 255
    np.testing.assert_allclose(predictor(pixels), predictor(floats), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(predictor(pixels), logits_of(tiny(), pixels.astype(np.float32) / np.float32(255)))


def test_one_image_needs_no_batch_and_long_batches_are_cut(predictor: Predictor) -> None:
    x = images(600)
    np.testing.assert_allclose(predictor(x)[17:18], predictor(x[17]), rtol=1e-5, atol=1e-5)
    assert predictor(x).shape == (600, 4)


def test_a_view_that_is_not_contiguous_is_read_in_its_own_order(predictor: Predictor) -> None:
    x = images(4)
    turned = x.transpose(0, 1, 3, 2)
    np.testing.assert_array_equal(predictor(turned), predictor(np.ascontiguousarray(turned)))


def test_labels_and_margins_are_those_of_the_logits(predictor: Predictor) -> None:
    labels, margins = decide(np.array([[1, 5, 3, 2], [4, 4, 0, -1]], np.float32))
    assert labels.tolist() == [1, 0]
    assert margins.tolist() == [2, 0]
    found, lead = predictor.predict(images(6))
    assert found.dtype == np.int64
    assert (lead >= 0).all()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (np.zeros((2, 8, 8, 1), np.uint8), "channels come first: transpose to NCHW"),
        (np.zeros((2, 3, 8, 8), np.uint8), r"expected shape \[N, 1, 8, 8\], got \[2, 3, 8, 8\]"),
        (np.zeros((0, 1, 8, 8), np.uint8), "expected at least one, got none"),
        (np.zeros((1, 1, 8, 8), np.int64), "expected uint8 or floats, got int64"),
        (np.full((1, 1, 8, 8), np.nan), "got NaN or infinity"),
        (np.full((1, 1, 8, 8), np.inf), "got NaN or infinity"),
        (np.full((1, 1, 8, 8), 200.0), "divide by 255"),
        (np.full((1, 1, 8, 8), -0.001), r"expected values within \[0, 1\]"),
        (np.float32(0.5), "expected shape"),
        (np.array(["a"]), "expected shape"),
    ],
)
def test_other_input_is_refused(predictor: Predictor, given: npt.NDArray[np.float32], words: str) -> None:
    with pytest.raises(BadImages, match=words):
        predictor(given)


def test_a_provider_that_does_not_work_here_is_an_error_and_auto_says_what_runs_instead(tmp_path: Path) -> None:
    folder = make_bundle(tmp_path, provider="NoSuchExecutionProvider")
    with pytest.raises(MissingRuntime, match="built without NoSuchExecutionProvider"):
        open_bundle(folder, runtime="onnxruntime")
    assert open_bundle(folder).provider == "CPUExecutionProvider"


def test_an_engine_must_have_been_built_and_a_runtime_must_have_a_known_name(folder: Path) -> None:
    with pytest.raises(BundleError, match="no engine was built here yet"):
        open_bundle(folder, runtime="tensorrt")
    with pytest.raises(BundleError, match="expected auto, cpu, onnxruntime or tensorrt"):
        open_bundle(folder, runtime="gpu")


def test_a_model_with_other_classes_than_the_manifest_is_noticed(tmp_path: Path) -> None:
    folder = make_bundle(tmp_path, tiny(classes=6), labels=["a", "b", "c", "d"])
    with pytest.raises(BundleError, match=r"expected logits \[2, 4\], got \[2, 6\]"):
        open_bundle(folder)(images(2))


def test_a_model_that_does_not_load_is_a_bundle_error(tmp_path: Path) -> None:
    folder = make_bundle(tmp_path / "bundle", extra={"broken.onnx": b"not a model"})
    text = (folder / "manifest.json").read_text().replace('"model": "model.onnx"', '"model": "broken.onnx"')
    write_manifest(folder, json.loads(text))
    with pytest.raises(BundleError, match="onnxruntime cannot load the model"):
        open_bundle(folder)


def test_predict_py_needs_nothing_of_ours_and_agrees(folder: Path, predictor: Predictor, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", images(3))
    done = script(folder, tmp_path / "x.npy")
    assert done.returncode == 0, done.stderr
    labels, margins = predictor.predict(images(3))
    expected = [f"{predictor.bundle.labels[i]} margin {m:.4f}" for i, m in zip(labels, margins, strict=True)]
    assert done.stdout.splitlines() == expected
    assert len((folder / "predict.py").read_text().splitlines()) <= 20


def test_predict_py_checks_digests_and_input(tmp_path: Path) -> None:
    folder = make_bundle(tmp_path / "bundle")
    np.save(tmp_path / "bad.npy", np.full((1, 1, 8, 8), 9.0))
    assert "within [0, 1]" in script(folder, tmp_path / "bad.npy").stderr
    assert "python predict.py IMAGES.npy" in script(folder).stderr
    np.save(tmp_path / "objects.npy", np.array([{}], object), allow_pickle=True)
    (tmp_path / "short.npy").write_bytes((tmp_path / "bad.npy").read_bytes()[:200])
    (tmp_path / "empty.npy").write_bytes(b"")
    for name in ("objects.npy", "short.npy", "empty.npy", "nowhere.npy"):
        done = script(folder, tmp_path / name)
        assert done.returncode == 1
        assert "no images were read" in done.stderr
        assert "Traceback" not in done.stderr
    (folder / "probe.npz").write_bytes(b"other")
    done = script(folder, tmp_path / "bad.npy")
    assert done.returncode != 0
    assert "probe.npz: missing, or bytes differ" in done.stderr
    (folder / "probe.npz").unlink()
    assert "probe.npz: missing, or bytes differ" in script(folder).stderr


def script(folder: Path, *arguments: Path) -> subprocess.CompletedProcess[str]:
    """The bundle's own script, isolated from this repository."""
    command = [sys.executable, "-I", str(folder / "predict.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder.parent, check=False)
