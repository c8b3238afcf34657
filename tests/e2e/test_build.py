"""`build` as its user runs it: real processes, the real line, the embedded digits."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.real_line import ROOT, build, manifest, pipeline, record

ROBUST = "accuracy.robust.holdout"
MASKED = """
name = "masked"

[task]
data = "digits"
threat = { norm = "linf", eps = "0.1" }

[stages.search]
kind = "fixed"
arch = { builder = "masked_cnn", levels = 6 }

[stages.train]
kind = "natural"
epochs = 6
batch = 64
lr = 0.05
ema = 0.9
holdout_attack = { kind = "pgd", steps = 3 }

[stages.compress]
kind = "fixed"
holdout_attack = { kind = "pgd", steps = 3 }

[stages.validate]
samples = 60
validity_samples = 30
curve = [0.5, 1.0, 3.0]
attacks = [{ kind = "pgd", steps = 10 }]
"""


def test_a_build_passes_and_its_bundle_holds_what_the_record_says(runs: Path) -> None:
    made, folder = record(runs, "small-x86_cpu"), runs / "small-x86_cpu"
    assert made.complete
    assert made.refused is None
    assert [stage.name for stage in made.chosen()] == ["search", "train", "compress", "validate", "export"]
    listed = manifest(folder / "bundle")
    assert {m["name"]: m["value"] for m in listed["measurements"]} == {n: m.value for n, m in made.latest().items()}
    assert listed["precision"] == "int8"
    assert listed["owed"] == []  # this machine is the device
    on_disk = {path.relative_to(folder / "bundle").as_posix() for path in (folder / "bundle").rglob("*")}
    assert on_disk == {*listed["files"], "manifest.json", "manifest.sha256"}
    assert (folder / "bundle" / listed["model"]).stat().st_size == made.latest()["size.model"].value
    for name in ("report.html", "report.md", "plan.json", "journal.jsonl"):
        assert (folder / name).stat().st_size > 0
    assert (runs / "small").resolve().name.startswith("small-")


def test_every_number_of_a_stage_that_read_the_hold_out_is_named_so(runs: Path) -> None:
    for stage in record(runs, "small-x86_cpu").stages:
        tested = {m.name for m in stage.measurements if m.name.endswith(".test")}
        assert bool(tested) == (stage.name in ("validate", "export")), stage.name


def test_a_too_bold_compression_is_refused_and_the_next_attempt_counts(runs: Path) -> None:
    bold, gentle = [stage for stage in record(runs, "small-x86_cpu").stages if stage.name == "compress"]
    assert (bold.overrides, bold.chosen, bold.verdict.passed) == ({"ratio": 0.6, "tune_epochs": 0}, False, False)
    assert (gentle.overrides, gentle.chosen, gentle.verdict.passed) == ({"ratio": 0.25, "tune_epochs": 2}, True, True)
    assert "accuracy.clean.holdout" in bold.verdict.refusals[0].text
    journal = (runs / "small-x86_cpu" / "journal.jsonl").read_text().splitlines()
    gates = [event for event in map(json.loads, journal) if event["kind"] == "gate" and event["stage"] == "compress"]
    assert [event["ok"] for event in gates[:2]] == [False, True]


def test_the_bundle_verifies_and_predicts_on_its_own(runs: Path, tmp_path: Path) -> None:
    bundle = runs / "small-x86_cpu" / "bundle"
    verified = pipeline("verify", bundle)
    assert verified.returncode == 0, verified.stderr
    assert "model.int8.onnx reproduces 32 probe outputs" in verified.stdout
    probe = np.load(bundle / "probe.npz")
    images, expected = tmp_path / "images.npy", probe["logits"].argmax(1)
    np.save(images, probe["inputs"])
    done = subprocess.run(
        [sys.executable, str(bundle / "predict.py"), str(images)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    labels = manifest(bundle)["labels"]
    assert [line.split(" margin ")[0] for line in done.stdout.splitlines()] == [labels[i] for i in expected]


@pytest.mark.parametrize("target", ["raspberry_pi", "jetson"])
def test_another_target_reuses_everything_up_to_export_and_owes_what_only_it_can_measure(
    runs: Path, spec: Path, target: str
) -> None:
    done = build(spec, runs, "--set", "export.exporter=legacy", target=target)  # the older exporter is the faster one
    assert done.returncode == 0, done.stderr
    made, first = record(runs, f"small-{target}"), record(runs, "small-x86_cpu")
    assert [stage.reused for stage in made.chosen()] == [True, True, True, True, False]
    assert [s.key for s in made.chosen()][:4] == [s.key for s in first.chosen()][:4]
    assert {limit["metric"] for limit in manifest(runs / f"small-{target}" / "bundle")["owed"]} == {
        "latency.p95",
        "memory.peak",
    }
    assert "latency.p95" not in made.latest()
    assert pipeline("verify", runs / f"small-{target}").returncode == 0


def test_an_impossible_budget_is_refused_with_the_reason(runs: Path, spec: Path) -> None:
    impossible = f'budget.train=[{{metric="{ROBUST}", at_least=0.99}}]'
    done = build(spec, runs, "--name", "impossible", "--set", impossible)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert re.search(rf"train was refused by its gate: {re.escape(ROBUST)} 0\.\d+ .* must be >= 0\.99", line)
    made = record(runs, "impossible-x86_cpu")
    assert (made.refused, made.complete) == ("train", False)
    assert [stage.reused for stage in made.stages] == [True, True]  # a budget reruns nothing
    assert not (runs / "impossible-x86_cpu" / "bundle").exists()
    assert "refused" in (runs / "impossible-x86_cpu" / "report.md").read_text().lower()


def test_bisection_ends_at_the_boldest_value_that_passes_and_test_numbers_ask_for_no_more(
    runs: Path, spec: Path
) -> None:
    done = build(
        spec,
        runs,
        "--name",
        "halved",
        "--set",
        'compress.attempts={bisect="ratio", from=0.6, to=0.1, probes=3}',
        "--set",
        "compress.tune_epochs=0",
        "--set",
        'budget.validate=[{metric="accuracy.robust.test", at_least=0.99}]',
    )
    assert done.returncode == 1
    assert "validate was refused by its gate: accuracy.robust.test" in done.stderr
    tried = [stage for stage in record(runs, "halved-x86_cpu").stages if stage.name == "compress"]
    assert [stage.overrides for stage in tried] == [{"ratio": 0.6}, {"ratio": 0.1}, {"ratio": pytest.approx(0.35)}]
    assert [stage.config["ratio"] for stage in tried] == [stage.overrides["ratio"] for stage in tried]
    passing = [stage for stage in tried if stage.verdict.passed]
    (chosen,) = [stage for stage in tried if stage.chosen]
    assert not tried[0].verdict.passed
    assert chosen.overrides["ratio"] == max(stage.overrides["ratio"] for stage in passing)


def test_a_network_that_masks_its_gradients_is_refused_whatever_its_numbers(runs: Path, tmp_path: Path) -> None:
    path = tmp_path / "masked.toml"
    path.write_text(MASKED)
    words = ("build", path, "--target", "x86_cpu", "--runs", runs, "--quiet")
    done = pipeline(*words, path=ROOT / "tests" / "planted")
    assert done.returncode == 1, done.stderr
    assert "validate was refused by its gate" in done.stderr
    assert "gradients_present: " in done.stderr
    made = record(runs, "masked-x86_cpu")
    assert made.refused == "validate"
    verdict = made.stages[-1].verdict
    assert all(reason.metric == "validity" for reason in verdict.refusals)  # no limit refused it
    assert made.latest()["accuracy.clean.test"].value > 0.7
    assert not (runs / "masked-x86_cpu" / "bundle").exists()


def test_an_unchanged_rebuild_imports_nothing_heavy_and_changes_no_byte_of_the_bundle(runs: Path, spec: Path) -> None:
    bundle = runs / "small-x86_cpu" / "bundle"
    before = {path: path.read_bytes() for path in bundle.rglob("*") if path.is_file()}
    words = ("build", spec, "--target", "x86_cpu", "--runs", runs, "--quiet")
    done = pipeline(*words, python=("-X", "importtime"))
    assert done.returncode == 0, done.stderr
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if "import time:" in line}
    assert "pipeline.engine.build" in imported  # the list is what it says
    assert {name.partition(".")[0] for name in imported}.isdisjoint({"torch", "numpy", "onnx", "onnxruntime", "stages"})
    assert all(stage.reused for stage in record(runs, "small-x86_cpu").stages)
    assert {path: path.read_bytes() for path in bundle.rglob("*") if path.is_file()} == before
