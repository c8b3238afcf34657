"""The average follows its formula."""

import pytest
import torch
from torch import nn

from stages.fitting.ema import Average


class One(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(1, dtype=torch.float64))
        self.register_buffer("count", torch.zeros(1, dtype=torch.int64))


def test_tau_copies_then_grows_to_the_decay() -> None:
    average = Average(One(), 0.995, 400)
    assert [average.tau(step) for step in (0, 9)] == [0.0, 0.0]
    assert average.tau(10) == pytest.approx(1 / 10)
    assert average.tau(11) == pytest.approx(2 / 11)
    # (1 + t) / (10 + t) passes 0.995 at t = 1790.
    assert average.tau(10 + 1789) == pytest.approx(1790 / 1799)
    assert average.tau(10 + 1791) == 0.995


def test_weights_are_averaged_and_buffers_copied() -> None:
    live = One()
    average = Average(live, 0.5, 80)  # two steps of copying
    expected = 0.0
    for step, value in enumerate([3.0, 5.0, 7.0, 11.0, -2.0, 4.0]):
        with torch.no_grad():
            live.w.fill_(value)
        live.get_buffer("count").fill_(step)
        average.update(live, step)
        tau = 0.0 if step < 2 else min(0.5, (1 + step - 2) / (10 + step - 2))
        expected = tau * expected + (1 - tau) * value
        assert average.net.get_parameter("w").item() == pytest.approx(expected, rel=1e-12)
        assert average.net.get_buffer("count").item() == step
    assert not any(p.requires_grad for p in average.net.parameters())
