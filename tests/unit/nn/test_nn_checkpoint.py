"""A model on disk comes back the same, or not at all with a reason."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from stages.method import InputError
from stages.nn import checkpoint
from stages.nn.arch import Model
from tests.networks import arch, built

_ARCH = arch("resnet", (3, 8, 8), blocks=(1,))


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    checkpoint.save(Model(_ARCH, built(_ARCH)), tmp_path)
    return tmp_path


def _load(folder: Path) -> Model:
    return checkpoint.load(folder / "arch.json", folder / "weights.safetensors")


def test_equal_models_give_equal_bytes_and_nothing_else(stored: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = tmp_path_factory.mktemp("other")
    net = built(_ARCH).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    checkpoint.save(Model(_ARCH, net), other)
    for name in ("arch.json", "weights.safetensors"):
        assert (stored / name).read_bytes() == (other / name).read_bytes()
    assert sorted(path.name for path in other.iterdir()) == ["arch.json", "weights.safetensors"]


def test_loading_moves_no_global_generator_and_ends_in_eval_mode(stored: Path) -> None:
    before = torch.random.get_rng_state()
    model = _load(stored)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not any(module.training for module in model.net.modules())


def _truncate(folder: Path) -> None:
    path = folder / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:-9])


def _poison(folder: Path) -> None:
    state = load_file(folder / "weights.safetensors")
    state["head.bias"][0] = float("nan")
    save_file(state, folder / "weights.safetensors")


def _halve(folder: Path) -> None:
    state = load_file(folder / "weights.safetensors")
    state["head.bias"] = state["head.bias"].half()
    save_file(state, folder / "weights.safetensors")


def _widen(folder: Path) -> None:
    data = json.loads((folder / "arch.json").read_text())
    (folder / "arch.json").write_text(json.dumps(data | {"options": {"width": 16, "blocks": [1]}}))


def _deepen(folder: Path) -> None:
    data = json.loads((folder / "arch.json").read_text())
    (folder / "arch.json").write_text(json.dumps(data | {"options": {"width": 8, "blocks": [2]}}))


def _misname(folder: Path) -> None:
    data = json.loads((folder / "arch.json").read_text())
    (folder / "arch.json").write_text(json.dumps(data | {"builder": "resnets"}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_truncate, r"weights\.safetensors: expected a safetensors file.*cut short"),
        (_poison, r"head\.bias: expected finite weights"),
        (_halve, r"head\.bias: expected torch\.float32 \(10,\), got torch\.float16"),
        (_widen, r"conv\.weight: expected torch\.float32 \(16, 3, 3, 3\), got torch\.float32 \(8, 3, 3, 3\)"),
        (_deepen, "weights of another architecture; missing"),
        (_misname, 'no method "resnets" in builders; did you mean "resnet"'),
        (lambda folder: (folder / "arch.json").write_text("{"), r"arch\.json: expected the JSON of an architecture"),
        (lambda folder: (folder / "arch.json").write_text("[]"), r"arch\.json: expected the JSON of an architecture"),
        (lambda folder: (folder / "arch.json").unlink(), r"arch\.json: cannot be read"),
        (lambda folder: (folder / "weights.safetensors").unlink(), r"weights\.safetensors: cannot be read"),
    ],
)
def test_damage_is_named(stored: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(stored)
    with pytest.raises(InputError, match=message):
        _load(stored)


def test_a_failed_write_leaves_the_old_file(stored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (stored / "arch.json").read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(Model(arch("mlp"), built(arch("mlp"))), stored)
    assert (stored / "arch.json").read_bytes() == before
    assert sorted(path.name for path in stored.iterdir()) == ["arch.json", "weights.safetensors"]
