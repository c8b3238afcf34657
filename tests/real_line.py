"""Builds of the real line on the embedded digits, in processes of their own, small enough for a test."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from pipeline.core.record import RunRecord

ROOT = Path(__file__).resolve().parent.parent

# The first compression is too bold for its gate (nothing is tuned after 60 % of the channels went), the second is not.
SPEC = """
name = "small"

[task]
data = "digits"
threat = { norm = "linf", eps = "0.1" }

[stages.search]
kind = "fixed"
arch = { builder = "small_cnn", width = 16, hidden = 32 }

[stages.train]
kind = "natural"
epochs = 6
batch = 64
lr = 0.05
ema = 0.9
checkpoint_seconds = 0
holdout_attack = { kind = "pgd", steps = 3 }

[stages.compress]
kind = "prune"
steps = 1
round_to = 4
calibration = { batches = 2, batch = 64, attack = { kind = "pgd", steps = 2 } }
holdout_attack = { kind = "pgd", steps = 3 }
attempts = [{ ratio = 0.6, tune_epochs = 0 }, { ratio = 0.25, tune_epochs = 2 }]

[stages.validate]
samples = 60
validity_samples = 20
curve = [0.5, 1.0, 3.0]
attacks = [{ kind = "pgd", steps = 10 }, { kind = "square", queries = 100 }]
images = 2

[stages.export]
attacks = [{ kind = "pgd", steps = 3 }, { kind = "square", queries = 20 }]
holdout_samples = 60
calibration = 32
runs = 20

[[budget.compress]]
metric = "accuracy.clean.holdout"
at_least = 0.7

[[regression.validate]]
metric = "accuracy.clean.test"
max_loss = 0.02

[[regression.export]]
metric = "size.model"
max_loss = 100
"""


def pipeline(
    *words: str | Path, python: tuple[str, ...] = (), path: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """`python -m pipeline WORDS` in a fresh process; `path` goes before PYTHONPATH, `python` to the interpreter."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    if path is not None:
        env["PYTHONPATH"] = os.pathsep.join([str(path), *filter(None, [env.get("PYTHONPATH")])])
    command = [sys.executable, *python, "-m", "pipeline", *map(str, words)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=env, timeout=280)


def build(spec: Path, runs: Path, *words: str, target: str = "x86_cpu") -> subprocess.CompletedProcess[str]:
    return pipeline("build", spec, "--target", target, "--runs", runs, "--quiet", *words)


def record(runs: Path, name: str) -> RunRecord:
    return RunRecord.load(json.loads((runs / name / "record.json").read_bytes()))


def manifest(bundle: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((bundle / "manifest.json").read_bytes())
    return found
