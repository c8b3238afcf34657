"""The device runtime: Python 3.10 syntax, nothing of ours outside its folder, numpy and one inference runtime."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
FILES = sorted((ROOT / "targets" / "runtime").glob("*.py"))
HEAVY = ("pydantic", "onnx", "torch", "fastapi", "PIL", "tensorrt", "tensorrt_rtx", "pipeline.core", "rich")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_is_python_3_10(path: Path) -> None:
    ast.parse(path.read_text(), filename=str(path), feature_version=(3, 10))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_imports_nothing_of_ours_but_its_neighbours(path: Path) -> None:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "absolute imports only"
            names.add(node.module or "")
    ours = {name for name in names if name.split(".")[0] in ("pipeline", "stages", "targets", "tests")}
    assert all(name.startswith("targets.runtime") for name in ours), ours


@pytest.mark.parametrize("module", ["predictor", "verify", "finish", "serve"])
def test_opening_a_command_loads_nothing_heavy(module: str) -> None:
    program = f"import sys, targets.runtime.{module}; print([m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


def test_telemetry_is_off_before_onnxruntime_is_imported() -> None:
    program = (
        "import os, sys; os.environ.pop('ORT_DISABLE_TELEMETRY', None); os.environ.pop('CI', None)\n"
        "seen = []\n"
        "class Watch:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'onnxruntime': seen.append(os.environ.get('ORT_DISABLE_TELEMETRY'))\n"
        "sys.meta_path.insert(0, Watch())\n"
        "import targets.runtime.ort; print(seen)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "['1']"
