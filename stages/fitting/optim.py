"""How to train, as a frozen value: optimiser, schedule, averaging, augmentation, precision."""

import math
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import nn

from stages.fitting.augment import Augment
from stages.method import Value


class Fit(Value):
    """Settings of the one training loop; every share is one of all steps, so that a longer training only stretches.

    Schedules, with s the step, T all steps, u = s/T:
    `cosine` rises linearly over the first `warmup` share, then falls as lr (1 + cos(pi v)) / 2 over the rest, v in
    [0, 1); `piecewise` is lr * factor^(number of `milestones` <= u), after the same warm-up; `onecycle` is the triangle
    0 -> lr at `peak` -> 0 (Smith 2017, as used by Rice, Wong and Kolter 2020).
    Weight decay touches tensors of two or more dimensions only: no biases, no batch-norm parameters.
    `ema` averages weights (see `stages/fitting/ema.py`); the averaged network is the result.
    `checkpoint_seconds` is how often half-done work is kept; it changes no number.
    `precision` "auto" is explained at `stages/fitting/precision.py`.
    """

    epochs: int = Field(default=20, ge=0)
    batch: int = Field(default=128, ge=1)
    optimiser: Literal["sgd", "adam", "adamw"] = "sgd"
    lr: float = Field(default=0.1, gt=0)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    nesterov: bool = True
    weight_decay: float = Field(default=5e-4, ge=0)
    schedule: Literal["cosine", "piecewise", "onecycle"] = "cosine"
    warmup: float = Field(default=0.025, ge=0, lt=1)
    milestones: tuple[float, ...] = (0.75, 0.9)
    factor: float = Field(default=0.1, gt=0, le=1)
    peak: float = Field(default=0.4, gt=0, lt=1)
    clip_norm: float | None = Field(default=None, gt=0)
    ema: float | None = Field(default=0.995, gt=0, lt=1)
    augment: Augment = Augment()
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    checkpoint_seconds: float = Field(default=30.0, ge=0)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.nesterov and self.optimiser == "sgd" and self.momentum == 0:
            raise ValueError("nesterov: expected momentum > 0, got 0; set nesterov = false or a momentum")
        if any(not 0 < share < 1 for share in self.milestones):
            raise ValueError(f"milestones: expected shares between 0 and 1, got {list(self.milestones)}")
        return self

    def rate(self, step: int, total: int) -> float:
        """Learning rate of step 0..total-1."""
        u = step / total
        if self.schedule == "onecycle":
            # Half a step in, so that neither end wastes a step at rate 0.
            v = (step + 0.5) / total
            return self.lr * (v / self.peak if v < self.peak else (1 - v) / (1 - self.peak))
        rising = round(self.warmup * total)
        if step < rising:
            return self.lr * (step + 1) / rising
        if self.schedule == "piecewise":
            return self.lr * self.factor ** sum(u >= share for share in self.milestones)
        return self.lr * 0.5 * (1 + math.cos(math.pi * (step - rising) / (total - rising)))


def optimiser(net: nn.Module, config: Fit) -> torch.optim.Optimizer:
    """The optimiser over `net`'s trainable parameters, in two groups: with and without weight decay."""
    trained = [p for p in net.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if config.optimiser == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=config.nesterov)
    if config.optimiser == "adam":
        return torch.optim.Adam(groups, lr=config.lr)
    return torch.optim.AdamW(groups, lr=config.lr)
