"""A real build, killed at random moments, ends with the bytes of one that nobody disturbed."""

import shutil
import sys
from pathlib import Path

from benchmarks.killed import die, digests, finished, moments, record

SEED = 5


def test_killed_at_random_moments_a_build_ends_with_the_same_bytes(runs: Path, spec: Path, tmp_path: Path) -> None:
    command = (
        *(sys.executable, "-m", "pipeline", "build", str(spec), "--target", "x86_cpu"),
        *("--threads", "1", "--quiet"),
    )
    calm, place = runs / "small-x86_cpu", tmp_path / "runs"
    deaths = [die(command, place, moment) for moment in moments(record(calm), 3, SEED)]
    assert any(death.killed for death in deaths)
    assert finished(command, place) == 0
    expected, found = digests(calm), digests(place / "small-x86_cpu")
    assert found == expected
    named = {"train/weights.safetensors", "export/bundle/model.int8.onnx", "validate/evidence.jsonl"}
    assert named <= set(found)
    assert not list((place / "store" / "scratch").iterdir())
    assert not list((place / "store" / "tmp").iterdir())
    shutil.rmtree(place)
