"""Export as the engine calls it, on the embedded digits: what it writes, what it measures, what it refuses."""

import hashlib
import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load as tensors_of
from safetensors.torch import save as bytes_of

from pipeline.core.errors import BadInput
from pipeline.core.stage import Context, Files, Result
from stages import export, search, train, validate
from stages.lowering import calibration, check_export
from stages.method import InputError
from stages.nn import checkpoint
from stages.nn.fold import fold
from stages.remeasure import positions, suspicious
from stages.task import Splits, Task
from targets.runtime.ort import OrtEngine

PLANTED = Path(__file__).resolve().parents[2] / "planted"
TASK = {"data": "digits", "threat": {"norm": "linf", "eps": 0.1}, "train_samples": 400}
QUICK: dict[str, Any] = {
    "exporter": "legacy",
    "attacks": [{"kind": "pgd", "steps": 3}, {"kind": "square", "queries": 20}],
    "calibration": 32,
    "holdout_samples": 60,
    "runs": 20,
}
INT8 = {"precision": "int8", "precisions": {"int8": ["fold_constants", "qdq_int8_cpu", "ort_format"], "fp32": []}}
CONFIGS: dict[str, dict[str, Any]] = {
    "fp32": {**QUICK, "certify": ["crown_ibp"], "precisions": {"fp32": ["fold_constants"]}},
    "int8": {**QUICK, **INT8, "certify": ["quantised"]},
    "board": {**QUICK, **INT8, "machine": "riscv64"},
    "tensorrt": {
        **QUICK,
        "precision": "fp16",
        "precisions": {"fp16": ["fp16"], "fp32": []},
        "runtime": "tensorrt",
        "provider": "CUDAExecutionProvider",
        "machine": "aarch64",
    },
}
Events = list[tuple[str, dict[str, object]]]


def context(place: Path, events: Events | None = None) -> Context:
    place.mkdir(parents=True, exist_ok=True)

    def emit(kind: str, data: Mapping[str, object]) -> None:
        if events is not None:
            events.append((kind, dict(data)))

    return Context(task=TASK, data_root=place.parent / "data", seed=11, scratch=place, emit=emit)


def digests(files: Files) -> dict[str, str]:
    return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()}


def numbers(result: Result) -> dict[str, float]:
    return {m.name: m.value for m in result.measurements}


@pytest.fixture(name="validated", scope="module")
def _validated(tmp_path_factory: pytest.TempPathFactory) -> Files:
    place = tmp_path_factory.mktemp("export")
    arch = {"arch": {"builder": "small_cnn", "width": 8, "hidden": 32}}
    files = search.run({}, search.Config.load(arch), context(place / "search")).files
    recipe = {"kind": "natural", "epochs": 12, "batch": 32, "lr": 0.05, "ema": 0.9, "holdout_samples": 20}
    files = train.run(files, train.Config.load(recipe), context(place / "train")).files
    attacks = [{"kind": "pgd", "steps": 5}, {"kind": "square", "queries": 20}]
    how = {"samples": 60, "validity_samples": 20, "curve": [0.5, 1.0, 3.0], "attacks": attacks, "images": 1}
    return validate.run(files, validate.Config.load(how), context(place / "validate")).files


