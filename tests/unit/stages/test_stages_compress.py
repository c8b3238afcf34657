"""Compress as the engine calls it, on the embedded digits."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from pipeline.core.stage import Context, Files, Result
from stages import compress, search, train
from stages.evaluate import correct
from stages.method import InputError
from stages.nn import checkpoint
from stages.nn.layers.gdws_conv import GDWSConv
from stages.task import Task

TASK = {"data": "digits", "threat": {"norm": "linf", "eps": 0.1}, "train_samples": 300}
CNN = {"arch": {"builder": "small_cnn", "width": 8, "hidden": 16}}
QUICK: dict[str, Any] = {
    "tune_epochs": 2,
    "calibration": {"batches": 2, "batch": 32, "attack": {"kind": "pgd", "steps": 3}},
    "holdout_attack": {"kind": "pgd", "steps": 3},
    "holdout_samples": 100,
}
METHODS: dict[str, dict[str, Any]] = {
    "prune": {"kind": "prune", "ratio": 0.5, "steps": 2, "round_to": 4},
    "gdws": {"kind": "gdws", "ratio": 0.2},
    "fixed": {"kind": "fixed"},
}


class Stopped(Exception):
    """Raised by a test's listener."""


def _context(
    place: Path, events: list[tuple[str, dict[str, object]]] | None = None, stop: int | None = None
) -> Context:
    place.mkdir(parents=True, exist_ok=True)
    count = 0

    def emit(kind: str, data: Mapping[str, object]) -> None:
        nonlocal count
        count += 1
        if events is not None:
            events.append((kind, dict(data)))
        if count == stop:
            raise Stopped

    return Context(task=TASK, data_root=place.parent / "data", seed=11, scratch=place, emit=emit)


def _digests(files: Files) -> dict[str, str]:
    return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()}


def _numbers(result: Result) -> dict[str, float]:
    return {m.name: m.value for m in result.measurements}


@pytest.fixture(name="trained", scope="module")
def _trained(tmp_path_factory: pytest.TempPathFactory) -> Files:
    place = tmp_path_factory.mktemp("compress")
    arch = search.run({}, search.Config.load(CNN), _context(place / "search")).files
    config = {"kind": "fast", "epochs": 6, "checkpoint_seconds": 0, "holdout_samples": 100}
    return train.run(arch, train.Config.load(config), _context(place / "train")).files


