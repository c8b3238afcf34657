"""STAGE 3: compress the network, tuning it anew under the recipe that trained it."""

import copy
import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from pydantic import Field, ValidationError
from torch import Tensor, nn

from pipeline.core.canonical import canonical
from pipeline.core.measurement import exact
from pipeline.core.stage import Context, Files, Result
from stages.attacks.base import AnyAttack
from stages.attacks.pgd import PGD
from stages.compressors._account import Layer, account
from stages.compressors.base import FOLDER, AnyCompressor, Bench, Compressor
from stages.compressors.fixed import Fixed
from stages.evaluate import correct, frozen, under_attack
from stages.fitting.optim import Fit
from stages.measure import accuracy
from stages.method import InputError, Value, load
from stages.nn import _atomic, checkpoint
from stages.nn.arch import Model
from stages.nn.cost import cost
from stages.nn.layers.gdws_conv import GDWSConv, folded
from stages.recipes.base import FOLDER as RECIPES
from stages.recipes.base import Recipe
from stages.section import Section
from stages.seeding import derive, deterministic, generator
from stages.task import Splits, Task
from stages.threat import Threat
from stages.tuning import sample, tune

LIBRARIES = ("torch", "torch-pruning", "numpy", "safetensors", "pydantic")
# Named in recipe.json, which is an input and no config.
READS = (RECIPES,)


class Calibration(Value):
    """The training images on which a compressor measures: `batches` of `batch`, attacked anew for every network."""

    batches: int = Field(default=8, ge=1)
    batch: int = Field(default=128, ge=1)
    attack: AnyAttack = PGD(steps=10, loss="margin")


class Config(Section):
    """`[stages.compress]`: `kind` names the compressor; its settings and these lie side by side.

    Every tuning takes `tune_epochs` epochs under the training's recipe and loop settings, at `tune_lr` (None: a fifth
    of the training's). `holdout_attack` and `holdout_samples` measure as in train; the test split is not read.
    """

    METHOD = ("compressor", FOLDER, Compressor)

    compressor: AnyCompressor = Fixed()
    tune_epochs: int = Field(default=10, ge=0)
    tune_lr: float | None = Field(default=None, gt=0)
    calibration: Calibration = Calibration()
    holdout_attack: AnyAttack = PGD(steps=10, loss="margin")
    holdout_samples: int | None = Field(default=1000, ge=1)


def measures(config: Config, task: Mapping[str, Any]) -> frozenset[str]:
    """The same metrics for every config."""
    del config, task
    return frozenset({"accuracy.clean.holdout", "accuracy.robust.holdout", "cost.params", "cost.macs", "size.weights"})


def run(files: Files, config: Config, ctx: Context) -> Result:
    """Passes every file on, the architecture and the weights compressed, and adds `compression.json`.

    Where the compressor changes nothing, architecture and weights keep their digests. Raises `InputError` for a recipe
    or a model that cannot be read, or settings that this network cannot meet.
    """
    task = Task.load(ctx.task)
    splits = task.open(ctx.data_root)
    before = checkpoint.load(files[checkpoint.ARCH], files[checkpoint.WEIGHTS])
    before.net.to(ctx.device)
    work = _Work(files, splits, task.threat, config, ctx)
    bench = Bench(work.tune, work.adversarial, lambda text: ctx.emit("note", {"text": text}))
    with torch.random.fork_rng(devices=[]):
        deterministic(derive(ctx.seed, "compress"))
        after = config.compressor.compress(before, bench, generator(ctx.seed, "compress"))
    out = ctx.scratch / "out"
    out.mkdir(parents=True, exist_ok=True)
    found = dict(files)
    if after is not before:
        checkpoint.save(after, out)
        found |= {name: out / name for name in (checkpoint.ARCH, checkpoint.WEIGHTS)}
    _atomic.write(out / "compression.json", canonical(_story(config, before, work.untuned or after, after)))
    found["compression.json"] = out / "compression.json"
    holdout = sample(splits.holdout, config.holdout_samples)
    net, x, y = after.net.to(ctx.device).eval(), holdout.images.to(ctx.device), holdout.labels.to(ctx.device)
    clean, clean_bits = accuracy("accuracy.clean.holdout", correct(net, x, y), holdout.indices)
    with frozen(net):
        survived, _ = under_attack(
            net, config.holdout_attack, x, y, task.threat, derive(ctx.seed, "holdout"), on_step=_progress(ctx, "attack")
        )
    robust, robust_bits = accuracy("accuracy.robust.holdout", survived, holdout.indices)
    spent = cost(net.cpu(), after.arch.input_shape)
    return Result(
        files=found,
        measurements=(
            clean,
            robust,
            exact("cost.params", spent.params, "count"),
            exact("cost.macs", spent.macs, "count"),
            exact("size.weights", found[checkpoint.WEIGHTS].stat().st_size, "bytes"),
        ),
        outcomes={**clean_bits, **robust_bits},
    )


