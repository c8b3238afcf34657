"""The bundle computes the same on 64-bit ARM (emulated) as here: int8 to the last bit, float32 to rounding."""

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from targets.lowering.apply import apply, passes_for
from targets.passes.base import Kit
from targets.raspberry_pi import TARGET
from targets.runtime.predictor import open_bundle
from tests.graphs import images, make_bundle, tiny

pytestmark = [pytest.mark.aarch64, pytest.mark.timeout(1800)]
ROOT = Path(__file__).parents[2]
PRECISIONS = TARGET.sections["export"]["precisions"]
RUN = """
import platform, sys
import numpy as np
from targets.runtime.predictor import open_bundle
assert platform.machine() == "aarch64", platform.machine()
bundle, images, logits = sys.argv[1:]
np.save(logits, open_bundle(bundle)(np.load(images)))
"""
ORT = """
import sys
import numpy as np
from pathlib import Path
from targets.runtime.ort import OrtEngine
np.save(sys.argv[3], OrtEngine(Path(sys.argv[1]))(np.load(sys.argv[2])))
"""


@pytest.fixture(scope="module")
def emulated(
    prepared: Callable[[str, tuple[str, ...]], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., str]:
    """Run Python under emulation, with the device runtime alone on its path; gives its standard output."""
    root = prepared("aarch64", ("qemu-aarch64-static", "debootstrap")) / "root"
    closure = tmp_path_factory.mktemp("closure")
    (closure / "targets").mkdir()
    shutil.copy(ROOT / "targets" / "__init__.py", closure / "targets")
    shutil.copytree(ROOT / "targets" / "runtime", closure / "targets" / "runtime")

    def run(*arguments: str | Path) -> str:
        interpreter = ["qemu-aarch64-static", "-L", str(root), str(root / "usr" / "bin" / "python3.11")]
        env = {"PATH": os.environ["PATH"], "PYTHONPATH": str(closure), "PYTHONDONTWRITEBYTECODE": "1"}
        done = subprocess.run(
            [*interpreter, *map(str, arguments)], capture_output=True, text=True, env=env, timeout=900, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    return run


@pytest.fixture(scope="module", params=["fp32", "int8", "int8_kept"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    lowered = apply(tiny(), passes_for(PRECISIONS, request.param), Kit(images(64), folder))
    name = "model.onnx" if request.param == "fp32" else "model.int8.onnx"
    extra = {"model.ort": lowered.extras[".ort"]}
    return make_bundle(folder / "bundle", lowered.model, extra=extra, model=name, precision=request.param)


def close_enough(here: npt.NDArray[np.float32], there: npt.NDArray[np.float32], precision: str) -> None:
    if precision == "int8":
        np.testing.assert_array_equal(there, here)
    else:
        np.testing.assert_allclose(there, here, atol=1e-5 * float(np.abs(here).max()))


def test_a_bundle_predicts_the_same_on_arm(bundle: Path, emulated: Callable[..., str], tmp_path: Path) -> None:
    x, here = images(64, seed=11), open_bundle(bundle)
    np.save(tmp_path / "x.npy", x)
    emulated("-c", RUN, bundle, tmp_path / "x.npy", tmp_path / "logits.npy")
    close_enough(here(x), np.load(tmp_path / "logits.npy"), here.bundle.precision)


def test_the_ort_file_predicts_the_same_on_arm(bundle: Path, emulated: Callable[..., str], tmp_path: Path) -> None:
    x, here = images(16, seed=12), open_bundle(bundle)
    np.save(tmp_path / "x.npy", x)
    emulated("-c", ORT, bundle / "model.ort", tmp_path / "x.npy", tmp_path / "logits.npy")
    # Fused another way than the ONNX is on this processor, so equal to rounding and not to the bit.
    np.testing.assert_allclose(np.load(tmp_path / "logits.npy"), here(x), atol=1e-4)


def test_the_bundles_own_script_runs_on_arm(bundle: Path, emulated: Callable[..., str], tmp_path: Path) -> None:
    x, here = images(3, seed=13), open_bundle(bundle)
    np.save(tmp_path / "x.npy", x)
    shown = emulated(bundle / "predict.py", tmp_path / "x.npy").splitlines()
    labels, _ = here.predict(x)
    assert [line.split()[0] for line in shown] == [here.bundle.labels[i] for i in labels]
