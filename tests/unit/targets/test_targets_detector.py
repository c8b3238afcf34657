"""A bundle whose model holds a detector: read, answered over HTTP, verified, and built by NVIDIA's parser."""

import argparse
import asyncio
import io
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import onnx
import pytest

from stages.detectors.base import guard
from stages.detectors.feature_squeezing import FeatureSqueezing
from targets.lowering.attach import attach
from targets.runtime import trt_build, verify
from targets.runtime.bundle import open_manifest
from targets.runtime.errors import BundleError, TamperedError
from targets.runtime.ort import OrtEngine
from targets.runtime.predictor import open_bundle
from targets.runtime.serve import make_app
from targets.runtime.trt import TrtEngine
from tests.graphs import CLASSES, SHAPE, images, make_bundle, tiny

THRESHOLD = 0.4
DETECTOR = FeatureSqueezing(squeezers=("bit_2", "median_2", "nlm_3_3_20"))
CONTRACT = {"kind": "feature_squeezing", "threshold": THRESHOLD, "outputs": ["score", "flag"]}


def guarded(threshold: float = THRESHOLD) -> bytes:
    around = onnx.load_from_string(guard(DETECTOR, threshold, SHAPE, CLASSES))
    data: bytes = attach(onnx.load_from_string(tiny()), around).SerializeToString(deterministic=True)
    return data


def bundle(folder: Path, model: bytes | None = None, **over: Any) -> Path:
    """As `build` writes one: the probe holds the scores of the model with its detector."""
    inputs, stream = images(12, seed=5), io.BytesIO()
    found = OrtEngine(guarded()).outputs(inputs)
    np.savez(stream, inputs=inputs, logits=found["logits"], score=found["score"])
    extra = {"probe.npz": stream.getvalue()}
    return make_bundle(folder, model or guarded(), inputs, extra, **{"detector": CONTRACT, **over})


@pytest.fixture(name="folder", scope="module")
def _folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bundle(tmp_path_factory.mktemp("guarded") / "bundle")


def test_the_predictor_passes_score_and_flag_through(folder: Path) -> None:
    x, predictor = images(300, seed=2), open_bundle(folder)
    found, expected = predictor.answer(x), OrtEngine(guarded()).outputs(x)
    assert found.scores is not None
    assert found.flags is not None
    assert np.array_equal(found.logits, predictor(x))
    assert np.array_equal(found.scores, expected["score"])
    assert np.array_equal(found.flags, found.scores > np.float32(THRESHOLD))
    assert 0 < found.flags.sum() < 300


def test_a_bundle_without_a_detector_answers_without(tmp_path: Path) -> None:
    found = open_bundle(make_bundle(tmp_path)).answer(images(3))
    assert (found.scores, found.flags) == (None, None)


def test_a_manifest_that_promises_a_detector_which_the_model_has_not_is_found_out(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"expected score \[2\], got nothing"):
        open_bundle(bundle(tmp_path, tiny())).answer(images(2))


@pytest.mark.parametrize("field", [{"outputs": ["flag"]}, {"threshold": "high"}, {"threshold": None}])
def test_a_detector_of_another_form_is_refused(tmp_path: Path, field: dict[str, object]) -> None:
    with pytest.raises(BundleError, match=r'detector: expected outputs \["score", "flag"\] and a finite threshold'):
        open_manifest(bundle(tmp_path, detector={**CONTRACT, **field}))


def test_serve_answers_with_scores_and_flags(folder: Path) -> None:
    x, stream = images(20, seed=2), io.BytesIO()
    np.save(stream, x)
    predictor = open_bundle(folder)

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(app=make_app(predictor))
        async with httpx.AsyncClient(transport=transport, base_url="http://bundle") as client:
            return await client.post("/predict", content=stream.getvalue())

    answer = asyncio.run(ask()).json()
    found = predictor.answer(x)
    assert list(answer) == ["classes", "labels", "margins", "scores", "flags"]
    assert found.scores is not None
    assert found.flags is not None
    assert answer["flags"] == found.flags.tolist()
    assert answer["scores"] == pytest.approx(found.scores.tolist(), abs=1e-6)


