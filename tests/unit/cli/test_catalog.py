"""`list`: every method there is, one line each, nothing imported."""

import subprocess
import sys

import pytest

from pipeline.cli import main
from pipeline.core.spec import presets
from stages.catalog import _METHODS, KINDS, entries
from stages.method import names


@pytest.mark.parametrize("kind", [k for k in KINDS if k not in ("targets", "presets")])
def test_lists_what_the_folder_registry_finds(kind: str) -> None:
    assert sorted(name for name, _ in entries(kind)) == list(names(_METHODS[kind].replace("/", ".")))


def test_lists_presets_and_targets() -> None:
    assert sorted(name for name, _ in entries("presets")) == list(presets())
    assert {"reference", "x86_cpu", "jetson"} <= {name for name, _ in entries("targets")}


@pytest.mark.parametrize("kind", KINDS)
def test_every_entry_says_what_it_is_on_one_line(kind: str) -> None:
    for name, line in entries(kind):
        assert 5 < len(line) <= 120, name
        assert "\n" not in line


def test_one_kind_can_be_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "data"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "data:"
    assert any(line.split()[:2] == ["digits", "1,797"] for line in out)
    assert main(["list", "detectors"]) == 0
    assert "feature_squeezing  Flags inputs whose answer changes when they are squeezed" in capsys.readouterr().out


def test_an_unknown_kind_gets_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "atacks"]) == 2
    assert 'unknown kind "atacks"; did you mean "attacks"' in capsys.readouterr().err


def test_listing_imports_no_heavy_library() -> None:
    code = (
        "import sys; from pipeline.cli import main; main(['list']); "
        "sys.exit(bool({'torch', 'numpy', 'pydantic', 'onnx'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
