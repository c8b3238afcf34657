"""Slack by channel: the same bounds as with slack by entry, a little lower, and below everything a network computes."""

import pytest
import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from stages.bounds import _channels, _sweep
from stages.bounds._backward import Chain
from stages.bounds._channels import Channelwise
from stages.bounds._interval import UNITS
from stages.bounds.base import Box
from stages.bounds.crown_ibp import CrownIBP
from stages.seeding import generator
from tests.property.test_bounds_sound import candidates

K, SIDE = 3, 9
SEEDS = range(10)


class Network(nn.Module):
    """A normalised image through padded, grouped, strided and transposed convolutions, shortcuts, differences,
    normalisations that one or several read, and values that a ReLU and something else read."""

    def __init__(self, rng: Generator) -> None:
        super().__init__()

        def pick(*choices: int) -> int:
            return choices[int(torch.randint(len(choices), (1,), generator=rng))]

        self.register_buffer("mean", torch.rand(3, 1, 1, generator=rng))
        self.register_buffer("std", 0.2 + torch.rand(3, 1, 1, generator=rng))
        self.first = nn.Conv2d(3, 8, 3, pick(1, 2), pick(0, 1), bias=bool(pick(0, 1)))
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(3))
        self.one = nn.Conv2d(8, 8, 3, 1, 1, groups=pick(1, 2, 8))
        self.two = nn.Conv2d(8, 8, pick(1, 3), 1, "same")
        self.point = nn.Conv2d(8, 8, 1, groups=pick(1, 4))
        self.up = nn.ConvTranspose2d(8, 4, pick(2, 3), 2, pick(0, 1), groups=pick(1, 2))
        self.last = nn.Linear(4, K)
        self.turns = [pick(0, 1) for _ in range(7)]
        with torch.no_grad():
            for name, value in self.state_dict().items():
                if value.is_floating_point() and name not in {"mean", "std"}:
                    value.copy_(torch.randn(value.shape, generator=rng) * 0.4)
                    if "running_var" in name:
                        value.abs_().add_(0.1)

    def forward(self, image: Tensor) -> Tensor:
        read, joined, identity, direct, pooled, plain, halves = self.turns
        x = (image - self.get_buffer("mean")) / self.get_buffer("std") if plain else image
        x = self.first(x)
        y = F.relu(self.norms[0](x)) if direct else F.relu(x)
        z = self.norms[1](self.one(y))
        out = self.two(F.relu(z)) + (self.one(x) if halves else 0.0 * y)
        if read:  # a normalisation that is no ReLU's alone
            out = out + 0.5 * z if joined else out - z
        out = out + (x if identity else self.point(y))
        out = F.relu(self.norms[2](out))
        if halves:
            out = torch.cat([self.point(out)[:, 4:], out[:, :4]], 1)
        out = F.relu(self.up(self.point(out) if joined else out))
        out = F.avg_pool2d(out, 2) if pooled else out
        logits: Tensor = self.last(out.mean((2, 3)))
        return logits


def setting(seed: int, eps: float, kind: torch.dtype) -> tuple[nn.Module, Box, Tensor, Generator]:
    rng = generator(seed, "channels")
    net = Network(rng).eval().requires_grad_(False).to(kind)
    x = torch.rand(3, 3, SIDE, SIDE, generator=rng).to(kind)
    reach = eps * torch.rand(x.shape, generator=rng).to(kind)
    rows = torch.randn(3, 4, K, generator=rng).to(kind)
    return net, Box((x - reach).clamp(min=0), (x + reach).clamp(max=1)), rows, rng


def lower(kind: type[Chain], net: nn.Module, box: Box, rows: Tensor, arithmetic: str) -> tuple[Tensor, Chain]:
    with torch.no_grad():
        chain = kind(net, box, UNITS[arithmetic], arithmetic == "real")
        _sweep.follow(chain)
        return _sweep.logits(chain, rows, 2.0), chain


@pytest.mark.parametrize("eps", [0.0, 0.01, 0.2])
def test_the_bounds_are_those_of_slack_by_entry(eps: float) -> None:
    """In float64 slack is next to nothing, and all else is the same."""
    found = 0
    for seed in SEEDS:
        net, box, rows, _ = setting(seed, eps, torch.float64)
        one, _ = lower(Chain, net, box, rows, "real")
        two, chain = lower(Channelwise, net, box, rows, "real")
        assert torch.allclose(one, two, rtol=1e-9, atol=1e-9)
        found += sum(isinstance(front, _channels._Relu) for front in chain.fronts.values())
    assert found > 2 * len(SEEDS)


@pytest.mark.parametrize("eps", [0.0, 1e-5, 0.02])
def test_nothing_escapes(eps: float) -> None:
    for seed in SEEDS:
        net, box, rows, rng = setting(seed, eps, torch.float32)
        bound, exact = CrownIBP().lower(net, box, rows).double(), net.double()
        assert _least(exact, box, rows, rng, torch.float64).ge(bound).all()
        assert _least(net.float(), box, rows, rng, torch.float32).ge(bound).all()
        real, _ = lower(Chain, net, box, rows, "real")
        by_entry, _ = lower(Chain, net, box, rows, "float32")
        assert (real - bound <= 6 * (real - by_entry) + 1e-6).all()


def _least(net: nn.Module, box: Box, rows: Tensor, rng: Generator, kind: torch.dtype) -> Tensor:
    here = Box(box.low.to(kind), box.high.to(kind))
    least = torch.full(rows.shape[:2], torch.inf, dtype=torch.float64)
    for x in candidates(net, here, rows.to(kind), rng, 6):
        least = torch.minimum(least, torch.einsum("brk,bk->br", rows.double(), net(x).double()))
    return least


def _lost_offsets(patch: pytest.MonkeyPatch) -> None:
    honest = _channels._relu

    def rule(chain: Channelwise, *args: object) -> _channels._Relu:
        front = honest(chain, *args)  # type: ignore[arg-type]
        front.level.mul_(0.9)
        return front

    patch.setattr(_channels, "_relu", rule)


def _no_drop(patch: pytest.MonkeyPatch) -> None:
    honest = _channels._relu

    def rule(chain: Channelwise, *args: object) -> _channels._Relu:
        front = honest(chain, *args)  # type: ignore[arg-type]
        front.drop.zero_()
        return front

    patch.setattr(_channels, "_relu", rule)


def _unsettled(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Channelwise, "_pull", Chain._pull)


@pytest.mark.parametrize(("plant", "eps"), [(_lost_offsets, 0.0), (_no_drop, 0.02), (_unsettled, 0.0)])
def test_a_planted_unsound_rule_is_caught(plant, eps: float, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    plant(monkeypatch)
    worst = -torch.inf
    for seed in SEEDS:
        net, box, rows, rng = setting(seed, eps, torch.float32)
        bound = CrownIBP().lower(net, box, rows).double()
        worst = max(worst, float((bound - _least(net, box, rows, rng, torch.float32)).max()))
    assert worst > 0
