"""What the Dockerfile copies is there and suffices; that the images build is for `tests/device`."""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")

# Only what is copied may be imported of ours, and of others only what the stage `wheels` installs.
ALONE = """
import runpy, sys
from pathlib import Path
app, root = sys.argv[1:3]
class Shut:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "torchvision", "onnx", "rich", "jinja2",
                                      "safetensors", "torch_pruning", "onnxscript", "hypothesis", "stages"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path = [Shut(), *(f for f in sys.meta_path if "editable" not in repr(f))]
sys.path = [app, *(p for p in sys.path if p and Path(p).resolve() != Path(root))]
sys.argv = ["pipeline", *sys.argv[3:]]
"""


def stage(name: str) -> list[str]:
    """The lines of a build stage."""
    parts = re.split(r"^FROM \S+ AS (\w+)$", TEXT, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))[name].strip().splitlines()


def copies(name: str) -> list[tuple[list[str], str]]:
    """Sources, and where they go, of a stage's own COPY lines."""
    words = [line.split()[1:] for line in stage(name) if line.startswith("COPY ")]
    return [(line[:-1], line[-1]) for line in words if not line[0].startswith("--from")]


@pytest.mark.parametrize("name", ["build", "ci", "wheels", "serve"])
def test_what_is_copied_is_there(name: str) -> None:
    sources = [source for line, _ in copies(name) for source in line]
    assert sources
    assert [source for source in sources if not (ROOT / source).exists()] == []


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The serving image's /app."""
    folder = tmp_path_factory.mktemp("app")
    for sources, to in copies("serve"):
        for source in sources:
            whole, place = ROOT / source, folder / to
            if whole.is_dir():
                shutil.copytree(whole, place, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                place.mkdir(parents=True, exist_ok=True)
                shutil.copy(whole, place)
    return folder


def alone(app: Path, code: str, *argv: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-I", "-B", "-c", ALONE + code, str(app), str(ROOT), *argv],
        cwd=app,
        capture_output=True,
        text=True,
        check=False,
    )


MAIN = "runpy.run_module('pipeline', run_name='__main__', alter_sys=True)"


@pytest.mark.parametrize("command", ["serve", "verify", "finish"])
def test_the_serving_image_holds_what_its_commands_need(app: Path, command: str) -> None:
    told = alone(app, MAIN, command, "--help")
    assert (told.returncode, told.stderr) == (0, "")
    assert told.stdout.startswith(f"usage: python -m pipeline {command}")
    none = alone(app, MAIN, command, "nowhere")
    assert (none.returncode, none.stdout) == (2, "")
    assert none.stderr.startswith("temper: nowhere")
    assert none.stderr.count("\n") == 1
    wrong = alone(app, MAIN, command, "nowhere", "--threads", "0")
    assert wrong.returncode == 2
    assert "expected a whole number of at least 1" in wrong.stderr


def test_every_module_of_the_runtime_can_be_imported_there(app: Path) -> None:
    names = [f"targets.runtime.{path.stem}" for path in (app / "targets" / "runtime").glob("*.py")]
    assert len(names) > 10
    code = f"import importlib\nfor name in {names!r}: print(importlib.import_module(name).__file__)"
    done = alone(app, code)
    assert done.returncode == 0, done.stderr
    assert all(Path(line).is_relative_to(app) for line in done.stdout.split())


def test_the_serving_image_installs_the_extras_of_a_server() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [
        *extras["dependencies"],
        *extras["optional-dependencies"]["cpu"],
        *extras["optional-dependencies"]["serve"],
    ]
    install = next(line for line in stage("wheels") if "pip install" in line)
    assert {re.split(r"[<>=;]", text)[0] for text in wanted} == set(install.split("constraints.txt ")[1].split())