@pytest.fixture(name="made", scope="module")
def _made(validated: Files, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    """Every config, run once."""
    place = tmp_path_factory.mktemp("made")
    return {
        name: export.run(validated, export.Config.load(config), context(place / name))
        for name, config in CONFIGS.items()
    }


@pytest.fixture(name="splits", scope="module")
def _splits() -> Splits:
    return Task.load(TASK).open(Path())


def engine(result: Result) -> OrtEngine:
    contract = json.loads(result.files["bundle/contract.json"].read_bytes())
    return OrtEngine(result.files[f"bundle/{contract['model']}"].read_bytes())


@pytest.mark.parametrize("name", CONFIGS)
def test_a_run_measures_exactly_what_it_promised(made: dict[str, Result], name: str) -> None:
    config = export.Config.load(CONFIGS[name])
    assert set(numbers(made[name])) == export.measures(config, TASK) - export.WITH_DETECTOR
    speed = {"latency.p50", "latency.p95"} & set(numbers(made[name]))
    assert bool(speed) == (name in ("fp32", "int8"))  # elsewhere it would be the speed of another machine
    assert ("memory.peak" in numbers(made[name])) == (name != "tensorrt")


@pytest.mark.parametrize(
    ("name", "model", "more"),
    [
        ("fp32", "model.onnx", set()),
        ("int8", "model.int8.onnx", {"model.int8.onnx", "model.int8.ort"}),
        ("tensorrt", "model.fp16.onnx", {"model.fp16.onnx"}),
    ],
)
def test_the_files_and_their_sizes(
    made: dict[str, Result], validated: Files, name: str, model: str, more: set[str]
) -> None:
    files = made[name].files
    bundle = {file.removeprefix("bundle/") for file in files if file.startswith("bundle/")}
    assert bundle == {"model.onnx", "contract.json", "predict.py", "probe.npz"} | more
    figures = {file for file in validated if file.startswith(("figures.json", "images/"))}
    assert figures
    assert set(files) - {f"bundle/{file}" for file in bundle} == figures
    drawn = {file for file in figures if file.startswith("images/") or name == "tensorrt"}
    assert all(files[file] == validated[file] for file in drawn)
    found = numbers(made[name])
    assert found["size.model"] == files[f"bundle/{model}"].stat().st_size
    assert found["size.bundle"] == sum(files[f"bundle/{file}"].stat().st_size for file in bundle)


@pytest.mark.parametrize(("name", "kind"), [("fp32", "crown_ibp"), ("int8", "quantised"), ("board", None)])
def test_the_contract_says_what_was_proved_of_which_file(
    made: dict[str, Result], validated: Files, name: str, kind: str | None
) -> None:
    contract = json.loads(made[name].files["bundle/contract.json"].read_bytes())
    if kind is None:
        assert "certified" not in contract
        return
    told = contract["certified"]
    assert told["sha256"] == digests(made[name].files)[f"bundle/{contract['model']}"]
    assert list(told["certifiers"]) == [kind]
    assert told["threat"]["eps"] == contract["threat"]["eps"]
    assert told["images"] == 60
    assert told["proved"] == numbers(made[name])["accuracy.certified.shipped.test"] * 60
    assert told["file"] == contract["model"]
    bars = json.loads(made[name].files["figures.json"].read_bytes())["verdicts"]
    assert bars[0] == json.loads(validated["figures.json"].read_bytes())["verdicts"][0]
    assert [bar["of"] for bar in bars[1:]] == ["model.onnx", "model.int8.onnx"][: 1 + (name == "int8")]
    assert bars[-1]["proved"] == told["proved"]
    if name == "int8":
        assert told["float"]["sha256"] == digests(made[name].files)["bundle/model.onnx"]
        share = (told["float"]["proved"] - told["proved"]) / 60
        assert told["gap"]["share"] == numbers(made[name])["gap.certified"] == pytest.approx(share)
        assert numbers(made[name])["accuracy.certified.float.test"] * 60 == told["float"]["proved"]
    else:
        assert "float" not in told


def test_an_unsound_certifier_refuses_the_file(
    validated: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It "proves" every image that the file reads rightly, and attacks broke some of these on both files."""
    monkeypatch.syspath_prepend(PLANTED)
    config = export.Config.load({**CONFIGS["int8"], "certify": ["temper_liar"]})
    result = export.run(validated, config, context(tmp_path / "liar"))
    broken = [text for text in result.findings if "were broken on it; must be none" in text]
    assert [text.split()[6] for text in broken] == ["model.int8.onnx", "model.onnx"]
    assert all(int(text.split()[0]) > 0 for text in broken)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_contract_says_what_a_reader_must_know(made: dict[str, Result], splits: Splits, name: str) -> None:
    contract = json.loads(made[name].files["bundle/contract.json"].read_bytes())
    config = CONFIGS[name]
    assert contract["precision"] == config.get("precision", "fp32")
    assert contract["runtime"] == config.get("runtime", "onnxruntime")
    assert contract.get("provider") == config.get("provider")
    assert contract.get("machine") == config.get("machine")
    assert contract["input"] == {
        "name": "input",
        "shape": [1, 8, 8],
        "dtype": "float32",
        "layout": "NCHW",
        "range": [0, 1],
    }
    assert contract["output"] == {"name": "logits", "classes": 10}
    assert contract["labels"] == list(splits.classes)
    assert contract["threat"] == {"norm": "linf", "eps": 0.1}
    assert contract["attacks"] == "quick"
    assert f"bundle/{contract['model']}" in made[name].files


@pytest.mark.parametrize("name", CONFIGS)
def test_probes_are_training_images_and_what_the_shipped_file_says_about_them(
    made: dict[str, Result], splits: Splits, name: str
) -> None:
    probe = np.load(made[name].files["bundle/probe.npz"])
    assert np.array_equal(probe["inputs"], splits.train.floats(slice(0, 32)).numpy())
    assert np.array_equal(probe["logits"], engine(made[name])(probe["inputs"]))


@pytest.mark.parametrize("name", CONFIGS)
def test_parity_is_that_of_file_and_network_on_the_hold_out(
    made: dict[str, Result], validated: Files, splits: Splits, name: str
) -> None:
    x = splits.holdout.floats(slice(0, 60))
    with torch.no_grad():
        expected = fold(checkpoint.load(validated["arch.json"], validated["weights.safetensors"]).net)(x).numpy()
    found = engine(made[name])(x.numpy())
    measured = numbers(made[name])
    assert measured["parity.logits"] == pytest.approx(np.abs(found - expected).max(), rel=1e-4, abs=1e-5)
    assert measured["parity.top1"] == pytest.approx((found.argmax(1) == expected.argmax(1)).mean())
    if name == "fp32":
        assert measured["parity.logits"] < 1e-3 * np.abs(expected).max()
        assert measured["parity.top1"] == 1


@pytest.mark.parametrize("name", ["fp32", "int8"])
def test_accuracy_is_the_shipped_files_and_nothing_that_breaks_it_is_left_out(
    made: dict[str, Result], validated: Files, splits: Splits, name: str
) -> None:
    stored = tensors_of(validated["adversarial.safetensors"].read_bytes())
    rows = [splits.test.indices.tolist().index(i) for i in stored["indices"].tolist()]
    y, run = splits.test.labels[rows].numpy(), engine(made[name])
    clean = run(splits.test.floats(torch.tensor(rows)).numpy()).argmax(1) == y
    replayed = run(stored["x_adv"].numpy()).argmax(1) == y
    bits = {n: np.array(made[name].outcomes[f"accuracy.{n}.shipped.test"].hits()) for n in ("clean", "robust")}
    assert np.array_equal(bits["clean"], clean)
    assert not (bits["robust"] & ~(clean & replayed)).any()
    found = numbers(made[name])
    for what, hits in bits.items():
        assert found[f"accuracy.{what}.shipped.test"] == pytest.approx(hits.mean())
    assert 0 < found["accuracy.robust.shipped.test"] < found["accuracy.clean.shipped.test"]
    assert made[name].findings == ()


def test_equal_inputs_give_equal_bytes_and_more_threads_or_runs_change_none(
    made: dict[str, Result], validated: Files, tmp_path: Path
) -> None:
    again = export.run(validated, export.Config.load({**CONFIGS["int8"], "runs": 25}), context(tmp_path / "again"))
    ort = "bundle/model.int8.ort"  # onnxruntime writes one table of it in the order of a randomly seeded hash table
    one, other = digests(again.files), digests(made["int8"].files)
    assert {name for name in one.keys() | other.keys() if one.get(name) != other.get(name)} <= {ort}
    assert ort in one
    assert again.outcomes == made["int8"].outcomes


def test_progress_ends_where_it_said_it_would(validated: Files, tmp_path: Path) -> None:
    events: Events = []
    export.run(validated, export.Config.load(QUICK), context(tmp_path / "export", events))
    told = [(data["label"], data["done"], data["total"]) for kind, data in events if kind == "progress"]
    assert told[0] == ("export to ONNX", 0, 4)
    assert told[-1] == ("measure speed and size", 4, 4)
    assert ("attack the file (test)", 2, 2) in told or ("attack the file (test)", 3, 3) in told


def test_a_graph_that_is_not_the_network_is_refused(made: dict[str, Result], validated: Files, splits: Splits) -> None:
    net = fold(checkpoint.load(validated["arch.json"], validated["weights.safetensors"]).net)
    good = made["fp32"].files["bundle/model.onnx"].read_bytes()
    check_export(net, good, splits)
    with torch.no_grad():
        next(net.parameters()).mul_(1.5)
    with pytest.raises(InputError, match=r'off at batch 1; try exporter = "legacy"'):
        check_export(net, good, splits)


def test_what_cannot_be_met_is_known_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(PLANTED)
    with pytest.raises(BadInput, match='no precision "int4"; there is fp32'):
        export.measures(export.Config.load({"precision": "int4"}), TASK)
    with pytest.raises(BadInput, match='no pass "fp61"; did you mean "fp16"'):
        export.Config.load({"precisions": {"fp32": ["fp61"]}})
    with pytest.raises(InputError, match="temper_one_sided: expected a threat in linf, got l1"):
        export.measures(
            export.Config.load({"attacks": ["temper_one_sided"]}), {**TASK, "threat": {"norm": "l1", "eps": 0.5}}
        )


def test_calibration_is_half_clean_and_half_attacked_within_the_threat(validated: Files, splits: Splits) -> None:
    net = fold(checkpoint.load(validated["arch.json"], validated["weights.safetensors"]).net)
    task = Task.load(TASK)
    x = calibration(net, splits, task.threat, 40, seed=11)
    images = splits.train.floats()
    apart = torch.stack([(images - one).abs().amax((1, 2, 3)).min() for one in x])
    assert x.shape == (40, 1, 8, 8)
    assert bool((apart[::2] == 0).all())
    assert bool((apart[1::2] <= task.threat.eps + 1e-6).all())
    assert bool((apart[1::2] > 0).all())  # every one, also where the attack did not succeed
    assert 0 <= float(x.min()) <= float(x.max()) <= 1


@pytest.mark.parametrize("there", [True, False])
def test_nvidias_parser_is_asked_and_where_it_is_not_installed_that_is_said(
    validated: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: bool
) -> None:
    if there:
        pytest.importorskip("tensorrt_rtx")
    else:
        monkeypatch.setattr("targets.passes.tensorrt_check.installed", lambda _: None)
    events: Events = []
    passes = {"fp32": ["tensorrt_check"], "other": ["fold_constants", "tensorrt_check"]}
    config = export.Config.load({**CONFIGS["tensorrt"], "precision": "fp32", "precisions": passes})
    export.run(validated, config, context(tmp_path / "export", events))
    notes = [str(data["text"]) for kind, data in events if kind == "note"]
    asked = [text for text in notes if "takes the graph: a plan of" in text]
    silent = [text for text in notes if text.startswith("NVIDIA's parser was not asked: tensorrt-rtx is not installed")]
    assert (len(asked), len(silent)) == ((2, 0) if there else (0, 2))  # every precision on offer, not the chosen alone


def brute(gained: int, lost: int) -> float:
    """P(as many gained or more) where every discordant image falls either way by a fair coin; all outcomes listed."""
    outcomes = list(itertools.product((0, 1), repeat=gained + lost))
    return sum(sum(outcome) >= gained for outcome in outcomes) / len(outcomes)


@pytest.mark.parametrize("gained", range(9))
@pytest.mark.parametrize("lost", range(3))
def test_a_file_is_suspicious_exactly_where_the_one_sided_test_says_so(gained: int, lost: int) -> None:
    same = torch.tensor([True, False, True])
    floats = torch.cat([torch.zeros(gained, dtype=torch.bool), torch.ones(lost, dtype=torch.bool), same])
    alive = torch.cat([torch.ones(gained, dtype=torch.bool), torch.zeros(lost, dtype=torch.bool), same])
    found = suspicious(alive, floats, "int8")
    assert bool(found) == (brute(gained, lost) < 0.01 and gained > 0)
    if found:
        assert f"withstood {gained} attacks that broke the float network and lost {lost}" in found[0]
        assert f"(p = {brute(gained, lost):.2g})" in found[0]
    assert suspicious(floats, alive, "int8") == () or lost > gained  # the other side is no finding


def test_without_the_float_networks_survivors_nothing_is_suspected() -> None:
    assert suspicious(torch.ones(50, dtype=torch.bool), None, "int8") == ()


def test_a_file_that_hides_its_gradients_is_a_finding_of_the_run(validated: Files, tmp_path: Path) -> None:
    """The float network's survivors are taken for fewer than they were: now the file looks too robust."""
    stored = tensors_of(validated["adversarial.safetensors"].read_bytes())
    stored["survived"] = torch.zeros_like(stored["survived"])
    (tmp_path / "planted").write_bytes(bytes_of(stored))
    files = {**validated, "adversarial.safetensors": tmp_path / "planted"}
    result = export.run(files, export.Config.load(QUICK), context(tmp_path / "export"))
    (found,) = result.findings
    alive = sum(result.outcomes["accuracy.robust.shipped.test"].hits())
    assert found.startswith(f"the fp32 file withstood {alive} attacks that broke the float network and lost 0")


def test_rows_are_found_by_index_in_the_wanted_order() -> None:
    generator = torch.Generator().manual_seed(0)
    for size in (1, 2, 5, 40):
        indices = torch.randperm(100, generator=generator)[:size]
        wanted = indices[torch.randperm(size, generator=generator)[: max(1, size // 2)]]
        rows = positions(indices, wanted)
        assert rows.tolist() == [indices.tolist().index(i) for i in wanted.tolist()]
        assert torch.equal(indices[rows], wanted)
