"""`doctor`: what it reads off this machine is checked against the machine; what it warns of is planted."""

import os
import platform
import sys
from importlib import metadata
from pathlib import Path

import pytest

from pipeline.cli import _installed, _probes, doctor, main


@pytest.fixture(scope="module")
def findings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, doctor.Finding]:
    return {finding.name: finding for finding in doctor.examine(tmp_path_factory.mktemp("data"))}


def test_it_tells_what_is_there(findings: dict[str, doctor.Finding]) -> None:
    assert platform.python_version() in findings["python"].text
    assert findings["cores"].text == str(len(os.sched_getaffinity(0)))
    assert f"torch {metadata.version('torch')}" in findings["build"].text
    assert findings["base"].state == "ok"


def test_runtimes_are_asked_and_not_believed(findings: dict[str, doctor.Finding]) -> None:
    assert "CPU" in findings["onnxruntime"].text
    assert "Azure" not in findings["onnxruntime"].text


def test_what_is_missing_comes_with_a_way_to_get_it(findings: dict[str, doctor.Finding]) -> None:
    missing = [finding for finding in findings.values() if finding.state == "missing"]
    assert missing
    assert all(finding.remedy for finding in missing)


def test_data_sets_are_found_where_they_lie(findings: dict[str, doctor.Finding]) -> None:
    assert findings["digits"].state == "ok"
    assert findings["folder"].text.startswith("your own data")
    assert findings["mnist"].state == "missing"
    assert findings["place"].text.endswith("(from --data-root)")


def test_it_imports_nothing_heavy_itself() -> None:
    code = (
        "import json, sys, pipeline.cli.doctor\n"
        "print(json.dumps([m for m in ('torch', 'numpy', 'pydantic', 'rich', 'onnxruntime') if m in sys.modules]))"
    )
    assert _probes.ask(code) == ([], "")


def test_it_prints_a_page_and_exits_0(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["doctor", "--data-root", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert text.startswith("Temper ")
    assert "runtimes, and what they would really use" in text
    assert max(len(line) for line in text.splitlines() if str(tmp_path) not in line) <= 120


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("import os; os.kill(os.getpid(), 11)", "killed by signal 11"),
        ("raise RuntimeError('no such thing')", "RuntimeError: no such thing"),
        ("print('hello')", "could not be read"),
        ("pass", "could not be read"),
    ],
)
def test_a_probe_that_breaks_costs_only_its_answer(code: str, why: str) -> None:
    answer, text = _probes.ask(code)
    assert answer is None
    assert why in text


def test_a_probe_that_hangs_is_ended() -> None:
    assert _probes.ask("import time; time.sleep(60)", timeout=0.2) == (None, "no answer within 0 s")


def test_telemetry_is_off_before_a_runtime_is_imported() -> None:
    assert _probes.ask("import json, os; print(json.dumps(os.environ['ORT_DISABLE_TELEMETRY']))") == ("1", "")


def test_no_driver_means_no_tensorrt_runtime() -> None:
    module = "import sys, types; trt = types.ModuleType('fake'); trt.__version__ = '1'; sys.modules['fake'] = trt\n"
    assert _probes.ask(module + _probes.TENSORRT, "fake", "none") == (["1", False], "")
    assert _probes.ask(module + _probes.TENSORRT, "fake", "yes")[0] is None  # it did reach for the runtime


def test_a_cuda_torch_without_a_gpu_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_installed, "cuda_build", lambda: "13.0")
    (finding,) = doctor._torch(driver=False)
    assert finding.state == "warning"
    assert "gigabytes for nothing" in finding.text
    monkeypatch.setattr(_installed, "cuda_build", lambda: "")
    assert [f.state for f in doctor._torch(driver=False)] == ["ok"]
    assert [f.state for f in doctor._torch(driver=True)] == ["warning"]


def test_the_build_of_torch_is_read_off_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise AssertionError('imported')")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.setattr(sys, "path_importer_cache", {})
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    for text, build in (("cuda: Optional[str] = '13.0'\n", "13.0"), ("cuda: Optional[str] = None\n", "")):
        (tmp_path / "torch" / "version.py").write_text(text)
        assert _installed.cuda_build() == build


def test_a_package_that_bears_one_of_our_names_is_found(tmp_path: Path) -> None:
    (tmp_path / "stages").mkdir()
    (tmp_path / "stages" / "__init__.py").touch()
    (tmp_path / "targets.py").touch()
    (tmp_path / "pipeline").mkdir()  # a folder without code shadows nothing
    place = tmp_path.resolve()
    assert _installed.shadows([str(tmp_path), str(_probes.ROOT)]) == [
        ("stages", place / "stages"),
        ("targets", place / "targets.py"),
    ]
    assert _installed.shadows([str(_probes.ROOT)]) == []


@pytest.mark.parametrize(
    ("found", "clause", "holds"),
    [
        ("2.13.0+cpu", ">=2.6,<2.14", True),
        ("2.14", ">=2.6,<2.14", False),
        ("1.20", ">=1.20", True),
        ("1.9", ">=1.20", False),
        ("2.0", "==2.0.0", True),
        ("3", "", True),
    ],
)
def test_versions_are_compared_as_numbers(found: str, clause: str, holds: bool) -> None:
    assert _installed.fits(found, clause) is holds


def test_extras_are_those_of_the_project() -> None:
    table = _installed.extras()
    assert ("numpy", ">=1.26") in table["base"]
    assert {"cpu", "gpu", "rtx", "serve", "build", "test"} <= table.keys()
    assert ("tensorrt-rtx", ">=1.7,<2") in table["rtx"]


def test_the_identity_model_is_one() -> None:
    answer, why = _probes.ask(_probes.ONNXRUNTIME, "none")
    assert why == ""
    assert "CPU" in answer


def test_an_onnxruntime_that_runs_nothing_says_why() -> None:
    assert _probes._IDENTITY in _probes.ONNXRUNTIME
    answer, why = _probes.ask(_probes.ONNXRUNTIME.replace(_probes._IDENTITY, "AAAA"), "none")
    assert answer is None
    assert why.startswith("CPUExecutionProvider: [ONNXRuntimeError]")
