"""`verify-spec` on the real command line: one word, a witness that holds, and clear refusals."""

import gzip
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NoReturn

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from pipeline.cli import main
from stages.bounds.base import Contradiction
from stages.verification import prove
from tests.specs import any_of, layers, mlp, saved, spec

NET = layers([3, 4, 2], 1)
LOW, HIGH = [-0.5, 0.25, -2.0], [0.5, 0.75, -1.0]
SAT = any_of([[([1.0, 0.0], -50.0)], [([1.0, -1.0], 40.0), ([0.0, 1.0], 50.0)]])
UNSAT = any_of([[([1.0, 0.0], -50.0)], [([1.0, -1.0], -40.0), ([0.0, 1.0], -30.0)]])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As ACAS Xu's networks are: an odd rank, and a normalisation in front."""
    front: list[tuple[str, dict[str, object], object]] = [
        ("Sub", {}, np.full((1, 1, 1), 0.1, np.float32)),
        ("Div", {}, np.float32(0.5)),
    ]
    return mlp(tmp_path_factory.mktemp("net") / "net.onnx", NET, (1, 1, 1, 3), front)


def written(folder: Path, unsafe: str, name: str = "spec.vnnlib") -> Path:
    path = folder / name
    text = spec(LOW, HIGH, 2, unsafe).encode()
    path.write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    return path


