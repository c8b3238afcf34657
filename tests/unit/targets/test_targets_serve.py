"""The server over its own interface (ASGI), and once as a real process: answers, and refusals in words."""

import asyncio
import io
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt
import pytest
from fastapi import FastAPI
from PIL import Image

from stages.data._image import pixels as trained_on
from targets.runtime.body import decode
from targets.runtime.errors import BadImages
from targets.runtime.predictor import Predictor, open_bundle
from targets.runtime.serve import make_app
from tests.graphs import images, make_bundle, tiny

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def predictor(tmp_path_factory: pytest.TempPathFactory) -> Predictor:
    folder = tmp_path_factory.mktemp("serve") / "bundle"
    return open_bundle(make_bundle(folder, owed=[{"metric": "latency.p95", "at_most": 5}]))


@pytest.fixture(scope="module")
def app(predictor: Predictor) -> FastAPI:
    return make_app(predictor, max_bytes=100_000)


def ask(app: FastAPI, method: str, path: str, body: Any = None, **headers: str) -> httpx.Response:
    async def go() -> httpx.Response:
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://bundle") as client:
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            return await client.request(method, path, content=body, headers=named)

    return asyncio.run(go())


def npy(array: npt.NDArray[Any], **options: Any) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, **options)
    return stream.getvalue()


def picture(kind: str, mode: str = "L", size: tuple[int, int] = (8, 8)) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    stream = io.BytesIO()
    made = (
        Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
        if mode == "I;16"
        else Image.fromarray(pixels).convert(mode)
    )
    made.save(stream, kind)
    return stream.getvalue()


def frames() -> bytes:
    stream = io.BytesIO()
    first, second = (Image.fromarray(np.full((8, 8), value, np.uint8)) for value in (0, 200))
    first.save(stream, "PNG", save_all=True, append_images=[second])
    return stream.getvalue()


def check(response: httpx.Response, predictor: Predictor, x: npt.NDArray[Any]) -> None:
    assert response.status_code == 200, response.text
    labels, margins = predictor.predict(x)
    found = response.json()
    assert found["classes"] == labels.tolist()
    assert found["labels"] == [predictor.bundle.labels[i] for i in labels]
    np.testing.assert_allclose(found["margins"], margins, atol=1e-5)


def test_npy_raw_and_bytes_are_predicted_as_the_predictor_does(app: FastAPI, predictor: Predictor) -> None:
    x = images(5)
    pixels = (x * 255).round().astype(np.uint8)
    check(ask(app, "POST", "/predict", npy(x)), predictor, x)
    check(ask(app, "POST", "/predict", npy(pixels)), predictor, pixels)
    check(ask(app, "POST", "/predict", npy(np.asfortranarray(x))), predictor, x)
    check(ask(app, "POST", "/predict", npy(x.astype(">f8"))), predictor, x)
    check(ask(app, "POST", "/predict", x.tobytes()), predictor, x)
    check(ask(app, "POST", "/predict", x.tobytes(), x_shape="5,1,8,8"), predictor, x)
    check(ask(app, "POST", "/predict", pixels.tobytes(), x_dtype="uint8"), predictor, pixels)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_pictures_are_predicted(app: FastAPI, predictor: Predictor, kind: str, mode: str) -> None:
    body = picture(kind, mode)
    pixels = np.asarray(Image.open(io.BytesIO(body)).convert("L"))[None, None]
    check(ask(app, "POST", "/predict", body, content_type=f"image/{kind.lower()}"), predictor, pixels)


def test_colour_pictures_come_out_channels_first() -> None:
    body = picture("PNG", "RGB", (6, 4))
    found = decode(body, {}, (3, 4, 6))
    np.testing.assert_array_equal(found[0].transpose(1, 2, 0), np.asarray(Image.open(io.BytesIO(body))))


