"""Opt-in: an ARM root and a base image take hundreds of megabytes, root, and Debian's tools. run.sh runs them."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from stages.task import Task

ROOT = Path(__file__).parents[2]

# As quick as a build gets that still learns the digits.
SPEC = """
name = "device"

[task]
data = "digits"
threat = { norm = "linf", eps = "0.1" }

[stages.search]
kind = "fixed"
arch = { builder = "small_cnn", width = 16, hidden = 32 }

[stages.train]
kind = "natural"
epochs = 8
batch = 64
holdout_attack = { kind = "pgd", steps = 2 }

[stages.compress]
kind = "fixed"

[stages.validate]
samples = 32
validity_samples = 20
curve = [0.5, 1.0]
attacks = [{ kind = "pgd", steps = 5 }]
images = 1

[stages.export]
attacks = [{ kind = "pgd", steps = 2 }]
calibration = 64
runs = 20
"""
TARGETS = ("reference", "x86_cpu", "raspberry_pi")


@pytest.fixture(scope="session")
def prepared() -> Callable[[str, tuple[str, ...]], Path]:
    """The folder of "image" or "aarch64", made by prepare.sh; skips, saying why, where it cannot be."""

    def prepare(what: str, tools: tuple[str, ...]) -> Path:
        if os.environ.get("TEMPER_DEVICE_TESTS") != "1":
            pytest.skip("opt-in: set TEMPER_DEVICE_TESTS=1 (prepares hundreds of megabytes, as root)")
        missing = [tool for tool in tools if shutil.which(tool) is None]
        if missing:
            pytest.skip(f"needs {', '.join(missing)}: apt-get install buildah debootstrap qemu-user-static")
        if os.geteuid() != 0:
            pytest.skip("needs root (chroot and another user's files)")
        done = subprocess.run(
            ["bash", str(ROOT / "tests" / "device" / "prepare.sh"), what],
            env={**os.environ, "PYTHON": sys.executable},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return Path(done.stdout.splitlines()[-1])

    return prepare


@pytest.fixture(scope="session")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """Target -> the bundle that the command line built on the real digits; one training for all of them."""
    if os.environ.get("TEMPER_DEVICE_TESTS") != "1":
        pytest.skip("opt-in: set TEMPER_DEVICE_TESTS=1")
    home = tmp_path_factory.mktemp("line")
    (home / "spec.toml").write_text(SPEC)
    for target in TARGETS:
        words = ["build", str(home / "spec.toml"), "--target", target, "--runs", str(home / "runs"), "--quiet"]
        done = subprocess.run(
            [sys.executable, "-m", "pipeline", *words], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
    return {target: home / "runs" / f"device-{target}" / "bundle" for target in TARGETS}


@pytest.fixture(scope="session")
def digits() -> npt.NDArray[np.float32]:
    """128 test images, and the same with noise of the threat's size, which lies between the steps of 8-bit pixels."""
    task = Task.load({"data": {"kind": "digits"}, "threat": {"norm": "linf", "eps": 0.1}})
    clean = task.open(Path()).test.images[:128].numpy().astype(np.float32) / 255
    noise = np.random.default_rng(0).uniform(-0.1, 0.1, clean.shape).astype(np.float32)
    return np.concatenate([clean, (clean + noise).clip(0, 1)])
