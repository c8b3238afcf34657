"""Single neurons in windows have the bounds that whole maps give, and are bounded in any company alike."""

from typing import Literal

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stages.bounds import _neurons, _sweep
from stages.bounds._backward import Chain
from stages.bounds._interval import UNITS
from stages.bounds._trace import Op
from stages.bounds.alpha_crown import AlphaCrown
from stages.bounds.base import Box
from stages.bounds.crown import Crown
from stages.seeding import generator

SIDE = 11


class Fork(nn.Module):
    """Convolutions side by side whose windows differ, a value read twice, and a constant map added."""

    def __init__(self, groups: int, dilation: int, stride: int, mode: Literal["zeros", "reflect", "circular"]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, stride, dilation, dilation, groups, padding_mode=mode)
        self.norm = nn.BatchNorm2d(4)
        self.short = nn.Conv2d(4, 4, (3, 1), stride, (1, 0))

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.norm(self.conv(x)), self.short(x)
        found: Tensor = F.relu(left - right) + (-right) + left
        return found


class Gate(nn.Module):
    """Maps with a number added to each of them, which is pooled from other maps."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(2, 4, 3), nn.Conv2d(2, 4, 2)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = F.relu(self.left(x)) + F.relu(self.right(x)).mean((2, 3), keepdim=True)
        return found


NETS: dict[str, list[nn.Module]] = {
    "plain": [nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU()],
    "linear between": [nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 3, 2), nn.ReLU()],
    "grouped": [nn.Conv2d(2, 4, 3, groups=2), nn.ReLU(), Fork(2, 1, 2, "zeros"), nn.ReLU(), nn.Conv2d(4, 4, 2)],
    "dilated": [nn.Conv2d(2, 4, 3, dilation=2), nn.ReLU(), Fork(1, 2, 1, "zeros"), nn.ReLU(), Fork(4, 1, 1, "zeros")],
    "reflected": [nn.Conv2d(2, 4, 3), nn.ReLU(), Fork(1, 1, 1, "reflect"), nn.ReLU(), nn.AvgPool2d(2)],
    "circular": [nn.Conv2d(2, 4, 3), nn.ReLU(), Fork(1, 1, 2, "circular"), nn.ReLU(), nn.Conv2d(4, 4, 1)],
    "pooled": [nn.Conv2d(2, 4, 3), nn.ReLU(), nn.AvgPool2d(2), nn.Conv2d(4, 4, 2), nn.ReLU(), nn.MaxPool2d(2)],
    "wide stride": [nn.Conv2d(2, 4, 2, 3), nn.ReLU(), nn.Conv2d(4, 4, 1, 3), nn.ReLU(), nn.Conv2d(4, 4, 2)],
    "gated": [Gate(), nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU()],
    "smooth": [nn.Conv2d(2, 4, 3), nn.SiLU(), nn.Conv2d(4, 4, 3), nn.Tanh(), nn.Conv2d(4, 4, 3, 2)],
}


def network(name: str) -> nn.Module:
    rng = generator(0, name)
    net = nn.Sequential(*NETS[name], nn.ReLU(), nn.Flatten(), nn.LazyLinear(6), nn.ReLU(), nn.Linear(6, 3)).eval()
    with torch.no_grad():
        net(torch.zeros(1, 2, SIDE, SIDE))
        for value in net.state_dict().values():
            if value.is_floating_point():
                value.copy_(torch.rand(value.shape, generator=rng) - (0.5 if value.dim() > 1 else -0.1))
    return net.requires_grad_(False)


def boxes(name: str, count: int = 3) -> Box:
    x = torch.rand(count, 2, SIDE, SIDE, generator=generator(1, name))
    return Box(x - 0.05, x + 0.05)


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("name", NETS)
def test_windows_give_the_bounds_of_whole_maps(name: str, double: bool) -> None:
    box, rng = boxes(name), generator(2, name)
    framed = 0

    def compare(op: Op) -> None:
        nonlocal framed
        for value in chain.operands(op):
            way = None if value == chain.graph.input else _neurons.way(chain, value)
            if way is None or value in chain.fronts:
                continue
            framed += sum(frame is not None for frame in way.frames.values()) > 1
            entries = torch.randperm(chain.graph.entries[value], generator=rng)[:12]
            signs = torch.where(torch.rand(len(entries), generator=rng) < 0.5, -1.0, 1.0).to(chain.kind)
            units = torch.zeros(len(entries), len(box.low), chain.graph.entries[value], dtype=chain.kind)
            units[torch.arange(len(entries)), :, entries] = signs.unsqueeze(1)
            whole = chain.bound(value, chain.unflat(value, units)).flatten()
            images = torch.arange(len(box.low)).repeat(len(entries))
            repeated = (part.repeat_interleave(len(box.low)) for part in (entries, signs))
            rows = _neurons.Neurons(way, images, *repeated)
            found = rows.bound(value, signs.new_ones(1, len(images)))[0]
            torch.testing.assert_close(found, whole, rtol=1e-9 if double else 1e-4, atol=1e-9 if double else 1e-4)
        _sweep.tighten(chain, op, 2.0)

    with torch.no_grad():
        chain = Chain(network(name), box, UNITS["float32"], double)
        _sweep.follow(chain, compare)
    assert framed >= (1 if name in {"reflected", "circular"} else 2)  # what pads by moving entries is done whole


@pytest.mark.parametrize("name", ["dilated", "plain"])
def test_optimised_slopes_in_windows_are_those_of_whole_maps(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net, box, rows = network(name), boxes(name, 2), torch.eye(3).expand(2, 3, 3)
    certifier = AlphaCrown(arithmetic="real", steps=2, box_steps=2)
    found = certifier.lower(net, box, rows)
    monkeypatch.setattr(_neurons, "way", lambda *_: None)
    torch.testing.assert_close(found, certifier.lower(net, box, rows), rtol=1e-5, atol=1e-5)


def test_an_image_has_the_same_bounds_in_any_company_and_within_any_memory() -> None:
    net, box, rows = network("plain"), boxes("plain"), torch.eye(3).expand(3, 3, 3)
    together = Crown().lower(net, box, rows)
    alone = torch.cat([Crown().lower(net, _sweep.part(box, slice(i, i + 1)), rows[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(together, alone)
    torch.testing.assert_close(together, Crown(memory=2e-4).lower(net, box, rows))