@pytest.mark.parametrize("data", [{}, *METHODS.values(), {**METHODS["prune"], **QUICK}])
def test_config_round_trips_flat(data: dict[str, Any]) -> None:
    config = compress.Config.load(data)
    dump = config.model_dump(mode="json")
    assert compress.Config.load(dump) == config
    assert json.loads(json.dumps(dump)) == dump
    assert dump["kind"] == data.get("kind", "fixed")
    assert {key: dump[key] for key in data if key not in {"calibration", "holdout_attack"}} == {
        key: value for key, value in data.items() if key not in {"calibration", "holdout_attack"}
    }


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"kind": "prune", "ratoi": 0.5}, 'did you mean "ratio"'),
        ({"kind": "prun"}, 'did you mean "prune"'),
        ({"kind": "prune", "ratio": 1.0}, "less than 1"),
        ({"kind": "gdws", "round_to": 8}, "unknown key"),
        ({"tune_epochs": -1}, "greater than or equal to 0"),
        ({"calibration": {"batches": 0}}, "greater than or equal to 1"),
    ],
)
def test_bad_sections_are_refused(data: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        compress.Config.load(data)


@pytest.mark.parametrize("kind", METHODS)
def test_runs_measures_what_it_promises_and_reads_back(kind: str, trained: Files, tmp_path: Path) -> None:
    config = compress.Config.load({**METHODS[kind], **QUICK})
    before = _digests(trained)
    events: list[tuple[str, dict[str, object]]] = []
    result = compress.run(trained, config, _context(tmp_path / "run", events))
    numbers = _numbers(result)
    assert set(numbers) == compress.measures(config, TASK)
    assert _digests(trained) == before
    assert set(result.files) == set(trained) | {"compression.json"}
    model = checkpoint.load(result.files["arch.json"], result.files["weights.safetensors"])
    story = json.loads(result.files["compression.json"].read_text())
    full = checkpoint.load(trained["arch.json"], trained["weights.safetensors"])
    assert story["kind"] == kind
    assert story["after"]["macs"] == numbers["cost.macs"]
    assert [layer["path"] for layer in story["layers"]] == ["conv1", "conv2", "fc1", "fc2"]
    for side in ("before", "after"):
        # Every weight of this network lies in one of the four layers.
        assert sum(layer[side]["params"] for layer in story["layers"]) == story[side]["params"]
        assert sum(layer[side]["macs"] for layer in story["layers"]) == story[side]["macs"]
    if kind == "fixed":
        assert {name: _digests(result.files)[name] for name in before} == before
        assert story["before"] == story["after"]
    else:
        assert numbers["cost.macs"] < story["before"]["macs"]
        assert model.arch.rewrites
        assert any(kind == "progress" and str(data["label"]).startswith("tune 1") for kind, data in events)
    if kind == "gdws":
        layer = model.net.get_submodule("conv2")
        assert isinstance(layer, GDWSConv)
        told = story["layers"][1]
        assert sum(told["kernels"]) == layer.channels.numel()
        assert 0 < told["error"] < 1
    assert _digests(result.files)["recipe.json"] == before["recipe.json"]
    holdout = Task.load(TASK).open(Path()).holdout
    if len(holdout) <= 100:
        hits = correct(model.net, holdout.images, holdout.labels)
        assert numbers["accuracy.clean.holdout"] == pytest.approx(float(hits.double().mean()))
    assert numbers["accuracy.robust.holdout"] <= numbers["accuracy.clean.holdout"]
    assert set(result.outcomes) == {"accuracy.clean.holdout", "accuracy.robust.holdout"}
    assert type(full.net) is type(model.net)


def test_tuning_changes_the_weights_and_zero_epochs_do_not(trained: Files, tmp_path: Path) -> None:
    config = compress.Config.load({**METHODS["gdws"], **QUICK, "tune_epochs": 0})
    untuned = compress.run(trained, config, _context(tmp_path / "untuned"))
    tuned = compress.run(trained, config.model_copy(update={"tune_epochs": 1}), _context(tmp_path / "tuned"))
    assert _digests(untuned.files)["arch.json"] == _digests(tuned.files)["arch.json"]
    assert _digests(untuned.files)["weights.safetensors"] != _digests(tuned.files)["weights.safetensors"]


@pytest.mark.parametrize("kind", ["prune", "gdws"])
def test_the_same_run_gives_the_same_bytes_also_after_interruptions(kind: str, trained: Files, tmp_path: Path) -> None:
    config = compress.Config.load({**METHODS[kind], **QUICK})
    events: list[tuple[str, dict[str, object]]] = []
    smooth = compress.run(trained, config, _context(tmp_path / "smooth", events))
    state = torch.random.get_rng_state()
    stopped = 0
    for _ in range(4):
        # Each go finds the work of those before it, so it says less and gets further.
        try:
            compress.run(trained, config, _context(tmp_path / "broken", stop=len(events) // 3))
        except Stopped:
            stopped += 1
    assert stopped >= 2
    again = compress.run(trained, config, _context(tmp_path / "broken"))
    assert _digests(again.files) == _digests(smooth.files)
    assert _numbers(again) == _numbers(smooth)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_recipe_that_cannot_be_read_is_named(trained: Files, tmp_path: Path) -> None:
    config = compress.Config.load({**METHODS["gdws"], **QUICK})
    torn = tmp_path / "recipe.json"
    for text in ("{", "{}", '{"recipe": {"kind": "att"}, "fit": {}}'):
        torn.write_text(text)
        with pytest.raises(InputError, match=r"recipe\.json: expected the recipe"):
            compress.run({**trained, "recipe.json": torn}, config, _context(tmp_path / "torn"))
    missing = {name: path for name, path in trained.items() if name != "recipe.json"}
    with pytest.raises(InputError, match=r"recipe\.json: expected the recipe"):
        compress.run(missing, config, _context(tmp_path / "missing"))
