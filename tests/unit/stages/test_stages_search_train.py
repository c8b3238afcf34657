"""Search and train as the engine calls them, on the embedded digits."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from pipeline.core.stage import Context, Result
from stages import search, train
from stages.evaluate import under_attack
from stages.method import InputError
from stages.nn import checkpoint
from stages.recipes.trades import Trades
from stages.task import Task

TASK = {"data": "digits", "threat": {"norm": "linf", "eps": 0.1}, "train_samples": 300}
CNN = {"arch": {"builder": "small_cnn", "width": 8, "hidden": 16}}
RANDOM = {
    "kind": "random_search",
    "space": {"builder": "small_cnn", "width": [4, 8, 12], "hidden": 16},
    "trials": 2,
    "score": {"epochs": 2, "samples": 200, "holdout_samples": 60, "lr": 0.1, "attack": {"kind": "pgd", "steps": 3}},
}
FAST = {"kind": "fast", "epochs": 3, "checkpoint_seconds": 0, "holdout_samples": 100}


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


def _bytes(result: Result) -> dict[str, str]:
    return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in result.files.items()}


def _numbers(result: Result) -> dict[str, float]:
    return {m.name: m.value for m in result.measurements}


@pytest.fixture(name="arch")
def _arch(tmp_path: Path) -> Path:
    return search.run({}, search.Config.load(CNN), _context(tmp_path / "search")).files["arch.json"]


@pytest.mark.parametrize("data", [{}, CNN, RANDOM])
def test_search_config_round_trips_and_promises_what_it_measures(data: dict[str, Any], tmp_path: Path) -> None:
    config = search.Config.load(data)
    dump = config.model_dump(mode="json")
    assert search.Config.load(dump) == config
    assert json.loads(json.dumps(dump)) == dump
    assert {"kind", "score"} <= set(dump)
    result = search.run({}, config, _context(tmp_path / "run"))
    assert set(_numbers(result)) == search.measures(config, TASK)


@pytest.mark.parametrize("data", [{}, {"kind": "trades", "beta": 3, "epochs": 30}, {"kind": "at", "keep": "best"}])
def test_train_config_round_trips(data: dict[str, Any]) -> None:
    config = train.Config.load(data)
    dump = config.model_dump(mode="json")
    assert train.Config.load(dump) == config
    assert json.loads(json.dumps(dump)) == dump
    assert {"kind", "epochs", "lr", "holdout_attack", "keep"} <= set(dump)


def test_random_search_keeps_every_score_and_names_the_winner(tmp_path: Path) -> None:
    events: list[tuple[str, dict[str, object]]] = []
    result = search.run({}, search.Config.load(RANDOM), _context(tmp_path / "run", events))
    rows = json.loads(result.files["search.json"].read_text())
    assert len(rows) == 2
    assert set(rows[0]) == {"arch", "score", "macs", "params"}
    winner = json.loads(result.files["arch.json"].read_text())
    best = max(rows, key=lambda row: (row["score"], -row["macs"]))
    assert winner == best["arch"]
    assert _numbers(result)["accuracy.robust.proxy.holdout"] == pytest.approx(best["score"])
    assert result.outcomes["accuracy.robust.proxy.holdout"].count == 60
    assert len([1 for kind, _ in events if kind == "note"]) == 2


def test_an_interrupted_search_trains_nobody_twice_and_ends_the_same(tmp_path: Path) -> None:
    whole = search.run({}, search.Config.load(RANDOM), _context(tmp_path / "whole"))
    with pytest.raises(Stopped):
        search.run({}, search.Config.load(RANDOM), _context(tmp_path / "cut", stop=4))
    events: list[tuple[str, dict[str, object]]] = []
    again = search.run({}, search.Config.load(RANDOM), _context(tmp_path / "cut", events))
    assert _bytes(again) == _bytes(whole)
    assert again.measurements == whole.measurements
    assert {data["label"] for kind, data in events if kind == "progress"} == {"candidate 2"}


def test_a_candidate_that_diverges_scores_nothing(tmp_path: Path) -> None:
    score = {**RANDOM["score"], "lr": 1e30}  # type: ignore[dict-item]  # a dict by construction
    events: list[tuple[str, dict[str, object]]] = []
    result = search.run({}, search.Config.load({**RANDOM, "score": score}), _context(tmp_path / "run", events))
    assert _numbers(result)["accuracy.robust.proxy.holdout"] == 0.0
    assert any("it scores 0" in str(data.get("text")) for _, data in events)


def test_train_writes_a_model_its_recipe_and_its_log(tmp_path: Path, arch: Path) -> None:
    events: list[tuple[str, dict[str, object]]] = []
    config = train.Config.load(FAST)
    result = train.run({"arch.json": arch}, config, _context(tmp_path / "train", events))
    assert set(result.files) == {"arch.json", "weights.safetensors", "recipe.json", "training.json"}
    assert set(_numbers(result)) == train.measures(config, TASK) == {m.name for m in result.measurements}
    assert set(result.outcomes) == {"accuracy.clean.holdout", "accuracy.robust.holdout"}
    assert result.outcomes["accuracy.robust.holdout"].examples == result.outcomes["accuracy.clean.holdout"].examples
    assert _numbers(result)["accuracy.robust.holdout"] <= _numbers(result)["accuracy.clean.holdout"]
    assert _numbers(result)["size.weights"] == result.files["weights.safetensors"].stat().st_size
    assert json.loads(result.files["recipe.json"].read_text()) == {
        "recipe": config.recipe.dump(),
        "fit": config.fit.dump(),
    }
    rows = json.loads(result.files["training.json"].read_text())
    assert [row["epoch"] for row in rows] == [1.0, 2.0, 3.0]
    assert "accuracy.pgd" in rows[-1]
    model = checkpoint.load(result.files["arch.json"], result.files["weights.safetensors"])
    assert all(bool(torch.isfinite(value).all()) for value in model.net.state_dict().values())
    steps = [data for kind, data in events if kind == "progress" and data["label"] == "train"]
    assert steps[-1] == {"label": "train", "done": 6, "total": 6}


@pytest.mark.parametrize("stop", [2, 5, 7])
def test_an_interrupted_training_ends_in_the_same_files(tmp_path: Path, arch: Path, stop: int) -> None:
    config = train.Config.load({**FAST, "keep": "best"})
    whole = train.run({"arch.json": arch}, config, _context(tmp_path / "whole"))
    with pytest.raises(Stopped):
        train.run({"arch.json": arch}, config, _context(tmp_path / "cut", stop=stop))
    events: list[tuple[str, dict[str, object]]] = []
    again = train.run({"arch.json": arch}, config, _context(tmp_path / "cut", events))
    assert _bytes(again) == _bytes(whole)
    assert again.measurements == whole.measurements
    assert again.outcomes == whole.outcomes
    first = next(data["done"] for kind, data in events if data.get("label") == "train")
    assert first == {2: 1, 5: 4, 7: 6}[stop]  # 6 is all of it: only the measuring was cut off


def test_the_best_weights_are_chosen_on_images_that_neither_train_nor_are_reported_on(
    tmp_path: Path, arch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = train.Config.load({**FAST, "keep": "best", "keep_share": 0.2})
    splits = Task.load(TASK).open(tmp_path)
    trained, judge = train.divided(splits.train, config, seed=0)
    parts = [set(part.indices.tolist()) for part in (trained, judge, splits.holdout)]
    assert len(set.union(*parts)) == sum(map(len, parts))
    assert set(judge.labels.tolist()) == set(range(10))
    assert len(judge) == pytest.approx(0.2 * len(splits.train), abs=10)
    attacked: list[int] = []

    def spy(net: Any, strike: Any, x: torch.Tensor, *rest: Any, **named: Any) -> Any:
        attacked.append(len(x))
        return under_attack(net, strike, x, *rest, **named)

    monkeypatch.setattr("stages.train.under_attack", spy)
    result = train.run({"arch.json": arch}, config, _context(tmp_path / "run"))
    rows = json.loads(result.files["training.json"].read_text())
    assert attacked == [len(judge)] * len(rows) + [result.outcomes["accuracy.robust.holdout"].count]


def test_given_weights_are_kept_as_they_are(tmp_path: Path, arch: Path) -> None:
    trained = train.run({"arch.json": arch}, train.Config.load(FAST), _context(tmp_path / "train"))
    (tmp_path / "data").mkdir()
    weights = trained.files["weights.safetensors"].read_bytes()
    (tmp_path / "data" / "mine.safetensors").write_bytes(weights)
    section = {"kind": "fixed", "weights": "mine.safetensors", "sha256": hashlib.sha256(weights).hexdigest()}
    config = train.Config.load({**section, "holdout_samples": 100})
    result = train.run({"arch.json": arch}, config, _context(tmp_path / "given"))
    assert result.files["weights.safetensors"].read_bytes() == weights
    assert _numbers(result)["accuracy.clean.holdout"] == _numbers(trained)["accuracy.clean.holdout"]
    assert json.loads(result.files["recipe.json"].read_text())["recipe"]["retune"] == Trades().dump()


def test_given_weights_that_do_not_fit_are_refused_by_name(tmp_path: Path, arch: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "mine.safetensors").write_bytes(b"nothing")
    digest = hashlib.sha256(b"nothing").hexdigest()

    def run(**section: str) -> None:
        config = train.Config.load({"kind": "fixed", **section})
        train.run({"arch.json": arch}, config, _context(tmp_path / "given"))

    with pytest.raises(InputError, match=r"yours\.safetensors: cannot be read: No such file"):
        run(weights="yours.safetensors", sha256=digest)
    with pytest.raises(InputError, match=f"got {digest}; is it another file"):
        run(weights="mine.safetensors", sha256="0" * 64)
    with pytest.raises(InputError, match=r"mine\.safetensors: expected a safetensors file"):
        run(weights="mine.safetensors", sha256=digest)
    with pytest.raises(InputError, match="expected a path below the data root"):
        run(weights=str(data / "mine.safetensors"), sha256=digest)
    with pytest.raises(ValidationError, match="sha256sum"):
        run(weights="mine.safetensors")


def test_an_architecture_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    broken = tmp_path / "blob"
    broken.write_text("{")
    with pytest.raises(InputError, match=r"arch\.json: expected the JSON of an architecture"):
        train.run({"arch.json": broken}, train.Config.load(FAST), _context(tmp_path / "train"))


def test_messages_name_the_users_key() -> None:
    with pytest.raises(ValidationError) as caught:
        train.Config.load({"kind": "trades", "beat": 6, "epochs": -1})
    found = {detail["loc"]: detail["msg"] for detail in caught.value.errors()}
    assert found[("beat",)] == 'unknown key; did you mean "beta"?'
    assert "greater than or equal to 0" in found[("epochs",)]
    with pytest.raises(ValidationError) as caught:
        search.Config.load({"kind": "random_search", "score": {"epoch": 3}, "space": {"builder": "nope"}})
    found = {detail["loc"]: detail["msg"] for detail in caught.value.errors()}
    assert found[("score", "epoch")] == 'unknown key; did you mean "epochs"?'
    assert 'no method "nope"' in found[("space",)]


def test_a_network_that_learnt_nothing_is_pointed_out(tmp_path: Path, arch: Path) -> None:
    for epochs, told in ((0, True), (12, False)):
        events: list[tuple[str, dict[str, object]]] = []
        config = train.Config.load({"kind": "natural", "epochs": epochs, "holdout_samples": 100})
        result = train.run({"arch.json": arch}, config, _context(tmp_path / str(epochs), events))
        assert any("commonest class" in str(data.get("text")) for _, data in events) is told, _numbers(result)
