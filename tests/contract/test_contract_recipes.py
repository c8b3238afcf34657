"""Every recipe in the folder: finite gradients, nothing left behind, one step helps, resumes to the same weights."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from stages.data.base import Split
from stages.fitting.loop import Row
from stages.fitting.optim import Fit
from stages.method import load, names, type_of
from stages.nn.arch import Arch
from stages.recipes.base import FOLDER, Recipe
from stages.threat import Threat
from stages.train import Config
from stages.tuning import initial, tune

BASE: type[Recipe] = Recipe  # type: ignore[type-abstract]  # only asked for its subclasses
KINDS = names(FOLDER)
NORMS = ("linf", "l2", "l1")


def _recipe(kind: str) -> Recipe:
    return load(FOLDER, BASE, kind)


def _net() -> nn.Module:
    """Batch norm, so that running statistics can be watched."""
    arch = Arch(
        builder="wrn", options={"depths": [1, 1, 1], "widths": [0.5, 0.5, 0.25]}, input_shape=(1, 8, 8), classes=3
    )
    return initial(arch, 7)


def _images(count: int = 24) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(0)
    y = torch.arange(count) % 3
    x = torch.rand(count, 1, 8, 8, generator=rng) * 0.3
    x[torch.arange(count), 0, y * 2, :] += 0.6
    return x, y


def _threat(norm: str = "linf") -> Threat:
    return Threat.load({"norm": norm, "eps": {"linf": 0.05, "l2": 0.3, "l1": 1.0}[norm]})


def _rng(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_folder_holds_the_recipes_of_the_line() -> None:
    assert {"natural", "at", "fast", "trades", "fixed"} <= set(KINDS)


@pytest.mark.parametrize("kind", KINDS)
class TestEveryRecipe:
    def test_it_loads_by_name_dumps_every_default_and_refuses_unknown_keys(self, kind: str) -> None:
        recipe = _recipe(kind)
        assert recipe.dump()["kind"] == kind
        assert set(recipe.dump()) == {"kind", *type(recipe).model_fields}
        assert load(FOLDER, BASE, recipe.dump()) == recipe
        with pytest.raises(ValueError, match="no_such_key"):
            load(FOLDER, BASE, {"kind": kind, "no_such_key": 1})

    def test_its_keys_collide_neither_with_the_loops_nor_with_the_stages(self, kind: str) -> None:
        own = set(type_of(FOLDER, BASE, kind).model_fields)
        assert not own & (set(Fit.model_fields) | set(Config.model_fields) | {"kind"})

    def test_it_is_documented_with_its_formula(self, kind: str) -> None:
        text = type(_recipe(kind)).__doc__
        assert text
        assert "L = " in text or "loss" in text

    @pytest.mark.parametrize("norm", NORMS)
    def test_gradients_are_finite_and_reach_every_parameter(self, kind: str, norm: str) -> None:
        recipe, net = _recipe(kind), _net().train()
        net = recipe.wrap(net).train()
        x, y = _images()
        value, logs = recipe.loss(net, x, y, _threat(norm), _rng(), 0.5)
        value.backward()  # type: ignore[no-untyped-call]
        assert value.dim() == 0
        assert bool(torch.isfinite(value))
        assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in net.parameters())
        assert all(bool(torch.isfinite(torch.as_tensor(log))) for log in logs.values())

    def test_flags_inputs_and_gradients_are_left_alone(self, kind: str) -> None:
        recipe = _recipe(kind)
        net = recipe.wrap(_net()).train()
        frozen_part = next(module for module in net.modules() if isinstance(module, nn.BatchNorm2d)).eval()
        x, y = _images()
        before = x.clone()
        recipe.loss(net, x, y, _threat(), _rng(), 0.0)
        assert torch.equal(x, before)
        assert not x.requires_grad
        assert all(module.training is (module is not frozen_part) for module in net.modules())
        assert all(p.requires_grad and p.grad is None for p in net.parameters())

    def test_the_inner_attack_moves_no_statistics(self, kind: str) -> None:
        # In train mode every forward pass counts in num_batches_tracked; the outer loss makes at most two.
        recipe = _recipe(kind)
        net = recipe.wrap(_net()).train()
        norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
        x, y = _images()
        recipe.loss(net, x, y, _threat(), _rng(), 0.0)
        assert norms
        for norm in norms:
            assert norm.num_batches_tracked is not None
            assert 1 <= int(norm.num_batches_tracked) <= 2
        net.eval()
        before = {name: value.clone() for name, value in net.state_dict().items()}
        recipe.monitor(net, x, y, _threat(), _rng())
        assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())

    def test_the_same_generator_gives_the_same_loss(self, kind: str) -> None:
        recipe = _recipe(kind)
        x, y = _images()
        values = [recipe.loss(recipe.wrap(_net()).train(), x, y, _threat(), _rng(), 0.0)[0] for _ in range(2)]
        assert torch.equal(values[0], values[1])

    def test_one_small_step_lowers_the_loss(self, kind: str) -> None:
        # Without batch norm: its statistics move between the two calls, and the attack sees them.
        recipe = _recipe(kind)
        plain = Arch(builder="small_cnn", options={"width": 8, "hidden": 16}, input_shape=(1, 8, 8), classes=3)
        net = recipe.wrap(initial(plain, 7)).train()
        x, y = _images()
        before, _ = recipe.loss(net, x, y, _threat(), _rng(), 0.0)
        before.backward()  # type: ignore[no-untyped-call]
        torch.optim.SGD(net.parameters(), lr=0.01).step()
        after, _ = recipe.loss(net, x, y, _threat(), _rng(), 0.0)
        assert float(after.detach()) < float(before.detach())

    def test_interrupted_training_ends_in_the_same_weights_and_rows(self, kind: str, tmp_path: Path) -> None:
        class Stop(Exception):
            pass

        def train(scratch: Path | None, stop: int | None) -> tuple[Mapping[str, Tensor], list[Row]]:
            def on_step(done: int, total: int) -> None:
                if done == stop:
                    raise Stop

            x, y = _images(48)
            split = Split((x * 255).to(torch.uint8), y, torch.arange(48))
            rows: list[Row] = []
            config = Fit(epochs=2, batch=16, lr=0.02, checkpoint_seconds=0)
            net = tune(_net(), _recipe(kind), config, split, _threat(), 5, scratch, on_step, on_row=rows.append)
            return net.state_dict(), rows

        whole, rows = train(None, None)
        for stop in (2, 4):
            with pytest.raises(Stop):
                train(tmp_path, stop)
        again, rows_again = train(tmp_path, None)
        assert all(torch.equal(value, whole[name]) for name, value in again.items())
        assert rows_again == rows
