"""Opt-in: a base image and an ARM root take hundreds of megabytes, root, and Debian's tools."""

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def prepared() -> Callable[[str, tuple[str, ...]], Path]:
    """The cache folder of "image" or "aarch64", prepared by prepare.sh; skips, saying why, where it cannot be."""

    def prepare(what: str, tools: tuple[str, ...]) -> Path:
        if os.environ.get("TEMPER_DEVICE_TESTS") != "1":
            pytest.skip("opt-in: set TEMPER_DEVICE_TESTS=1 (prepares hundreds of megabytes, as root)")
        missing = [tool for tool in tools if shutil.which(tool) is None]
        if missing:
            pytest.skip(f"needs {', '.join(missing)}: apt-get install buildah debootstrap qemu-user-static")
        if os.geteuid() != 0:
            pytest.skip("needs root (debootstrap and chroot)")
        cache = Path(os.environ.get("TEMPER_DEVICE_CACHE", ROOT / "build" / "device"))
        done = subprocess.run(
            ["bash", str(ROOT / "tests" / "device" / "prepare.sh"), what, str(cache)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return cache.resolve() / what

    return prepare
