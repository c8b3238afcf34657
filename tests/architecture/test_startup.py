"""The way to the help text loads nothing heavy."""

import subprocess
import sys

import pytest

from pipeline.cli import COMMANDS

_HEAVY = ("torch", "pydantic", "rich", "numpy", "onnx", "onnxruntime", "argparse")


def _loaded(code: str) -> set[str]:
    """Top-level modules that a fresh interpreter holds after running `code`."""
    script = f"import sys\n{code}\nprint('\\n'.join(sorted(sys.modules)), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return {name.partition(".")[0] for name in done.stderr.split()}


def test_help_loads_nothing_heavy() -> None:
    loaded = _loaded("from pipeline.cli import main; main(['--help'])")
    assert loaded.isdisjoint(_HEAVY)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_a_command_loads_nothing_heavy(command: str) -> None:
    code = f"from pipeline.cli import main\ntry: main(['{command}', '--help'])\nexcept SystemExit: pass"
    heavy = {*_HEAVY, "PIL", "fastapi", "uvicorn", "jinja2"} - {"argparse"}
    assert _loaded(code).isdisjoint(heavy)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_mistake_on_the_command_line_loads_nothing_heavy(command: str) -> None:
    code = f"from pipeline.cli import main\ntry: main(['{command}', '--no-such-option'])\nexcept SystemExit: pass"
    assert _loaded(code).isdisjoint({"torch", "numpy", "onnx", "onnxruntime", "pydantic"})
