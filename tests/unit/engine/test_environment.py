import getpass
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

from pipeline.engine.environment import environment
from tests.fake_line.processes import ROOT


def test_it_names_commit_interpreter_machine_threads_and_versions() -> None:
    found = environment(["pydantic", "no-such-distribution"])
    assert found["commit"] == "none" or re.fullmatch(r"[0-9a-f]{40}\+?", found["commit"])
    assert found["python"] == f"CPython {sys.version.split()[0]}"
    assert found["version.no-such-distribution"] == "absent"
    assert re.match(r"\d", found["version.pydantic"])
    assert int(found["cores"]) >= 1
    assert all(found.values())


def test_it_holds_no_user_no_host_and_no_folder() -> None:
    text = " ".join(f"{key}={value}" for key, value in environment(["torch"]).items())
    assert str(Path.home()) not in text
    assert str(ROOT) not in text
    assert socket.gethostname() not in text
    assert re.search(rf"\b{re.escape(getpass.getuser())}\b", text) is None
    assert re.search(r"(^|[\s=])/\w", text) is None


def test_it_imports_no_library_that_it_reports_on() -> None:
    code = (
        "import sys; from pipeline.engine.environment import environment; environment(['torch', 'numpy']);"
        "print([m for m in ('torch', 'numpy', 'onnx') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_threads_are_those_asked_for() -> None:
    code = "from pipeline.engine.environment import environment; print(environment([])['threads'])"
    for threads in ("1", "3"):
        env = {**os.environ, "OMP_NUM_THREADS": threads}
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, env=env
        )
        assert done.stdout.strip() == threads
