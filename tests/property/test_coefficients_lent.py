"""Coefficients that are written over are nobody else's: not those of a bound by boxes, not the caller's."""

from itertools import product

import pytest
import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from stages.bounds import _sweep
from stages.bounds._backward import Chain
from stages.bounds._channels import Channelwise
from stages.bounds._interval import DOUBLE, SINGLE, Interval
from stages.bounds.base import Box
from stages.seeding import generator
from tests.networks import draw_weights

K = 3


class Network(nn.Module):
    """Convolutions that pass over pixels read a value beside others, before, behind and around a ReLU."""

    def __init__(self, rng: Generator, skips_first: bool, plain: bool) -> None:
        super().__init__()
        self.skips_first, self.plain = skips_first, plain
        self.first = nn.Conv2d(2, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.body = nn.Conv2d(6, 4, 3, 2, 1)
        self.short = nn.Conv2d(6, 4, 1, 2)
        self.around = nn.Conv2d(6, K, 1, (2, 3), bias=False)
        self.late = nn.Conv2d(6, K, 3, 1)
        self.last = nn.Linear(4, K)
        draw_weights(self, rng)

    def forward(self, image: Tensor) -> Tensor:
        x = self.first(image)
        x = F.relu(x if self.plain else self.norm(x))
        around = self.around(x)
        both = self.short(x) + self.body(x) if self.skips_first else self.body(x) + self.short(x)
        out = F.relu(both)
        logits: Tensor = self.last(out.mean((2, 3))) + around.mean((2, 3)) + self.late(x).mean((2, 3))
        return logits


@pytest.mark.parametrize(("skips_first", "plain"), [*product((False, True), repeat=2)])
def test_bounds_and_rows_stay_what_they_are(skips_first: bool, plain: bool) -> None:
    rng = generator(0, "lent", str(skips_first), str(plain))
    net = Network(rng, skips_first, plain).eval().requires_grad_(False).double()
    x = torch.rand(2, 2, 8, 8, generator=rng, dtype=torch.float64)
    box, rows = Box(x - 0.05, x + 0.05), torch.randn(2, 3, K, generator=rng, dtype=torch.float64)
    chains = [kind(net, box, 0.0, True) for kind in (Chain, Channelwise)]
    with torch.no_grad():
        for chain in chains:
            _sweep.follow(chain)
        one, two = (_sweep.logits(chain, rows, 2.0) for chain in chains)
        assert torch.allclose(one, two, rtol=1e-8, atol=1e-8)  # slopes of 2^-30 in place of 0
        inner = next(op.result for op in chains[1].graph.ops if op.kind == "relu")
        pixels_first = torch.randn(3, 2, 8, 8, 6, generator=rng, dtype=torch.float64)
        asked, kept = (rows.permute(0, 1, 4, 2, 3) for rows in (pixels_first, pixels_first.clone()))
        one, two = (chain.bound(inner, asked) for chain in chains)
    assert torch.equal(asked, kept)
    assert torch.allclose(one, two, rtol=1e-8, atol=1e-8)  # slopes of 2^-30 in place of 0


@pytest.mark.parametrize(("kind", "unit"), [(torch.float32, SINGLE), (torch.float64, DOUBLE)])
def test_ends_go_apart_by_a_share_of_their_size(kind: torch.dtype, unit: float) -> None:
    x = torch.tensor([-3.7, -1e-3, 0.0, 1e-20, 0.11, 5e8], dtype=kind)
    size = x.double().abs()
    for share in (0.0, 3 * unit, 1e-3):
        found = Interval.apart(x * (1 - share), x * (1 + share), share)
        for end, sign in ((found.low, -1.0), (found.high, 1.0)):
            assert ((end.double() - x.double() - sign * share * size).abs() <= 4 * unit * size).all()