def test_predict_py_says_what_is_flagged(folder: Path, tmp_path: Path) -> None:
    x, predictor = images(20, seed=2), open_bundle(folder)
    np.save(tmp_path / "x.npy", x)
    command = [sys.executable, "-I", str(folder / "predict.py"), str(tmp_path / "x.npy")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    flags = predictor.answer(x).flags
    assert flags is not None
    assert [line.endswith(" flagged") for line in done.stdout.splitlines()] == flags.tolist()
    assert len((folder / "predict.py").read_text().splitlines()) <= 20


def test_verify_holds_the_scores_and_the_threshold(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(path: Path) -> int:
        return verify.run(argparse.Namespace(bundle=path, threads=1))

    assert run(folder) == 0
    assert "detector: the scores are reproduced, " in capsys.readouterr().out
    with pytest.raises(TamperedError, match=r"a flag is not its score held against the manifest's threshold 0\.1"):
        run(bundle(tmp_path / "threshold", detector={**CONTRACT, "threshold": 0.1}))
    other = bundle(tmp_path / "scores")
    with np.load(other / "probe.npz") as arrays:
        changed, stream = {**arrays, "score": arrays["score"] + 1}, io.BytesIO()
    np.savez(stream, **changed)
    with pytest.raises(TamperedError, match="the detector's scores differ by 1 from the recorded ones"):
        run(
            make_bundle(
                tmp_path / "changed", guarded(), images(12, seed=5), {"probe.npz": stream.getvalue()}, detector=CONTRACT
            )
        )
    without = {name: value for name, value in changed.items() if name != "score"}
    stream = io.BytesIO()
    np.savez(stream, **without)
    with pytest.raises(BundleError, match="expected arrays inputs and score"):
        run(
            make_bundle(
                tmp_path / "none", guarded(), images(12, seed=5), {"probe.npz": stream.getvalue()}, detector=CONTRACT
            )
        )


def test_nvidias_parser_and_builder_take_a_detector(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    (tmp_path / "model.onnx").write_bytes(guarded())
    built = trt_build.build_apart("tensorrt_rtx", tmp_path / "model.onnx")
    assert built.bytes > 10_000


class Memory:
    """Stands in for the CUDA driver: device memory is a dictionary of bytes."""

    stream = 5

    def __init__(self) -> None:
        self.blocks: dict[int, np.ndarray] = {}

    def enter(self) -> None:
        return

    def allocate(self, size: int) -> int:
        self.blocks[len(self.blocks) + 1] = np.zeros(size, np.uint8)
        return len(self.blocks)

    def upload(self, pointer: int, array: np.ndarray) -> None:
        self.blocks[pointer][: array.nbytes] = array.view(np.uint8).ravel()

    def download(self, array: np.ndarray, pointer: int) -> None:
        array.view(np.uint8).reshape(-1)[:] = self.blocks[pointer][: array.nbytes]

    def wait(self) -> None:
        return


def test_an_engine_hands_back_all_three_outputs_in_pieces() -> None:
    """The engine's place is taken by onnxruntime on the same graph, behind device memory that is a dictionary."""
    memory, where, shape = Memory(), dict[str, int](), list[tuple[int, ...]]()
    model = OrtEngine(guarded())

    def execute(stream: int) -> bool:
        size = 4 * int(np.prod(shape[-1]))
        x = memory.blocks[where["input"]][:size].view(np.float32).reshape(shape[-1])
        for name, array in model.outputs(x).items():
            memory.upload(where[name], np.ascontiguousarray(array))
        return stream == memory.stream

    context = SimpleNamespace(
        set_tensor_address=where.__setitem__,
        set_input_shape=lambda _, dims: shape.append(tuple(dims)),
        execute_async_v3=execute,
    )
    engine = SimpleNamespace(create_execution_context=lambda: context)
    fake = SimpleNamespace(
        Logger=type("Logger", (), {"ERROR": 1, "__init__": lambda *_: None}),
        Runtime=lambda _: SimpleNamespace(deserialize_cuda_engine=lambda _: engine),
    )
    x = images(150)
    found = TrtEngine(fake, b"plan", memory, SHAPE, CLASSES, guarded=True).outputs(x)
    expected = [model.outputs(x[at : at + 64]) for at in range(0, 150, 64)]
    for name in ("logits", "score", "flag"):
        np.testing.assert_array_equal(found[name], np.concatenate([part[name] for part in expected]))
    assert found["flag"].dtype == np.bool_
