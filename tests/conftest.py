"""For every test: where the real data lie, and the same random numbers in every run and order."""

import os
import sys
from pathlib import Path

import pytest

_BESIDE = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Layers made without a generator draw from torch's own: a test that fails must fail again."""
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.manual_seed(0)


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder of the real data sets; the test is skipped where there is none."""
    named = os.environ.get("TEMPER_DATA")
    root = Path(named) if named else _BESIDE
    if not root.is_dir():
        pytest.skip(f"no real data: TEMPER_DATA is not set to a folder and {_BESIDE} does not exist")
    return root
