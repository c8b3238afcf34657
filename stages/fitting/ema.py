"""Exponential averaging of weights."""

import copy

import torch
from torch import nn

WARM = 0.025


class Average:
    """theta_bar <- tau theta_bar + (1 - tau) theta after every step; the averaged network is `net`.

    Over the first 2.5 % of steps theta_bar = theta; then tau is min(decay, (1 + t) / (10 + t)) with t counted from the
    end of that warm-up. Buffers (batch-norm statistics) are copied, not averaged: their own running mean is an average
    already. Source: the training code of Wang et al. 2023 ("Better diffusion models further improve adversarial
    training"), after Izmailov et al. 2018; no departure known.
    """

    def __init__(self, live: nn.Module, decay: float, total: int) -> None:
        self.net = copy.deepcopy(live).eval().requires_grad_(False)
        self._decay = decay
        self._warm = int(WARM * total)

    def tau(self, step: int) -> float:
        """The weight of the old average after step 0..total-1."""
        if step < self._warm:
            return 0.0
        t = step - self._warm
        return min(self._decay, (1 + t) / (10 + t))

    @torch.no_grad()
    def update(self, live: nn.Module, step: int) -> None:
        """Take in the live weights as they are after `step`."""
        tau = self.tau(step)
        for mean, value in zip(self.net.parameters(), live.parameters(), strict=True):
            if tau == 0:
                mean.copy_(value)
            else:
                mean.lerp_(value, 1 - tau)
        for kept, buffer in zip(self.net.buffers(), live.buffers(), strict=True):
            kept.copy_(buffer)
