"""The Dockerfile builds without a container engine (buildah, chroot isolation), and the image serves a prediction."""

import json
import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt
import pytest

from targets.runtime.predictor import open_bundle

pytestmark = [pytest.mark.image, pytest.mark.timeout(600)]
ROOT = Path(__file__).parents[2]
TAG = "temper-serve:test"


@dataclass(frozen=True)
class Store:
    """buildah over a store of its own in the cache folder."""

    home: Path

    def command(self, *arguments: str) -> list[str]:
        folders = ["--root", str(self.home / "store"), "--runroot", str(self.home / "runroot")]
        return ["buildah", *folders, "--storage-driver", "vfs", *arguments]

    @property
    def env(self) -> dict[str, str]:
        return {**os.environ, "BUILDAH_ISOLATION": "chroot", "XDG_RUNTIME_DIR": str(self.home / "run")}

    def __call__(self, *arguments: str) -> str:
        done = subprocess.run(self.command(*arguments), capture_output=True, text=True, env=self.env, check=False)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout.strip()


@pytest.fixture(scope="module")
def store(prepared: Callable[[str, tuple[str, ...]], Path]) -> Store:
    return Store(prepared("image", ("buildah", "debootstrap")))


@pytest.fixture(scope="module")
def image(store: Store) -> Iterator[dict[str, Any]]:
    """What the built image says of itself."""
    options = ["--isolation", "chroot", "--pull-never", "--format", "docker", "--layers=false", "--target", "serve"]
    conf = f"{store.home / 'pip.conf'}:/etc/pip.conf:ro"
    store("bud", *options, "-v", conf, "-t", TAG, "-f", str(ROOT / "Dockerfile"), str(ROOT))
    yield json.loads(store("inspect", "--type", "image", TAG))["Docker"]["config"]
    store("rmi", TAG)


@pytest.fixture
def container(store: Store, image: dict[str, Any]) -> Iterator[str]:
    assert image
    name = store("from", "--pull-never", TAG)
    yield name
    store("rm", name)


def test_the_image_says_how_to_run_watch_and_whom_to_be(image: dict[str, Any]) -> None:
    assert image["Entrypoint"] == ["python", "-m", "pipeline", "serve", "/bundle", "--host", "0.0.0.0"]
    assert image["User"] == "temper"
    assert "/health" in image["Healthcheck"]["Test"][-1]
    assert "ORT_DISABLE_TELEMETRY=1" in image["Env"]


def test_the_image_holds_the_device_runtime_and_nothing_heavier(store: Store, container: str) -> None:
    program = (
        "import importlib.util, os, pathlib; "
        "heavy = [m for m in ('torch', 'onnx', 'stages', 'pipeline.engine') if importlib.util.find_spec(m)]; "
        "print(os.getuid(), heavy, sorted(p.name for p in pathlib.Path('/app').iterdir()))"
    )
    shown = store("run", "--isolation", "chroot", container, "--", "python", "-c", program)
    assert shown == "10001 [] ['pipeline', 'targets']"


def test_the_image_serves_a_prediction_as_another_user(
    store: Store,
    image: dict[str, Any],
    container: str,
    bundles: Mapping[str, Path],
    digits: npt.NDArray[np.float32],
    tmp_path: Path,
) -> None:
    bundle, x = bundles["x86_cpu"], digits[::16]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Under chroot isolation the network is this machine's, so the server listens on loopback and a port of our own.
    entry = [*image["Entrypoint"], "--host", "127.0.0.1", "--port", str(port)]
    arguments = ["run", "--isolation", "chroot", "--volume", f"{bundle}:/bundle:ro", container, "--", *entry]
    with (tmp_path / "log").open("wb") as log:
        server = subprocess.Popen(store.command(*arguments), stdout=log, stderr=log, env=store.env)
        try:
            answer = ask(f"http://127.0.0.1:{port}", x.tobytes(), server, tmp_path / "log")
        finally:
            server.terminate()
            server.wait(timeout=60)
    labels, margins = open_bundle(bundle).predict(x)
    assert answer["classes"] == labels.tolist()
    np.testing.assert_allclose(answer["margins"], margins, atol=1e-4)


def ask(url: str, body: bytes, server: "subprocess.Popen[bytes]", log: Path) -> dict[str, Any]:
    with httpx.Client(trust_env=False, timeout=10) as client:
        for _ in range(600):
            assert server.poll() is None, log.read_text()
            try:
                assert client.get(f"{url}/health").json()["status"] == "ok"
            except httpx.TransportError:
                time.sleep(0.1)
                continue
            response = client.post(f"{url}/predict", content=body)
            assert response.status_code == 200, response.text
            answer: dict[str, Any] = response.json()
            return answer
    raise AssertionError(log.read_text())
