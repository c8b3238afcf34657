"""STAGE 1: choose an architecture."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from pipeline.core.canonical import canonical, digest
from pipeline.core.gate import Budget
from pipeline.core.measurement import exact
from pipeline.core.record import Outcomes
from pipeline.core.stage import Context, Files, Result
from stages.attacks.base import AnyAttack
from stages.attacks.pgd import PGD
from stages.data.base import Split
from stages.evaluate import frozen, under_attack
from stages.fitting import resume
from stages.fitting.loop import Diverged
from stages.fitting.optim import Fit
from stages.measure import accuracy
from stages.method import InputError, type_of
from stages.nn import _atomic
from stages.nn.arch import Arch
from stages.nn.cost import cost
from stages.recipes.base import AnyRecipe
from stages.recipes.fast import NoisyFGSM
from stages.searchers.base import FOLDER, AnySearcher, Bench, Searcher
from stages.searchers.fixed import Fixed
from stages.section import Section
from stages.seeding import derive, generator
from stages.task import Splits, Task, statistics
from stages.threat import Threat
from stages.tuning import initial, sample, tune

LIBRARIES = ("torch", "numpy", "safetensors", "pydantic")

_CAPS = {"cost.macs": "max_macs", "cost.params": "max_params"}
PROXY = "accuracy.robust.proxy.holdout"


class Score(Section):
    """How a candidate is scored: trained shortly on `samples` images, then attacked on `holdout_samples` held-out ones.

    The score is the share that stays right; a candidate whose training diverges scores 0. Keys of the loop (`epochs`,
    `lr`, ...) lie beside these. All candidates see the same images in the same order.
    """

    FLAT = ("fit",)

    recipe: AnyRecipe = NoisyFGSM()
    fit: Fit = Fit(epochs=4, lr=0.05, schedule="onecycle")
    samples: int | None = Field(default=4000, ge=2)
    attack: AnyAttack = PGD(steps=10, loss="margin")
    holdout_samples: int | None = Field(default=500, ge=1)


class Config(Section):
    """`[stages.search]`: `kind` names the searcher, its settings lie beside it."""

    METHOD = ("searcher", FOLDER, Searcher)

    searcher: AnySearcher = Fixed()
    score: Score = Score()


def measures(config: Config, task: Mapping[str, Any]) -> frozenset[str]:
    """The winner's costs, and its score unless there was nothing to score."""
    del task
    return frozenset({"cost.params", "cost.macs"} | (set() if config.searcher.kind == "fixed" else {PROXY}))


def obeying(table: Mapping[str, Any], limits: Budget) -> Mapping[str, Any]:
    """Upper limits on cost in search's budget (the target's, say) cap the candidates; the section's own cap wins."""
    try:
        kind = type_of(FOLDER, Searcher, table.get("kind", "fixed"))  # type: ignore[type-abstract]
    except InputError:
        return table  # parsing the section says what is wrong with its kind
    caps = {limit.metric: limit.at_most for limit in limits if limit.at_most is not None}
    known = {field: caps[metric] for metric, field in _CAPS.items() if metric in caps and field in kind.model_fields}
    return {**known, **table}


def run(files: Files, config: Config, ctx: Context) -> Result:
    """Writes `arch.json`, and with candidates `search.json`, a list of {arch, score, macs, params} in drawn order."""
    del files
    task = Task.load(ctx.task)
    trials = _Trials(task.open(ctx.data_root), task.threat, config.score, ctx)
    bench = Bench(trials.arch, trials.score, trials.cost, lambda text: ctx.emit("note", {"text": text}))
    arch = config.searcher.search(bench, generator(ctx.seed, "search"))
    out = ctx.scratch / "out"
    out.mkdir(parents=True, exist_ok=True)
    _atomic.write(out / "arch.json", canonical(arch.dump()))
    found = trials.cost(arch)
    result: dict[str, Path] = {"arch.json": out / "arch.json"}
    measured = [exact("cost.params", found["params"], "count"), exact("cost.macs", found["macs"], "count")]
    outcomes: Mapping[str, Outcomes] = {}
    if PROXY in measures(config, ctx.task):
        # A searcher may return what it never scored; the number belongs to the network that goes on.
        trials.score(arch)
        number, outcomes = accuracy(PROXY, trials.hits[digest(arch.dump())], trials.holdout.indices)
        measured.append(number)
        _atomic.write(out / "search.json", canonical(list(trials.rows.values())))
        result["search.json"] = out / "search.json"
    return Result(files=result, measurements=tuple(measured), outcomes=outcomes)


class _Trials:
    """Candidates: completed from the task, costed, and scored once each; scores outlive an interruption."""

    def __init__(self, splits: Splits, threat: Threat, how: Score, ctx: Context) -> None:
        self.splits, self.threat, self.how, self.ctx = splits, threat, how, ctx
        self.mean, self.std = statistics(splits.train)
        self.train: Split = sample(splits.train, how.samples)
        self.holdout: Split = sample(splits.holdout, how.holdout_samples)
        self.rows: dict[str, dict[str, Any]] = {}
        self.hits: dict[str, Tensor] = {}

    def arch(self, builder: str, options: Mapping[str, object]) -> Arch:
        return Arch(
            builder=builder,
            options=dict(options),
            input_shape=self.splits.input_shape,
            classes=len(self.splits.classes),
            mean=self.mean,
            std=self.std,
        )

    def cost(self, arch: Arch) -> Mapping[str, float]:
        return cost(initial(arch, 0), arch.input_shape).dump()

    def score(self, arch: Arch) -> float:
        name = digest(arch.dump())
        kept = self.ctx.scratch / "candidates" / f"{name}.json"
        if name not in self.hits:
            if not kept.is_file():
                hits = self._trained(arch, kept.with_suffix(""))
                _atomic.write(kept, canonical([bool(hit) for hit in hits.tolist()]))
                resume.clear(kept.with_suffix(""))
            self.hits[name] = torch.tensor(json.loads(kept.read_text(encoding="utf-8")), dtype=torch.bool)
            costs = self.cost(arch)
            score = float(self.hits[name].double().mean())
            self.rows[name] = {"arch": arch.dump(), "score": score, "macs": costs["macs"], "params": costs["params"]}
        return float(self.rows[name]["score"])

    def _trained(self, arch: Arch, scratch: Path) -> Tensor:
        scratch.mkdir(parents=True, exist_ok=True)
        seed = derive(self.ctx.seed, "score")
        label = f"candidate {len(self.rows) + 1}"
        net = initial(arch, seed).to(self.ctx.device)
        try:
            net = tune(
                net,
                self.how.recipe,
                self.how.fit,
                self.train,
                self.threat,
                seed,
                scratch,
                lambda done, total: self.ctx.emit("progress", {"label": label, "done": done, "total": total}),
            )
        except Diverged as error:
            self.ctx.emit("note", {"text": f"{label}: {error}; it scores 0"})
            return torch.zeros(len(self.holdout), dtype=torch.bool)
        x, y = self.holdout.images.to(self.ctx.device), self.holdout.labels.to(self.ctx.device)
        with frozen(net):
            hits, _ = under_attack(net, self.how.attack, x, y, self.threat, derive(seed, "attack"))
        return hits.cpu()
