"""STAGE 2: train the network robustly."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, model_validator
from torch import Tensor, nn

from pipeline.core.canonical import canonical
from pipeline.core.measurement import exact
from pipeline.core.stage import Context, Files, Result
from stages.attacks.base import AnyAttack
from stages.attacks.pgd import PGD
from stages.data._cut import cut
from stages.data.base import Split
from stages.evaluate import correct, frozen, under_attack
from stages.fitting.loop import Row
from stages.fitting.optim import Fit
from stages.measure import accuracy
from stages.method import InputError
from stages.nn import _atomic, checkpoint
from stages.nn.arch import Arch, Model
from stages.nn.cost import cost
from stages.recipes.at import AdversarialTraining
from stages.recipes.base import FOLDER, AnyRecipe, Recipe
from stages.recipes.fixed import Fixed
from stages.section import Section
from stages.seeding import derive, generator
from stages.task import Task
from stages.threat import Threat
from stages.tuning import fallen, initial, sample, tune

LIBRARIES = ("torch", "numpy", "safetensors", "pydantic")


class Config(Section):
    """`[stages.train]`: `kind` names the recipe; its settings, the loop's and these lie side by side.

    `holdout_attack` measures robust accuracy on `holdout_samples` held-out images (None: on all). `keep = "best"` asks
    the same attack every `keep_epochs` epochs and keeps the best weights instead of the last, against robust
    overfitting. It asks on `keep_share` of the training images, which are then not trained on (stratified, groups
    together): the hold-out, on which the result is reported, chooses nothing here. The test split is not read.
    """

    METHOD = ("recipe", FOLDER, Recipe)
    FLAT = ("fit",)

    recipe: AnyRecipe = AdversarialTraining()
    fit: Fit = Fit()
    holdout_attack: AnyAttack = PGD(steps=10, loss="margin")
    holdout_samples: int | None = Field(default=1000, ge=1)
    keep: Literal["last", "best"] = "last"
    keep_epochs: int = Field(default=1, ge=1)
    keep_share: float = Field(default=0.1, gt=0, lt=1)

    @model_validator(mode="after")
    def _given(self) -> Self:
        if isinstance(self.recipe, Fixed) and not (self.recipe.weights and self.recipe.sha256):
            raise ValueError(
                'kind "fixed" keeps given weights: expected weights = "FILE.safetensors", a path below the data root, '
                "and sha256 = the 64 digits that `sha256sum FILE.safetensors` prints"
            )
        return self


def measures(config: Config, task: Mapping[str, Any]) -> frozenset[str]:
    """The same metrics for every config."""
    del config, task
    return frozenset({"accuracy.clean.holdout", "accuracy.robust.holdout", "cost.params", "cost.macs", "size.weights"})


def run(files: Files, config: Config, ctx: Context) -> Result:
    """Writes `arch.json`, `weights.safetensors`, `recipe.json` (what compress tunes under) and `training.json`.

    Raises `InputError` for given weights that are missing, changed or of another architecture.
    """
    task = Task.load(ctx.task)
    splits = task.open(ctx.data_root)
    holdout = sample(splits.holdout, config.holdout_samples)
    rows: list[Row] = []
    if isinstance(config.recipe, Fixed):
        model = _given(config.recipe, files["arch.json"], ctx.data_root)
    else:
        model = _trained(_arch(files["arch.json"]), splits.train, task.threat, config, ctx, rows)
    out = ctx.scratch / "out"
    out.mkdir(parents=True, exist_ok=True)
    checkpoint.save(model, out)
    _atomic.write(out / "recipe.json", canonical({"recipe": config.recipe.dump(), "fit": config.fit.dump()}))
    _atomic.write(out / "training.json", canonical(rows))
    net = model.net.to(ctx.device)
    x, y = holdout.images.to(ctx.device), holdout.labels.to(ctx.device)
    hits = correct(net, x, y)
    if (text := _stuck(hits, y)) is not None:
        ctx.emit("note", {"text": text})
    clean, clean_bits = accuracy("accuracy.clean.holdout", hits, holdout.indices)
    with frozen(net):
        survived, _ = under_attack(
            net, config.holdout_attack, x, y, task.threat, derive(ctx.seed, "holdout"), on_step=_progress(ctx, "attack")
        )
    robust, robust_bits = accuracy("accuracy.robust.holdout", survived, holdout.indices)
    found = cost(net.cpu(), model.arch.input_shape)
    return Result(
        files={name: out / name for name in (checkpoint.ARCH, checkpoint.WEIGHTS, "recipe.json", "training.json")},
        measurements=(
            clean,
            robust,
            exact("cost.params", found.params, "count"),
            exact("cost.macs", found.macs, "count"),
            exact("size.weights", (out / checkpoint.WEIGHTS).stat().st_size, "bytes"),
        ),
        outcomes={**clean_bits, **robust_bits},
    )


def _trained(arch: Arch, split: Split, threat: Threat, config: Config, ctx: Context, rows: list[Row]) -> Model:
    trained, judge = divided(split, config, ctx.seed) if config.keep == "best" else (split, split)
    x, y = judge.images.to(ctx.device), judge.labels.to(ctx.device)

    def score(net: nn.Module) -> float:
        with frozen(net):
            survived, _ = under_attack(net, config.holdout_attack, x, y, threat, derive(ctx.seed, "keep"))
        return float(survived.double().mean())

    net = tune(
        initial(arch, ctx.seed).to(ctx.device),
        config.recipe,
        config.fit,
        trained,
        threat,
        ctx.seed,
        ctx.scratch / "fit",
        _progress(ctx, "train"),
        score=score if config.keep == "best" else None,
        score_epochs=config.keep_epochs,
        on_row=rows.append,
    )
    warning = fallen(rows)
    if warning is not None:
        ctx.emit("note", {"text": warning})
    return Model(arch, net)


def divided(split: Split, config: Config, seed: int) -> tuple[Split, Split]:
    """What is trained on, and the images (at most `holdout_samples`) that choose the best weights; disjoint."""
    stays, held = cut(split.labels, split.groups, config.keep_share, generator(seed, "keep"))
    if len(held) == 0:
        raise InputError('train.keep: "best" needs a class with two training images (or groups) to divide; use "last"')
    return split.select(stays), sample(split.select(held), config.holdout_samples)


def _stuck(hits: Tensor, y: Tensor) -> str | None:
    commonest = int(y.bincount().max())
    if int(hits.sum()) > commonest:
        return None
    return (
        f"the trained network is right on {int(hits.sum())} of {len(y)} held-out images, no more than always answering "
        "the commonest class; train longer, lower lr, or let eps grow slowly (ramp = 0.5)"
    )


def _given(recipe: Fixed, arch: Path, root: Path) -> Model:
    """The model with weights from the user's file. Its digest is checked, because the cache key knows it by that."""
    if PurePosixPath(recipe.weights).is_absolute():
        raise InputError(f'train.weights: expected a path below the data root {root}, got "{recipe.weights}"')
    path = root / recipe.weights
    try:
        found = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise InputError(f"train.weights: {path}: cannot be read: {error.strerror}") from None
    if found != recipe.sha256:
        raise InputError(f"train.weights: {path}: expected SHA-256 {recipe.sha256}, got {found}; is it another file?")
    return checkpoint.load(arch, path)


def _arch(path: Path) -> Arch:
    try:
        return Arch.load(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, ValidationError) as error:
        raise InputError(f"arch.json: expected the JSON of an architecture, got: {error}") from error


def _progress(ctx: Context, label: str) -> Any:
    return lambda done, total: ctx.emit("progress", {"label": label, "done": done, "total": total})
