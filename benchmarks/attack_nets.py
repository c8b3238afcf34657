"""Three networks of one architecture on MNIST, plainly, adversarially and certifiably trained, for attack benchmarks.

    TEMPER_DATA=../shared/data OMP_NUM_THREADS=1 python -m benchmarks.attack_nets

Trained once, then read from runs/benchmarks/nets. The architecture is the small network of Wong and Kolter 2018.
"""

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stages.fitting.loop import Loss, fit
from stages.fitting.optim import Fit
from stages.nn import checkpoint
from stages.nn.arch import Arch, Model
from stages.recipes.at import AdversarialTraining
from stages.recipes.natural import Natural
from stages.task import Splits, Task
from stages.threat import Threat
from stages.tuning import initial

THREAT = Threat(norm="linf", eps=0.2)
FOLDER = Path("runs/benchmarks/nets")
ARCH = Arch(builder="small_cnn", options={"width": 16, "hidden": 100}, input_shape=(1, 28, 28), classes=10)
NAMES = ("plain", "adversarial", "certified")
_TRAIN = 20_000
_EPOCHS = {"plain": 4, "adversarial": 10, "certified": 25}


def main() -> None:
    torch.set_num_threads(1)
    for name in NAMES:
        net(name)


def data() -> Splits:
    """MNIST under the folder that TEMPER_DATA names."""
    root = Path(os.environ.get("TEMPER_DATA", "../shared/data"))
    return Task.load({"data": {"kind": "mnist"}, "threat": THREAT.dump()}).open(root)


def net(name: str) -> nn.Module:
    """One of `NAMES`, trained where it is not stored yet."""
    folder = FOLDER / name
    if not (folder / checkpoint.WEIGHTS).is_file():
        split = data().train
        settings = {"epochs": _EPOCHS[name], "batch": 100, "optimiser": "adam", "lr": 1e-3, "weight_decay": 0.0}
        config = Fit.load({**settings, "precision": "fp32"})
        made = fit(initial(ARCH, 0), split.images[:_TRAIN], split.labels[:_TRAIN], _loss(name), config, 0)
        folder.mkdir(parents=True, exist_ok=True)
        checkpoint.save(Model(ARCH, made), folder)
    return checkpoint.load(folder / checkpoint.ARCH, folder / checkpoint.WEIGHTS).net.eval()


def _loss(name: str) -> Loss:
    if name == "certified":
        return interval_loss(THREAT.eps)
    recipe = Natural() if name == "plain" else AdversarialTraining(steps=7, step=0.3, ramp=0.4)
    return lambda net, x, y, rng, progress: recipe.loss(net, x, y, THREAT, rng, progress)


def interval_loss(final: float) -> Loss:
    """k CE(f(x), y) + (1 - k) CE(worst logits of the box, y); eps grows to `final`, k falls from 1 to 1/2 over 60 %.

    Source: Gowal et al. 2018, equations 4 and 12; for sequences of affine layers and ReLU whose normalisation is none.
    """
    return lambda net, x, y, _, progress: _interval_loss(net, x, y, final, min(progress / 0.6, 1.0))


def _interval_loss(
    net: nn.Module, x: Tensor, y: Tensor, final: float, share: float
) -> tuple[Tensor, Mapping[str, Tensor]]:
    eps = final * share
    low, high = (x - eps).clamp(min=0), (x + eps).clamp(max=1)
    middle, radius = (low + high) / 2, (high - low) / 2
    for layer in net:  # type: ignore[attr-defined]
        if isinstance(layer, nn.Conv2d):
            middle = layer(middle)
            radius = F.conv2d(radius, layer.weight.abs(), None, layer.stride, layer.padding)
        elif isinstance(layer, nn.Linear):
            middle, radius = layer(middle), radius @ layer.weight.abs().T
        elif isinstance(layer, nn.ReLU):
            low, high = F.relu(middle - radius), F.relu(middle + radius)
            middle, radius = (low + high) / 2, (high - low) / 2
        else:
            middle, radius = layer(middle), layer(radius)
    own = F.one_hot(y, middle.shape[1]).bool()
    worst = torch.where(own, middle - radius, middle + radius)
    clean = F.cross_entropy(net(x), y)
    proved = (worst.argmax(1) == y).float().mean()
    keep = 1 - share / 2
    return keep * clean + (1 - keep) * F.cross_entropy(worst, y), {"accuracy.certified": proved.detach()}


if __name__ == "__main__":
    main()
