"""One small build of the real line, made once for all workers of a test run; `audit` in a folder of its own."""

import fcntl
from pathlib import Path

import pytest

from pipeline.cli import main
from tests.audited import Audit
from tests.real_line import SPEC, build


@pytest.fixture(scope="session")
def spec(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("spec") / "small.toml"
    path.write_text(SPEC)
    return path


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory, worker_id: str, spec: Path) -> Path:
    """The runs folder with `small-x86_cpu` built. Tests share its store and give their own builds other names."""
    base = tmp_path_factory.getbasetemp()
    place = (base if worker_id == "master" else base.parent) / "small-line"
    place.mkdir(exist_ok=True)
    with (place / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the first worker builds, the others find it built
        if not (place / "built").exists():
            done = build(spec, place / "runs")
            assert done.returncode == 0, done.stdout + done.stderr
            (place / "built").touch()
    return place / "runs"


@pytest.fixture
def audit(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Audit:
    """Run `audit` in a folder of its own; status, standard output, standard error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TEMPER_DATA", raising=False)

    def run(*argv: object) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            status = main(["audit", *map(str, argv)])
        except SystemExit as end:
            status = int(str(end.code))
        said = capsys.readouterr()
        assert "Traceback" not in said.err
        return status, said.out, said.err

    return run
