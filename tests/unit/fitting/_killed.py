"""Run by the tests as a program of its own: trains, reports every step, and is killed from outside."""

import sys
import time
from pathlib import Path

import torch
from torch import nn

from stages.fitting.loop import fit
from stages.fitting.optim import Fit
from stages.recipes.at import AdversarialTraining
from stages.threat import Threat


def network(seed: int = 3) -> nn.Module:
    """Batch norm, so that running statistics are part of what must come back."""
    net = nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3), nn.Flatten(), nn.Linear(8 * 16, 3)
    )
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(1.0 * (parameter.dim() == 1) + 0.1 * torch.randn(parameter.shape, generator=rng))
    return net


def images() -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(1)
    x = torch.randint(0, 256, (90, 1, 8, 8), generator=rng, dtype=torch.uint8)
    return x, torch.randint(0, 3, (90,), generator=rng)


def config(**changes: object) -> Fit:
    return Fit.load({"epochs": 3, "batch": 16, "lr": 0.05, "ema": 0.9, "checkpoint_seconds": 0, **changes})


def loss(
    net: nn.Module, x: torch.Tensor, y: torch.Tensor, rng: torch.Generator, progress: float
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    value, logs = AdversarialTraining(steps=2).loss(net, x, y, Threat(norm="linf", eps=0.1), rng, progress)
    return value, dict(logs)


def main(scratch: Path, pause_at: int) -> None:
    def on_step(done: int, total: int) -> None:
        print(done, total, flush=True)
        if done == pause_at:
            time.sleep(60)  # the parent kills us here

    x, y = images()
    fit(network(), x, y, loss, config(), 5, scratch, on_step)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), int(sys.argv[2]))