@pytest.mark.parametrize(
    ("kind", "mode"), [("PNG", "RGBA"), ("PNG", "LA"), ("PNG", "P"), ("PNG", "1"), ("JPEG", "CMYK")]
)
def test_every_picture_of_8_bits_is_read_as_for_training(
    app: FastAPI, predictor: Predictor, tmp_path: Path, kind: str, mode: str
) -> None:
    body = picture(kind, mode)
    (tmp_path / "one").write_bytes(body)
    trained = trained_on(tmp_path / "one")
    grey = trained if trained.shape[2] == 1 else np.asarray(Image.fromarray(trained).convert("L"))[..., None]
    check(ask(app, "POST", "/predict", body), predictor, grey.transpose(2, 0, 1)[None])
    np.testing.assert_array_equal(decode(picture(kind, mode), {}, (3, 8, 8)).shape, (1, 3, 8, 8))


def test_the_cameras_orientation_mark_is_obeyed_as_for_training(tmp_path: Path) -> None:
    pixels = np.arange(24, dtype=np.uint8).reshape(4, 6) * 10
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    found = decode((tmp_path / "turned.png").read_bytes(), {}, (1, 6, 4))
    np.testing.assert_array_equal(found[0, 0], np.rot90(pixels, -1))
    np.testing.assert_array_equal(found[0, 0], trained_on(tmp_path / "turned.png")[:, :, 0])
    with pytest.raises(BadImages, match="expected a picture of 6 x 4, got 4 x 6"):
        decode((tmp_path / "turned.png").read_bytes(), {}, (1, 4, 6))


def header(shape: str, dtype: str = "<f4") -> bytes:
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