class _Work:
    """What the compressor's closures need: the recipe, the data, and a number for every tuning."""

    def __init__(self, files: Files, splits: Splits, threat: Threat, config: Config, ctx: Context) -> None:
        self.files, self.splits, self.threat, self.config, self.ctx = files, splits, threat, config, ctx
        self.tunings = 0
        self.untuned: Model | None = None

    def tune(self, model: Model) -> Model:
        """Fine-tune a copy. A finished tuning is kept in scratch and found again after an interruption."""
        self.tunings += 1
        self.untuned = model
        if self.config.tune_epochs == 0:
            return model
        recipe, fit = _recipe(self.files, self.config)
        net = tune(
            copy.deepcopy(model.net).to(self.ctx.device),
            recipe,
            fit,
            self.splits.train,
            self.threat,
            derive(self.ctx.seed, "tune", self.tunings),
            self.ctx.scratch / f"tune{self.tunings}",
            _progress(self.ctx, f"tune {self.tunings}"),
        )
        return Model(model.arch, net)

    def adversarial(self, net: nn.Module) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Batches (x, x_adv, y) of the same training images for every network, x_adv found on this one.

        Every example is perturbed, also where the attack does not succeed: saliency lives where the loss is high, not
        only where the answer turns wrong.
        """
        how, train = self.config.calibration, self.splits.train
        order = torch.randperm(len(train), generator=generator(self.ctx.seed, "calibration"))
        for number in range(min(how.batches, -(-len(train) // how.batch))):
            rows = order[number * how.batch : (number + 1) * how.batch]
            x, y = train.floats(rows).to(self.ctx.device), train.labels[rows].to(self.ctx.device)
            rng = generator(self.ctx.seed, "calibration", number, device=self.ctx.device)
            with frozen(net), torch.enable_grad():
                found = how.attack.perturb(net, x, y, self.threat, rng)
            yield x, self.threat.project(found.detach(), x), y
            _progress(self.ctx, "calibration")(number + 1, how.batches)


def _recipe(files: Files, config: Config) -> tuple[Recipe, Fit]:
    try:
        text = json.loads(files["recipe.json"].read_text(encoding="utf-8"))
        recipe = load(RECIPES, Recipe, text["recipe"])  # type: ignore[type-abstract]
        trained = Fit.load(text["fit"])
    except (OSError, ValueError, KeyError, TypeError, ValidationError) as error:
        raise InputError(
            f"recipe.json: expected the recipe and loop settings that train writes, got: {error}"
        ) from error
    rate = config.tune_lr if config.tune_lr is not None else trained.lr / 5
    return recipe, Fit.load({**trained.dump(), "epochs": config.tune_epochs, "lr": rate})


def _story(config: Config, before: Model, untuned: Model, after: Model) -> dict[str, Any]:
    """What became of every layer: channels, costs, chosen kernels, and the error before tuning."""
    shape = before.arch.input_shape
    old, new = account(before.net, shape), account(after.net, shape)
    return {
        "kind": config.compressor.kind,
        "settings": config.compressor.dump(),
        "before": cost(before.net, shape).dump(),
        "after": cost(after.net, shape).dump(),
        "layers": [
            {
                "path": path,
                "before": _numbers(old[path]),
                "after": _numbers(new[path]),
                **_replaced(before.net.get_submodule(path), untuned.net.get_submodule(path)),
            }
            for path in old
        ],
    }


def _numbers(layer: Layer) -> dict[str, int]:
    return {"inputs": layer.inputs, "outputs": layer.outputs, "macs": layer.macs, "params": layer.params}


def _replaced(old: nn.Module, new: nn.Module) -> dict[str, Any]:
    """For a layer that became GDWS: kernels per input channel, and ||W - Q||_F / ||W||_F before tuning."""
    if not isinstance(new, GDWSConv) or not isinstance(old, nn.Conv2d):
        return {}
    kernels = torch.bincount(new.channels.cpu(), minlength=new.in_channels).tolist()
    weight, folded_weight = old.weight.detach().double().cpu(), folded(new).weight.detach().double().cpu()
    left = float((weight - folded_weight).norm() / weight.norm().clamp(min=1e-300))
    return {"kernels": kernels, "error": left}


def _progress(ctx: Context, label: str) -> Any:
    return lambda done, total: ctx.emit("progress", {"label": label, "done": done, "total": total})
