"""The gate's verdict before the end, on a real network: the same as in full, for less."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load as tensors_of

from pipeline.core.gate import Limit, judge
from pipeline.core.stage import Result
from stages import evidence, validate
from stages.method import InputError
from stages.remeasure import suspicious
from tests.trained import TASK, digits_model
from tests.unit.test_validate_stage import Watch, digests, run

ATTACKS: list[dict[str, Any]] = [
    {"kind": "apgd", "steps": 15},
    {"kind": "apgd", "steps": 10, "loss": "dlr", "targets": 4},
]
SETTINGS: dict[str, Any] = {
    "attacks": ATTACKS,
    "samples": 300,
    "validity_samples": 20,
    "curve": [0.5, 1.0],
    "images": 2,
}


def robust(result: Result) -> Any:
    return next(found for found in result.measurements if found.name == validate.ROBUST)


def passed(result: Result, bound: float) -> bool:
    return judge(result.measurements, (Limit(metric=validate.ROBUST, at_least=bound),), {}).passed


def gradients(result: Result) -> int:
    rows = evidence.read(result.files["evidence.jsonl"]).examples
    return sum(spent.gradients for row in rows for spent in row.spent.values())


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Result:
    folder = tmp_path_factory.mktemp("full")
    return run(folder, digits_model(recipe="at"), Watch(), sequence=True, **SETTINGS)


@pytest.mark.parametrize("away", [-0.25, -0.12, 0.12, 0.25])
def test_the_verdict_is_that_of_the_full_run_and_cheaper_far_from_the_bound(
    full: Result, tmp_path: Path, away: float
) -> None:
    bound = robust(full).low + away
    watch = Watch()
    early = run(tmp_path, digits_model(recipe="at"), watch, early=0.99, stop_at=bound, **SETTINGS)
    assert passed(early, bound) is passed(full, bound) is (away < 0)
    number = robust(early)
    assert number.low <= robust(full).value <= number.high
    assert number.under == "quick"
    assert number.samples < 300
    assert gradients(early) < (0.5 if abs(away) > 0.2 else 0.9) * gradients(full)
    rows = evidence.read(early.files["evidence.jsonl"]).examples
    left = [row.open for row in rows]
    assert sum(left) == 300 - number.samples > 0
    assert all(all(row.survived.values()) for row in rows if row.open)  # an image that was broken is not open
    assert tensors_of(early.files["adversarial.safetensors"].read_bytes())["open"].tolist() == left
    assert early.outcomes[validate.ROBUST].count == number.samples
    assert any(f"{sum(left)} of 300 images open" in note for note in watch.notes)
    assert set(validate.measures(validate.Config(early=0.99, stop_at=bound), TASK)) == {
        found.name for found in early.measurements
    }


def test_a_rerun_and_an_interrupted_one_give_the_same_bytes(full: Result, tmp_path: Path) -> None:
    settings = {**SETTINGS, "early": 0.99, "stop_at": robust(full).low - 0.25}
    first = run(tmp_path, digits_model(recipe="at"), Watch(), **settings)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, digits_model(recipe="at"), Watch(stop_at="attack until"), scratch="again", **settings)
    assert list((tmp_path / "again").glob("attack-*-0.safetensors"))
    again = run(tmp_path, digits_model(recipe="at"), Watch(), scratch="again", **settings)
    assert digests(again) == digests(first)
    assert again.measurements == first.measurements


def test_the_gates_own_limit_is_waited_for() -> None:
    limits = (Limit(metric=validate.ROBUST, at_least=0.4), Limit(metric=validate.ROBUST, at_least=0.55))
    table = {"early": 0.99}
    assert validate.obeying(table, limits) == {"early": 0.99, "stop_at": 0.55}
    assert validate.obeying({}, limits) == {}
    proofs = (Limit(metric=validate.CERTIFIED, at_least=0.5),)
    assert validate.obeying({}, proofs) == {"certify": validate.CASCADE, "certify_seconds": 300.0}
    assert validate.obeying({"certify": ["ibp"]}, proofs) == {"certify": ["ibp"]}
    assert validate.obeying({"certify_seconds": 9}, proofs)["certify_seconds"] == 9
    assert validate.obeying(table, (Limit(metric="accuracy.clean.test", at_least=0.9),)) == table
    assert validate.obeying(table, (*limits, Limit(metric=validate.ROBUST, max_loss=0.1))) == table
    assert validate.obeying({"early": 0.9, "stop_at": 0.2}, limits)["stop_at"] == 0.2


def test_without_a_limit_there_is_no_verdict_to_wait_for() -> None:
    with pytest.raises(InputError, match=r"expected a limit on accuracy\.robust\.test with at_least"):
        validate.measures(validate.Config(early=0.99), TASK)


def test_open_images_say_nothing_about_masking_in_the_file() -> None:
    """What the float network was not attacked on, and the file lost, must not outweigh what the file gained."""
    floats = torch.tensor([False] * 12 + [True] * 12)
    alive = ~floats
    judged = torch.arange(24) < 12
    assert suspicious(alive, floats, "int8") == ()
    assert suspicious(alive[judged], floats[judged], "int8") != ()
