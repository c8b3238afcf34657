"""Bundles of the real line predict the same on 64-bit ARM (emulated) as here: int8 to the last bit."""

import os
import shutil
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from targets.runtime.predictor import Predictor, open_bundle

Array = npt.NDArray[np.float32]

pytestmark = [pytest.mark.aarch64, pytest.mark.timeout(600)]
ROOT = Path(__file__).parents[2]
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


@pytest.fixture(params=[("reference", "fp32"), ("x86_cpu", "int8"), ("raspberry_pi", "int8")], ids=lambda pair: pair[0])
def here(request: pytest.FixtureRequest, bundles: Mapping[str, Path]) -> Predictor:
    """Each target's bundle, open on this processor, in the precision that it was to have."""
    target, precision = request.param
    predictor = open_bundle(bundles[target])
    assert predictor.bundle.precision == precision
    return predictor


def test_a_bundle_predicts_the_same_on_arm(
    here: Predictor, digits: Array, emulated: Callable[..., str], tmp_path: Path
) -> None:
    np.save(tmp_path / "x.npy", digits)
    emulated("-c", RUN, here.bundle.folder, tmp_path / "x.npy", tmp_path / "logits.npy")
    expected, found = here(digits), np.load(tmp_path / "logits.npy")
    assert len(np.unique(expected.argmax(1))) == 10  # a network that had learnt nothing would agree with anything
    if here.bundle.precision == "int8":
        np.testing.assert_array_equal(found, expected)
    else:
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * float(np.abs(expected).max()))
        np.testing.assert_array_equal(found.argmax(1), expected.argmax(1))


def test_the_ort_file_predicts_the_same_on_arm(
    bundles: Mapping[str, Path], digits: Array, emulated: Callable[..., str], tmp_path: Path
) -> None:
    here = open_bundle(bundles["raspberry_pi"])
    np.save(tmp_path / "x.npy", digits)
    (file,) = here.bundle.folder.glob("*.ort")
    emulated("-c", ORT, file, tmp_path / "x.npy", tmp_path / "logits.npy")
    expected, found = here(digits), np.load(tmp_path / "logits.npy")
    # Fused another way than the ONNX is on this processor, so equal to rounding and not to the bit.
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    np.testing.assert_array_equal(found.argmax(1), expected.argmax(1))


def test_the_bundles_own_script_runs_on_arm(
    here: Predictor, digits: Array, emulated: Callable[..., str], tmp_path: Path
) -> None:
    np.save(tmp_path / "x.npy", digits[:8])
    shown = emulated(here.bundle.folder / "predict.py", tmp_path / "x.npy").splitlines()
    labels, _ = here.predict(digits[:8])
    assert [line.split(" margin ")[0] for line in shown] == [here.bundle.labels[i] for i in labels]
