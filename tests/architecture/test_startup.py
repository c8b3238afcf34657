"""The way to the help text loads nothing heavy."""

import subprocess
import sys

_HEAVY = ("torch", "pydantic", "rich", "numpy", "onnx", "onnxruntime", "argparse")


def _loaded(code: str) -> set[str]:
    """Top-level modules that a fresh interpreter holds after running `code`."""
    script = f"import sys\n{code}\nprint('\\n'.join(sorted(sys.modules)), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return {name.partition(".")[0] for name in done.stderr.split()}


def test_help_loads_nothing_heavy() -> None:
    loaded = _loaded("from pipeline.cli import main; main(['--help'])")
    assert loaded.isdisjoint(_HEAVY)


def test_command_help_loads_no_torch() -> None:
    for command in ("build", "ci", "plan", "report", "doctor", "clean", "list"):
        code = f"from pipeline.cli import main\ntry: main(['{command}', '--help'])\nexcept SystemExit: pass"
        assert _loaded(code).isdisjoint({"torch", "numpy", "onnx", "onnxruntime"}), command
