"""What is proved of a file: counted as it should be, refuted by an attack, and asked for by a limit."""

from functools import cache
from pathlib import Path

import pytest
import torch

from pipeline.core.gate import Limit
from stages import export
from stages.bounds.base import Certifier
from stages.bounds.ibp import IBP
from stages.bounds.quantised import Quantised
from stages.certify_file import CERTIFIED, Certified, beside, certify_file
from stages.nn.imported import Twin, imported
from stages.seeding import derive
from stages.shipped import Shipped, survivors
from stages.threat import Threat
from targets.runtime.ort import OrtEngine
from tests.trained import digits
from tests.unit.bounds.test_bounds_quantised import lowered

THREAT = Threat(norm="linf", eps=0.01)


@pytest.fixture(scope="module", name="folder")
def _folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    lowered(folder, "cpu")
    return folder


@cache
def twin_of(path: Path) -> Twin:
    return imported(path)


@cache
def standing(path: Path) -> torch.Tensor:
    """What the quick attacks leave of the file."""
    test, shipped = digits().test.select(torch.arange(40)), Shipped(OrtEngine(path), twin_of(path))
    x = test.floats()
    return survivors(shipped, export.Config().attacks, x, test.labels, x, THREAT, derive(0, "t"))[1]


@cache
def certified(path: Path, certifiers: tuple[Certifier, ...], refuted: bool = False) -> Certified:
    test, shipped = digits().test.select(torch.arange(40)), Shipped(OrtEngine(path), twin_of(path))
    alive = torch.zeros(40, dtype=torch.bool) if refuted else standing(path)
    steps: list[tuple[int, int]] = []

    def step(done: int, total: int) -> None:
        steps.append((done, total))

    network, twin = path.read_bytes(), twin_of(path)
    found = certify_file(network, twin, shipped, test, alive, THREAT, certifiers, step, path.name)
    assert 10 < steps[-1][0] == steps[-1][1] <= 40  # images that a short attack refutes are not asked about
    return found


def test_an_int8_file_is_proved_in_part_and_no_attack_breaks_that_part(folder: Path) -> None:
    found = certified(folder / "cpu.onnx", (IBP(), Quantised()))
    assert found.findings == ()
    assert 10 < found.contract["proved"] == found.measurements[0].value * 40 <= 40
    assert found.contract["slack"] == 0
    assert list(found.contract["certifiers"]) == ["quantised"]
    assert "int8" in found.contract["covers"]
    assert any("ibp proves nothing about a file that rounds" in note for note in found.notes)
    assert sum(found.outcomes[CERTIFIED].hits()) == found.contract["proved"]


def test_certifiers_of_one_kind_all_have_their_turn_and_what_is_left_says_why(folder: Path) -> None:
    one, both = (certified(folder / "cpu.onnx", (*more, Quantised())) for more in ((), (Quantised(inner=IBP()),)))
    assert list(both.contract["certifiers"]) == ["quantised", "quantised_2"]
    assert both.contract["proved"] == one.contract["proved"]
    assert sum(both.contract["unproved"].values()) == 40 - both.contract["proved"]
    assert {*both.contract["unproved"]} <= {"broken", "loose"}
    (bar,) = both.shares
    assert bar["why"] == {"loose": bar["open"]}


def test_a_float_file_is_proved_up_to_what_onnxruntime_was_seen_to_differ(folder: Path) -> None:
    found = certified(folder / "plain.onnx", (Quantised(),))
    assert found.findings == ()
    assert 0 <= found.contract["slack"] < 1e-3  # 0 where this processor's kernels sum alike
    assert "measured, not proved" in found.contract["covers"]


def test_a_proof_that_an_attack_broke_refuses_the_file(folder: Path) -> None:
    found = certified(folder / "cpu.onnx", (Quantised(),), refuted=True)
    assert "images proved for cpu.onnx were broken on it; must be none" in found.findings[0]
    (bar,) = found.shares
    assert (bar["proved"], bar["open"], bar["broken"]) == (0, 0, 40)


def test_the_gap_is_counted_image_by_image(folder: Path) -> None:
    int8, plain = (certified(folder / name, (Quantised(),)) for name in ("cpu.onnx", "plain.onnx"))
    both = beside(int8, plain)
    before, after = (one.outcomes[CERTIFIED].hits() for one in (plain, int8))
    told = both.contract["gap"]
    assert told["lost"] == sum(a and not b for a, b in zip(before, after, strict=True)) > 0
    assert told["share"] == both.measurements[-1].value == (sum(before) - sum(after)) / 40
    assert both.contract["float"]["sha256"] != both.contract["sha256"]
    assert both.contract["float"]["file"] == "plain.onnx"
    assert [bar["of"] for bar in both.shares] == ["plain.onnx", "cpu.onnx"]
    assert all(bar["proved"] + bar["open"] + bar["broken"] == bar["images"] == 40 for bar in both.shares)  # type: ignore[operator]


@pytest.mark.parametrize(
    ("table", "limits", "wanted"),
    [
        ({}, (Limit(metric=CERTIFIED, at_least=0.1),), {"certify": export.CASCADE, "certify_seconds": 300.0}),
        ({"certify": ["ibp"]}, (Limit(metric=CERTIFIED, at_least=0.1),), {"certify": ["ibp"]}),
        ({}, (Limit(metric="size.model", at_most=1e6),), {}),
    ],
)
def test_a_limit_brings_its_certifier(table: dict[str, object], limits: tuple[Limit, ...], wanted: object) -> None:
    assert export.obeying(table, limits) == wanted
