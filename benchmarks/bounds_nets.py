"""The networks of `benchmarks.bounds`, trained for a minute or two where they are not in runs/benchmarks/bounds."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from benchmarks import attack_nets
from stages.bounds.base import Box, lead_rows
from stages.bounds.ibp import IBP
from stages.data.base import to_float
from stages.fitting.loop import Loss, fit
from stages.fitting.optim import Fit
from stages.nn.arch import Arch
from stages.nn.fold import fold
from stages.recipes.natural import Natural
from stages.seeding import derive
from stages.task import Splits, Task
from stages.threat import Threat
from stages.tuning import initial

FOLDER = Path("runs/benchmarks/bounds")
_TRAIN = 10_000
_PLAIN = Threat(norm="linf", eps=0.25 / 255)
_PROVED = Threat(norm="linf", eps=2 / 255)


@dataclass(frozen=True, slots=True)
class Case:
    """A trained network, test images [N, C, H, W] in [0, 1] with labels, and the threat that it is asked about."""

    net: nn.Module
    x: Tensor
    y: Tensor
    threat: Threat


class Block(nn.Module):
    """relu(conv(relu(conv(x))) + conv1x1(x)), both convolutions 3x3, the first and the shortcut with the stride."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv2(F.relu(self.conv1(x))) + self.shortcut(x))


def residual() -> nn.Module:
    """Three blocks without batch normalisation, 16, 32 and 32 channels at a half, a quarter and a quarter of 32x32."""
    return nn.Sequential(Block(3, 16, 2), Block(16, 32, 2), Block(32, 32, 1), nn.Flatten(), nn.Linear(2048, 10))


def case(name: str) -> Case:
    """ "mnist certified", "mnist plain", "cifar10 residual" or "cifar10 wrn-10-1"; the last with what can be folded."""
    if name.startswith("mnist"):
        split = attack_nets.data().test
        made = attack_nets.net(name.split()[1]).requires_grad_(False)
        return Case(made, to_float(split.images[:256]), split.labels[:256], Threat(norm="linf", eps=0.1))
    proved = name == "cifar10 residual"
    splits = data()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(0, "weights"))
        start = residual() if proved else initial(Arch(builder="wrn", input_shape=(3, 32, 32), classes=10), 0)
    made = _trained(name, start, _interval_loss if proved else _natural_loss, splits)
    if not proved:
        made = fold(made)
    x, y = to_float(splits.test.images[:256]), splits.test.labels[:256]
    return Case(made.eval().requires_grad_(False), x, y, _PROVED if proved else _PLAIN)


def data() -> Splits:
    """CIFAR-10 under the folder that TEMPER_DATA names."""
    root = Path(os.environ.get("TEMPER_DATA", "../shared/data"))
    return Task.load({"data": {"kind": "cifar10"}, "threat": _PROVED.dump()}).open(root)


def _trained(name: str, net: nn.Module, loss: Loss, splits: Splits) -> nn.Module:
    path = FOLDER / f"{name.replace(' ', '_')}.safetensors"
    if path.is_file():
        net.load_state_dict(load_file(path))
        return net.eval()
    settings = {"epochs": 4, "batch": 100, "optimiser": "adam", "lr": 1e-3, "weight_decay": 0.0, "precision": "fp32"}
    train = splits.train
    made = fit(net, train.images[:_TRAIN], train.labels[:_TRAIN], loss, Fit.load(settings), 0)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: value.contiguous() for key, value in made.state_dict().items()}, path)
    return made


def _natural_loss(
    net: nn.Module, x: Tensor, y: Tensor, rng: Generator, progress: float
) -> tuple[Tensor, Mapping[str, Tensor]]:
    return Natural().loss(net, x, y, _PLAIN, rng, progress)


def _interval_loss(
    net: nn.Module, x: Tensor, y: Tensor, rng: Generator, progress: float
) -> tuple[Tensor, Mapping[str, Tensor]]:
    """k CE(f(x)) + (1 - k) CE(worst leads); eps grows and k falls from 1 to 1/2 over 60 % (Gowal et al. 2018)."""
    del rng
    share = min(progress / 0.6, 1.0)
    clean = F.cross_entropy(net(x), y)
    around = Box.around(x, Threat(norm="linf", eps=_PROVED.eps * max(share, 1e-3)))
    leads = IBP().lower(net, around, lead_rows(net, x, y))
    worst = F.cross_entropy(torch.cat([torch.zeros_like(leads[:, :1]), -leads], 1), torch.zeros_like(y))
    keep = 1 - share / 2
    return keep * clean + (1 - keep) * worst, {"accuracy.certified": (leads > 0).all(1).float().mean().detach()}
