"""Training a network under a recipe on a split; shared by train, by search's scores and by compress's fine-tuning."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Generator, Tensor, nn

from stages.data.base import Split, to_float
from stages.fitting.loop import OnStep, Row, fit
from stages.fitting.optim import Fit
from stages.nn.arch import Arch
from stages.recipes.base import Recipe
from stages.seeding import derive, deterministic, generator
from stages.threat import Threat

MONITORED = 256
FALL = 0.2
MONITOR_STEPS = 200


def initial(arch: Arch, seed: int) -> nn.Module:
    """A freshly initialised network, the same for the same seed; the global random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        deterministic(derive(seed, "weights"))
        return arch.build()


def sample(split: Split, count: int | None) -> Split:
    """`count` images of a split in file order, or all; the same ones for every stage, so that outcomes pair up."""
    if count is None or count >= len(split):
        return split
    return split.select(torch.randperm(len(split), generator=generator(0, "sample"))[:count].sort().values)


def fallen(rows: Sequence[Row]) -> str | None:
    """A sentence where a monitored accuracy fell by more than 0.2 from its height, as in catastrophic overfitting.

    Not the accuracy on training batches: that one falls by design while eps is ramped up.
    """
    names = {key for row in rows for key in row if key.startswith("accuracy.")} - {"accuracy.train"}
    for name in sorted(names):
        height = -1.0
        for row in rows:
            value = row.get(name, height)
            if value < height - FALL:
                return (
                    f"{name} fell from {height:.2f} to {value:.2f} by epoch {row['epoch']:.0f}: training may have "
                    'collapsed (catastrophic overfitting); use more attack steps, a lower lr, or keep = "best"'
                )
            height = max(height, value)
    return None


def tune(
    net: nn.Module,
    recipe: Recipe,
    config: Fit,
    split: Split,
    threat: Threat,
    seed: int,
    scratch: Path | None = None,
    on_step: OnStep | None = None,
    *,
    score: Callable[[nn.Module], float] | None = None,
    score_epochs: int = 1,
    on_row: Callable[[Row], None] | None = None,
) -> nn.Module:
    """Train `net` (in place, unless the recipe wraps it) and return it in eval mode; resumes from `scratch`.

    `on_row` gets one row of numbers per epoch, with those of `recipe.monitor` on up to 256 training images about every
    200 steps and at the end. With `score`, asked every `score_epochs` epochs and at the end, the weights of the best
    score are kept instead of the last; it must not look at the test split. Raises as `stages.fitting.loop.fit`.
    """
    x, y = split.images, split.labels
    if type(recipe).curate is not Recipe.curate:
        x, y = recipe.curate(to_float(x), y, threat, generator(seed, "curate"))
    watched = torch.randperm(len(split), generator=generator(seed, "monitor"))[:MONITORED]
    x_watched, y_watched = split.floats(watched), split.labels[watched]

    def loss(
        net: nn.Module, x: Tensor, y: Tensor, rng: Generator, progress: float
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        return recipe.loss(net, x, y, threat, rng, progress)

    def after_epoch(net: nn.Module, step: int, total: int) -> tuple[Mapping[str, float], float | None]:
        per_epoch = total // config.epochs
        device = next(net.parameters()).device
        numbers: dict[str, float] = {}
        if step == total or step // MONITOR_STEPS > (step - per_epoch) // MONITOR_STEPS:
            rng = generator(seed, "monitor", step, device=device)
            numbers |= recipe.monitor(net, x_watched.to(device), y_watched.to(device), threat, rng)
        if score is None or (step != total and step // per_epoch % score_epochs != 0):
            return numbers, None
        found = score(net)
        return {**numbers, "score": found}, found

    return fit(recipe.wrap(net), x, y, loss, config, seed, scratch, on_step, after_epoch=after_epoch, on_row=on_row)
