"""What is proved of a file: counted as it should be, refuted by an attack, and asked for by a limit."""

from pathlib import Path

import pytest
import torch

from pipeline.core.gate import Limit
from stages import export
from stages.bounds.base import Certifier
from stages.bounds.ibp import IBP
from stages.bounds.quantised import Quantised
from stages.certify_file import CERTIFIED, Certified, certify_file
from stages.nn.imported import imported
from stages.seeding import derive
from stages.shipped import Shipped, survivors
from stages.threat import Threat
from targets.runtime.ort import OrtEngine
from tests.trained import digits
from tests.unit.bounds.test_bounds_quantised import lowered

THREAT = Threat(norm="linf", eps=0.01)


def certified(path: Path, certifiers: tuple[Certifier, ...], alive: torch.Tensor | None = None) -> Certified:
    test = digits().test.select(torch.arange(40))
    twin = imported(path)
    shipped = Shipped(OrtEngine(path), twin)
    if alive is None:
        attacks = export.Config().attacks
        x = test.floats()
        _, alive, _ = survivors(shipped, attacks, x, test.labels, x, THREAT, derive(0, "t"))
    assert alive is not None
    steps: list[tuple[int, int]] = []
    found = certify_file(
        path.read_bytes(), twin, shipped, test, alive, THREAT, certifiers, lambda *step: steps.append(step)
    )
    assert steps[-1] == (40, 40)
    return found


def test_an_int8_file_is_proved_in_part_and_no_attack_breaks_that_part(tmp_path: Path) -> None:
    lowered(tmp_path, "cpu")
    found = certified(tmp_path / "cpu.onnx", (IBP(), Quantised()))
    assert found.findings == ()
    assert 10 < found.contract["proved"] == found.measurements[0].value * 40 <= 40
    assert found.contract["slack"] == 0
    assert list(found.contract["certifiers"]) == ["quantised"]
    assert "int8" in found.contract["covers"]
    assert any("ibp proves nothing about a file that rounds" in note for note in found.notes)
    assert sum(found.outcomes[CERTIFIED].hits()) == found.contract["proved"]


def test_a_float_file_is_proved_up_to_what_onnxruntime_was_seen_to_differ(tmp_path: Path) -> None:
    lowered(tmp_path, "cpu")
    found = certified(tmp_path / "plain.onnx", (Quantised(),))
    assert found.findings == ()
    assert 0 < found.contract["slack"] < 1e-3
    assert "measured, not proved" in found.contract["covers"]


def test_a_proof_that_an_attack_broke_refuses_the_file(tmp_path: Path) -> None:
    lowered(tmp_path, "cpu")
    found = certified(tmp_path / "cpu.onnx", (Quantised(),), torch.zeros(40, dtype=torch.bool))
    assert "images proved for the file were broken on it; must be none" in found.findings[0]


@pytest.mark.parametrize(
    ("table", "limits", "wanted"),
    [
        ({}, (Limit(metric=CERTIFIED, at_least=0.1),), {"certify": ["quantised"]}),
        ({"certify": ["ibp"]}, (Limit(metric=CERTIFIED, at_least=0.1),), {"certify": ["ibp"]}),
        ({}, (Limit(metric="size.model", at_most=1e6),), {}),
    ],
)
def test_a_limit_brings_its_certifier(table: dict[str, object], limits: tuple[Limit, ...], wanted: object) -> None:
    assert export.obeying(table, limits) == wanted