def verify(*argv: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pipeline", "verify-spec", *map(str, argv)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_witness_is_written_and_holds(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "witness.txt"
    done = verify(model, written(tmp_path, SAT), "--timeout", "240", "--witness", out)
    assert (done.returncode, done.stdout) == (0, "sat\n"), done.stderr
    found = re.findall(r"\(([XY])_(\d+) ([^)]+)\)", out.read_text())
    assert [name + number for name, number, _ in found] == ["X0", "X1", "X2", "Y0", "Y1"]
    x = np.array([float(value) for name, _, value in found if name == "X"])
    y = np.array([float(value) for name, _, value in found if name == "Y"])
    assert (np.array(LOW) <= x).all()
    assert (x <= np.array(HIGH)).all()
    assert (x == x.astype(np.float32)).all()
    session = onnxruntime.InferenceSession(model)
    [answer] = session.run(None, {"input": x.astype(np.float32).reshape(1, 1, 1, 3)})
    assert (answer.reshape(-1) == y).all()
    assert y[0] <= -50 or (y[0] - y[1] <= 40 and y[1] <= 50)


def test_gzipped_files_and_a_proof(model: Path, tmp_path: Path) -> None:
    packed = tmp_path / "net.onnx.gz"
    with model.open("rb") as source, gzip.open(packed, "wb") as sink:
        shutil.copyfileobj(source, sink)
    done = verify(packed, written(tmp_path, UNSAT, "spec.vnnlib.gz"), "--timeout", "240")
    assert (done.returncode, done.stdout) == (0, "unsat\n"), done.stderr
    assert "2 cases" in done.stderr


def test_functions_of_the_file_are_read(model: Path, tmp_path: Path) -> None:
    """In a process of its own, where nobody else has loaded what it takes."""
    file = onnx.load(model)
    ends = ([file.graph.input[0].name], [file.graph.output[0].name])
    held = [helper.make_node("Constant", [], [t.name], value=t) for t in file.graph.initializer]
    opsets = list(file.opset_import)
    file.functions.append(helper.make_function("own", "Net", *ends, [*held, *file.graph.node], opsets))
    del file.graph.node[:], file.graph.initializer[:]
    file.graph.node.append(helper.make_node("Net", *ends, domain="own"))
    file.opset_import.append(helper.make_opsetid("own", 1))
    onnx.save(file, tmp_path / "net.onnx")
    done = verify(tmp_path / "net.onnx", written(tmp_path, UNSAT), "--timeout", "240")
    assert (done.returncode, done.stdout) == (0, "unsat\n"), done.stderr


def test_a_contradiction_is_safe_and_its_cause_is_told(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path, "(assert (<= Y_0 1))(assert (or (and (>= X_0 1) (<= Y_1 1)) (and (< X_2 -2) (<= Y_1 1))))")
    assert main(["verify-spec", str(model), str(path), "--timeout", "240"]) == 0
    said = capsys.readouterr()
    assert said.out == "unsat\n"
    assert "the constraints contradict each other" in said.err


def test_a_bound_that_a_point_refutes_is_told_loudly_and_proves_nothing(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong(*_: object) -> NoReturn:
        raise Contradiction("a row is proved and refuted")

    monkeypatch.setattr(prove, "on_regions", wrong)
    assert main(["verify-spec", str(model), str(written(tmp_path, UNSAT)), "--timeout", "1.5"]) == 0
    said = capsys.readouterr()
    assert said.out == "unknown\n"
    assert "A BOUND IS WRONG, so nothing counts as proved: a row is proved and refuted" in said.err
    assert "please report it" in said.err
    assert "0 of 2 cases are refuted" in said.err


def test_time_that_does_not_suffice_is_kept(model: Path, tmp_path: Path) -> None:
    """Nothing at all can be known in this time, not even whether the files are good."""
    start = time.monotonic()
    done = verify(model, written(tmp_path, UNSAT), "--timeout", "0.2")
    assert (done.returncode, done.stdout) == (0, "unknown\n"), done.stderr
    assert time.monotonic() - start < 30  # an order of magnitude, for a machine under load


@pytest.mark.parametrize(
    ("timeout", "message"),
    [
        ("0", "expected a number of seconds above 0"),
        ("-1", "above 0"),
        ("nan", "above 0"),
        ("inf", "above 0"),
        ("x", "invalid float"),
    ],
)
def test_bad_timeouts(
    model: Path, tmp_path: Path, timeout: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    refused(["verify-spec", str(model), str(written(tmp_path, SAT)), f"--timeout={timeout}"], message, capsys)


@pytest.mark.parametrize(
    ("unsafe", "message"),
    [
        ("(assert (<= (* Y_0 Y_1) 1))", "spec.vnnlib, line 12: (* Y_0 Y_1): a product of variables"),
        ("(assert (<= Y_2 1))", 'unknown variable "Y_2"'),
        ("(declare-const Y_2 Real)(assert (<= Y_2 1))", "names 3 outputs Y_0 to Y_2, the network has 2"),
        (
            "(declare-const X_3 Real)(assert (= X_3 1))(assert (<= Y_0 1))",
            "the specification names 4 inputs X_0 to X_3",
        ),
        ("(assert (>= X_0 1))(assert (<= Y_0 1))", "the box is inverted: input X_0"),
        ("(declare-const X_3 Real)(assert (<= Y_0 1))", "input X_3 has no lower bound"),
    ],
)
def test_bad_specifications(
    model: Path, tmp_path: Path, unsafe: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    refused(["verify-spec", str(model), str(written(tmp_path, unsafe)), "--timeout", "30"], message, capsys)


def test_bad_models(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = str(written(tmp_path, SAT))
    (tmp_path / "text.onnx").write_text("no network")
    (tmp_path / "broken.onnx.gz").write_bytes(gzip.compress(model.read_bytes())[:-20])
    odd = [helper.make_node("Det", ["input"], ["y"], "odd")]
    saved(tmp_path / "det.onnx", odd, (1, 3, 3), "y", (1,), {})
    double = [helper.make_node("Flatten", ["input"], ["y"], "flat")]
    saved(tmp_path / "double.onnx", double, (1, 3), "y", (1, 3), {}, TensorProto.DOUBLE)
    saved(tmp_path / "batch.onnx", double, (2, 3), "y", (2, 3), {})
    bare = onnx.load(saved(tmp_path / "bare.onnx", double, (1, 3), "y", (1, 3), {}))
    del bare.graph.output[:]
    onnx.save(bare, tmp_path / "bare.onnx")
    nine = tmp_path / "nine.vnnlib"
    nine.write_text(spec([0.0] * 9, [1.0] * 9, 1, "(assert (<= Y_0 0))"))
    for name, chosen, message in (
        ("missing.onnx", good, "missing.onnx: there is no such file"),
        ("text.onnx", good, "onnxruntime cannot load the model"),
        ("broken.onnx.gz", good, "broken.onnx.gz: cannot be read"),
        ("det.onnx", str(nine), 'node "odd": operator Det has no torch twin'),
        ("double.onnx", good, 'input "input" is a tensor(double); expected tensor(float)'),
        ("bare.onnx", good, "bare.onnx: expected a network, the graph has no outputs"),
        (".", good, "expected a file, this is a folder"),
        ("batch.onnx", good, "has shape [2, 3], the specification names 3 inputs X_0 to X_2"),
    ):
        refused(["verify-spec", str(tmp_path / name), chosen, "--timeout", "30"], message, capsys)
    for witness, message in (("no/w", "is not there"), (".", "expected a file to write, this is a folder")):
        out = str(tmp_path / witness)
        refused(["verify-spec", str(model), good, "--timeout", "3", "--witness", out], message, capsys)


def refused(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    try:
        status = main(argv)
    except SystemExit as end:
        status = int(str(end.code))
    said = capsys.readouterr()
    assert (status, said.out) == (2, ""), said
    assert message in said.err
    assert "Traceback" not in said.err