class Evil:
    """What a pickle would run."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, ("/tmp/this-must-never-exist",)


@pytest.mark.parametrize(
    ("body", "headers", "words"),
    [
        (b"", {}, "got no bytes"),
        (b"12345", {}, "expected a multiple of 256 bytes"),
        (b"12345", {"x_dtype": "float64"}, "X-Dtype: expected uint8 or float32"),
        (b"12345", {"x_shape": "1,-1,8,8"}, "X-Shape: expected whole numbers"),
        (b"12345", {"x_shape": "1,1,8,8"}, "expected 256 bytes for X-Shape, got 5"),
        (b"12345", {"content_type": "image/webp"}, "image/webp cannot be read"),
        (b'{"x": 1}', {"content_type": "application/json"}, "application/json cannot be read"),
        (npy(np.zeros((1, 3, 8, 8), np.float32)), {}, r"expected shape \[N, 1, 8, 8\]"),
        (npy(np.zeros((2, 8, 8, 1), np.uint8)), {}, "transpose to NCHW"),
        (npy(np.full((1, 1, 8, 8), np.nan, np.float32)), {}, "NaN or infinity"),
        (npy(np.full((1, 1, 8, 8), 3, np.float32)), {}, "divide by 255"),
        (npy(np.zeros((1, 1, 8, 8), np.complex64)), {}, "expected uint8 or floats"),
        (npy(np.zeros((1, 1, 8, 8), np.float32))[:-9], {}, "bytes follow it"),
        (npy(np.zeros((1, 1, 8, 8), np.float32)) + b"more", {}, "bytes follow it"),
        (npy(np.array([Evil()], object), allow_pickle=True), {}, "never done"),
        (header("(100000000000, 1, 8, 8)"), {}, "but 0 bytes follow it"),
        (header("(-1, 1, 8, 8)"), {}, "no array of numbers"),
        (header("__import__('os').mkdir('/tmp/this-must-never-exist')"), {}, "cannot be read"),
        (header("(1,)", "V" * 60), {}, "cannot be read"),
        (header("(-2, -1, 8, 8)") + bytes(512), {}, "no array of numbers"),
        (header("(True, 1, 8, 8)") + bytes(256), {}, "no array of numbers"),
        (header("(5,)", "|V0"), {}, "no array of numbers"),
        (header("(5,)", "<U0"), {}, "no array of numbers"),
        (b"\x93NUMPY", {}, "cannot be read"),
        (b"\x93NUMPY\x09\x00junkjunkjunk", {}, "cannot be read"),
        (picture("PNG", "L", (9, 8)), {}, "expected a picture of 8 x 8, got 9 x 8"),
        (picture("PNG", "L", (8, 9)), {}, "expected a picture of 8 x 8, got 8 x 9"),
        (picture("PNG", "I;16"), {}, r'expected 8 bits a channel, got mode "I;16"'),
        (frames(), {}, "several frames"),
        (picture("PNG")[:40], {}, "cannot be read: it is damaged or cut short"),
        (picture("JPEG")[:200], {}, "the picture cannot be read"),
    ],
)
def test_bad_bodies_are_answered_422_with_a_reason(
    app: FastAPI, body: bytes, headers: Mapping[str, str], words: str
) -> None:
    response = ask(app, "POST", "/predict", body, **headers)
    assert response.status_code == 422
    assert re.search(words, response.json()["error"]), response.text
    assert not Path("/tmp/this-must-never-exist").exists()


def test_too_much_is_refused_before_and_while_it_comes(app: FastAPI) -> None:
    assert ask(app, "POST", "/predict", b"\0" * 100_001).status_code == 413

    async def pieces() -> Any:
        for _ in range(20):
            yield b"\0" * 10_000

    response = ask(app, "POST", "/predict", pieces())
    assert response.status_code == 413
    assert "at most 100000 bytes" in response.json()["error"]


def test_health_and_manifest_tell_what_is_served_and_what_is_owed(app: FastAPI, predictor: Predictor) -> None:
    health = ask(app, "GET", "/health").json()
    assert health == {
        "status": "ok",
        "name": "tiny",
        "target": "x86_cpu",
        "provider": "CPUExecutionProvider",
        "owed": ["latency.p95"],
    }
    assert ask(app, "GET", "/manifest").json() == predictor.bundle.manifest


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/predict", 405), ("GET", "/nothing", 404), ("GET", "/docs", 404), ("GET", "/openapi.json", 404)],
)
def test_other_routes_are_not_there(app: FastAPI, method: str, path: str, status: int) -> None:
    assert ask(app, method, path).status_code == status


def test_a_network_of_four_channels_takes_no_pictures() -> None:
    with pytest.raises(BadImages, match="a picture has 1 or 3 channels"):
        decode(picture("PNG"), {}, (4, 8, 8))


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    folder = make_bundle(tmp_path / "bundle", tiny(), owed=[{"metric": "latency.p95", "at_most": 5}])
    log = tmp_path / "log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "pipeline", "serve", str(folder), "--port", "0"], stderr=file, cwd=ROOT
        )
        try:
            yield address(log, process), log
        finally:
            process.terminate()
            process.wait(timeout=30)


def address(log: Path, process: subprocess.Popen[bytes]) -> str:
    for _ in range(600):
        found = re.search(r"running on (http://\S+)", log.read_text())
        if found:
            return found[1]
        assert process.poll() is None, log.read_text()
        time.sleep(0.05)
    raise AssertionError(log.read_text())


def test_a_real_server_starts_says_what_is_owed_predicts_and_stops(server: tuple[str, Path]) -> None:
    url, log = server
    with httpx.Client(trust_env=False) as client:
        answer = client.post(f"{url}/predict", content=npy(images(3)))
        assert answer.status_code == 200
        assert len(answer.json()["classes"]) == 3
        assert client.post(f"{url}/predict", content=b"junk").status_code == 422
        assert client.get(f"{url}/health").json()["status"] == "ok"
    text = log.read_text()
    assert "serving tiny for x86_cpu: model.onnx on CPUExecutionProvider" in text
    assert "limit owed on the device: latency.p95" in text
    assert json.loads((log.parent / "bundle" / "manifest.json").read_text())["name"] == "tiny"
