"""Networks on which backward bounds once were wrong, or broke: each was seen to fail."""

import pytest
import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from stages.bounds.base import Box, Certifier
from stages.bounds.crown import Crown
from stages.bounds.crown_ibp import CrownIBP
from stages.bounds.ibp import IBP
from stages.method import InputError
from stages.seeding import generator

CERTIFIERS = IBP(), CrownIBP(), CrownIBP(arithmetic="real"), Crown()


def escapes(certifier: Certifier, net: nn.Module, x: Tensor, rng: Generator) -> float:
    """The furthest that a bound lies above what a point of the box gives."""
    net = net.eval().requires_grad_(False)
    box, rows = Box(x - 0.02, x + 0.02), torch.randn(len(x), 3, net(x).shape[1], generator=rng)
    bounds = certifier.lower(net, box, rows)
    points = [x + 0.02 * (2 * torch.rand(x.shape, generator=rng) - 1).clamp(-0.999, 0.999) for _ in range(20)]
    found = [torch.einsum("brk,bk->br", rows.double(), net(point).double()) for point in points]
    return float((bounds.double() - torch.stack(found).amin(0)).max())


class Shifted(nn.Module):
    """A strided shortcut of something that every image has alike, beside a convolution with a bias."""

    def __init__(self, first: bool) -> None:
        super().__init__()
        self.first = first
        self.map = nn.Parameter(torch.ones(1, 4, 8, 8))
        self.short, self.body, self.last = nn.Conv2d(4, 6, 1, 2), nn.Conv2d(2, 6, 3, 2, 1), nn.Linear(6, 3)
        nn.init.constant_(self.body.bias, 5.0)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        if self.first:
            there = self.short(self.map.expand(x.shape[0], -1, -1, -1))
            return self.last(F.relu(self.body(x) + there).mean((2, 3)))  # type: ignore[no-any-return]
        y = self.body(x)
        there = self.short(self.map.expand(x.shape[0], -1, -1, -1))
        return self.last(F.relu(y + there).mean((2, 3)))  # type: ignore[no-any-return]


class Single(nn.Module):
    """Values of one number an image, [B]."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(32, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.one(x.flatten(1)) + 0.1).squeeze(1)
        return torch.stack([h, 1 - h], 1)


@pytest.mark.parametrize("certifier", CERTIFIERS, ids=lambda c: f"{c.kind} {c.arithmetic}")
@pytest.mark.parametrize("first", [False, True])
def test_a_shortcut_of_what_no_image_moves(certifier: Certifier, first: bool) -> None:
    rng = generator(0, "shifted")
    assert escapes(certifier, Shifted(first), torch.rand(2, 2, 8, 8, generator=rng), rng) <= 0


@pytest.mark.parametrize("certifier", CERTIFIERS, ids=lambda c: f"{c.kind} {c.arithmetic}")
def test_one_number_an_image(certifier: Certifier) -> None:
    rng = generator(0, "single")
    assert escapes(certifier, Single(), torch.rand(3, 2, 4, 4, generator=rng), rng) <= 1e-6


@pytest.mark.parametrize("certifier", CERTIFIERS, ids=lambda c: f"{c.kind} {c.arithmetic}")
@pytest.mark.parametrize("step", [2, 3])
def test_one_channel_and_one_column(certifier: Certifier, step: int) -> None:
    rng = generator(0, "column", str(step))
    net = nn.Sequential(nn.Conv2d(1, 8, 3, (1, step)), nn.ReLU(), nn.Flatten(), nn.Linear(48, 3))
    assert escapes(certifier, net, torch.rand(3, 1, 8, 4, generator=rng), rng) <= 1e-6


@pytest.mark.parametrize("certifier", CERTIFIERS, ids=lambda c: f"{c.kind} {c.arithmetic}")
@pytest.mark.parametrize("on", [0, 1, 2])
def test_few_channels_that_are_on_and_one_column(certifier: Certifier, on: int) -> None:
    rng = generator(0, "few", str(on))
    first = nn.Conv2d(3, 8, 3, 1, 1)
    net = nn.Sequential(first, nn.ReLU(), nn.Conv2d(8, 8, 3, (1, 2)), nn.ReLU(), nn.Flatten(), nn.Linear(48, 3))
    nn.init.constant_(first.bias[on:], -50.0)  # type: ignore[index]
    assert escapes(certifier, net, torch.rand(3, 3, 8, 4, generator=rng), rng) <= 1e-6


@pytest.mark.parametrize("weight", [torch.inf, torch.nan])
def test_a_channel_that_is_off_keeps_weights_that_are_no_numbers(weight: float) -> None:
    rng = generator(0, "no number")
    first, second = nn.Conv2d(3, 8, 3, 1, 1), nn.Conv2d(8, 8, 3, 1, 1)
    net = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Flatten(), nn.Linear(512, 3)).requires_grad_(False)
    nn.init.constant_(first.bias[:4], -50.0)  # type: ignore[index]
    x = torch.rand(2, 3, 8, 8, generator=rng)
    box, rows = Box(x - 0.02, x + 0.02), torch.randn(2, 3, 3, generator=rng)
    assert bool(CrownIBP().lower(net, box, rows).isfinite().all())
    second.weight[:, 0] = weight  # the trace was made before
    with pytest.raises(InputError, match="not finite"):
        CrownIBP().lower(net, box, rows)
