"""Linear bounds of one operation at a time: below it at every point of the box, and close to it in small boxes."""

import gc
from collections.abc import Callable
from functools import cache
from weakref import ref

import pytest
import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from stages.bounds import _sweep
from stages.bounds._backward import Chain
from stages.bounds._forward import Bands
from stages.bounds.base import Box, Certifier
from stages.bounds.crown import Crown
from stages.bounds.crown_forward import CrownForward
from stages.bounds.ibp import IBP
from stages.seeding import generator
from tests.networks import Single

SHAPE = (3, 2, 6)
_MASK = torch.tensor([[0.0, -torch.inf, 0, 0, -torch.inf, 0]])
_W = torch.tensor([1.5, -2.0, 0.3, 0.0, -0.7, 1.0])

# Smooth ones lie within a multiple of the squared radius of their lines.
SMOOTH: dict[str, Callable[[Tensor], Tensor]] = {
    "layer_norm": lambda x: F.layer_norm(x, (6,), _W.to(x), _W.flip(0).to(x)),
    "layer_norm, two dimensions": lambda x: F.layer_norm(x, (2, 6)),
    "normalised by hand": lambda x: x / ((x * x).mean(-1, keepdim=True) + 0.1).sqrt(),
    "sine": lambda x: torch.sin(3 * x),
    "cosine": lambda x: torch.cos(2 * x),
    "softmax": lambda x: x.softmax(-1),
    "softmax, first dimension": lambda x: x.softmax(1),
    "softmax, masked": lambda x: (2 * x + _MASK.to(x)).softmax(-1),
    "softmax, filled": lambda x: x.masked_fill(_MASK < 0, -torch.inf).softmax(-1),
    "softmax, shut out": lambda x: torch.where(_MASK < 0, torch.finfo(x.dtype).min, 3 * x).softmax(-1),
}
ROUGH: dict[str, Callable[[Tensor], Tensor]] = {
    "max_pool": lambda x: F.max_pool2d(x.view(-1, 1, 3, 4), 2, 1, 1),
    "max_pool, holes": lambda x: F.max_pool2d(x.view(-1, 1, 3, 4), (2, 3), (1, 2), (1, 1), 2, ceil_mode=True),
    "adaptive_max_pool": lambda x: F.adaptive_max_pool2d(x.view(-1, 1, 3, 4), (2, 3)),
    "amax": lambda x: x.amax(1, keepdim=True),
    "amax, all": lambda x: x.amax((1, 2)).unsqueeze(1),
    "maximum": lambda x: torch.maximum(x[:, 0], 0.7 * x[:, 1].flip(1)),
    "minimum": lambda x: torch.minimum(x[:, 0], 0.7 * x[:, 1].flip(1)),
    "maximum with a constant": lambda x: torch.maximum(x, torch.full((1,), 0.3).to(x)),
    "clamped by values": lambda x: x[:, 0].clamp(-x[:, 1].abs(), x[:, 1].abs()),
    "clamped from below by a value": lambda x: x.clamp(min=x.flip(1) - 0.5),
    "clamped from above by a value": lambda x: x.clamp(max=x.flip(1) - 0.5),
    "product": lambda x: x[:, 0] * x[:, 1].flip(1),
    "matrices": lambda x: x @ x.transpose(1, 2),
    "quotient": lambda x: x[:, 0] / (0.3 + x[:, 1].abs()),
    "negative quotient": lambda x: x[:, 0] / (-0.3 - x[:, 1].exp()),
    "softplus, low threshold": lambda x: F.softplus(x, beta=2.0, threshold=1.0),
    "log_sigmoid": lambda x: F.logsigmoid(30 * x),
    "minimum with a constant before it": lambda x: torch.minimum(torch.full((1,), 0.3).to(x), x),
    "cube": lambda x: x**3,
    "fourth power": lambda x: x**4,
    "broken power": lambda x: (x.abs() + 0.1) ** 5.5,
    "falling power": lambda x: (x.abs() + 0.5) ** -1.3,
    "choice": lambda x: torch.where(x > 0.2, x, 0.3 * x - x.flip(1)),
    "negated": lambda x: (-(2 * x)).relu() - (-x).flip(2),
    "unit length": lambda x: F.normalize(x + 3, dim=-1),
    "prelu": lambda x: F.prelu(x, torch.tensor([0.2, -0.3]).to(x)),
    "group_norm": lambda x: F.group_norm(x, 1, torch.tensor([1.5, -1.0]).to(x), torch.tensor([0.1, 0.2]).to(x)),
    "instance_norm": F.instance_norm,
    "deviation": lambda x: x / (x.std(2, keepdim=True) + 0.2),
    "amin": lambda x: x.amin((2,)),
}


@cache
def single(name: str) -> Single:
    """Traced once for all tests."""
    net = Single((SMOOTH | ROUGH)[name])
    net.eval()
    return net


def lines(net: nn.Module, box: Box, unit: float = 0.0) -> tuple[Tensor, Tensor]:
    """Slopes [R, B, ...] and intercepts [R, B] of lines below +y_k and -y_k, for every entry k of the result."""
    chain = Chain(net, box, unit, True)
    _sweep.follow(chain)
    assert all(bool((part >= 0).all()) for part in slacks(chain))
    width = chain.shape(chain.graph.output).numel() // chain.batch
    ones = torch.eye(width, dtype=torch.float64).unsqueeze(1).expand(-1, chain.batch, -1)
    rows = chain.unflat(chain.graph.output, torch.cat([ones, -ones]))
    watch: dict[str, Tensor] = {}
    bound = chain.bound(chain.graph.output, rows, watch=watch)
    slopes = watch[chain.graph.input]
    return slopes, bound - chain.ends.least(slopes, 0.0)


def slacks(chain: Chain) -> list[Tensor]:
    return [part for part in chain.slack.values() if isinstance(part, Tensor)]


def boxes(rng: Generator) -> list[Box]:
    """From points to boxes that hold every case: one sign, both signs, near zero, far off, and constant vectors."""
    found = []
    for spread, shift, eps in [
        (1, 0, 0),
        (1, 0, 1e-3),
        (1, 0, 0.1),
        (1, 0, 1.0),
        (0.1, 4, 0.3),
        (3, 0, 8.0),
        (0, 1, 0.2),
    ]:
        x = spread * torch.randn(SHAPE, generator=rng, dtype=torch.float64) + shift
        reach = eps * torch.rand(SHAPE, generator=rng, dtype=torch.float64)
        found.append(Box(x - reach, x + reach * (torch.rand(SHAPE, generator=rng) > 0.1)))
    # Only one entry moves: what the others do to each other cannot hide behind what they do themselves.
    low = torch.randn(SHAPE, generator=rng, dtype=torch.float64)
    one = torch.eye(12, dtype=torch.float64)[5].view(1, 2, 6)
    return [*found, Box(low, low + 0.3 * one), Box(low, low + 1.5 * one)]


def points(box: Box, rng: Generator, count: int) -> Tensor:
    """[P, B, ...]: uniform, corners and mixtures, the centre and both ends."""
    share = torch.rand(count, *box.low.shape, generator=rng, dtype=torch.float64)
    share[::3] = share[::3].round()
    share[1::3] = torch.where(torch.rand(share[1::3].shape, generator=rng) < 0.5, share[1::3].round(), share[1::3])
    share[0], share[1], share[2] = 0, 1, 0.5
    return torch.minimum(box.low + share * (box.high - box.low), box.high)


def gaps(net: nn.Module, box: Box, at: Tensor, unit: float = 0.0) -> Tensor:
    """[P, R, B]: how far +y_k and -y_k lie above their lines at the points."""
    slopes, starts = lines(net, box, unit)
    values = torch.stack([net(x).flatten(1) for x in at])
    both = torch.cat([values, -values], 2).transpose(1, 2)
    return both - torch.einsum("rbn,pbn->prb", slopes.flatten(2), at.flatten(2)) - starts


@pytest.mark.parametrize("name", [*SMOOTH, *ROUGH])
def test_no_point_of_the_box_lies_under_its_line(name: str) -> None:
    net, rng = single(name), generator(0, name)
    for box in boxes(rng):
        above = gaps(net, box, points(box, rng, 300))
        assert float(above.min()) >= 0


@pytest.mark.parametrize("name", SMOOTH)
def test_lines_of_a_smooth_function_are_off_by_the_square_of_the_radius(name: str) -> None:
    net, rng = single(name), generator(1, name)
    x = torch.randn(SHAPE, generator=rng, dtype=torch.float64)
    wide, narrow = (float(gaps(net, Box(x - r, x + r), x.unsqueeze(0)).max()) for r in (1e-2, 1e-3))
    assert 0 < narrow < wide / 50
    assert wide < 0.05


@pytest.mark.parametrize("name", ["circular", "written over", "class token"])
@pytest.mark.parametrize("certifier", [IBP(), Crown(), CrownForward()])
def test_what_moves_entries_leaves_an_affine_network_its_exact_bounds(name: str, certifier: Certifier) -> None:
    rng = generator(4, name)
    moved = Single(MOVED[name])
    width = moved(torch.zeros(1, *SHAPE[1:])).numel()
    net = nn.Sequential(moved, nn.Flatten(), nn.Linear(width, 3)).eval()
    with torch.no_grad():
        for weight in net.parameters():
            weight.copy_(torch.randn(weight.shape, generator=rng))
    x, rows = torch.randn(SHAPE, generator=rng), torch.randn(SHAPE[0], 2, 3, generator=rng)
    x.requires_grad_()
    value = torch.einsum("brk,bk->rb", rows, net(x))
    slopes = torch.stack([torch.autograd.grad(value[r].sum(), x, retain_graph=True)[0] for r in range(2)])
    with torch.no_grad():
        found = certifier.lower(net, Box(x - 0.1, x + 0.1), rows)
    assert torch.allclose(found.T, value - 0.1 * slopes.abs().flatten(2).sum(2), atol=2e-3)


def written_over(x: Tensor) -> Tensor:
    found = 2 * x
    found[:, 0] = x[:, 1]
    found[:, 1, :2] = 3.0
    return found


def test_what_a_chain_holds_is_freed_with_it() -> None:
    gc.disable()  # which would free it some time later, with all the memory that it holds
    try:
        for name in SMOOTH | ROUGH:
            chain = Chain(single(name), boxes(generator(0, name))[1], 0.0, True)
            _sweep.follow(chain)
            kept = ref(chain)
            del chain
            assert kept() is None, name
    finally:
        gc.enable()


MOVED: dict[str, Callable[[Tensor], Tensor]] = {
    "padded": lambda x: F.pad(x, (1, 1), value=0.7),
    "class token": lambda x: torch.cat([torch.ones(1, 1, 6).to(x).expand(x.shape[0], 1, 6), x], 1),
    "class token added to": lambda x: torch.full((1, 1, 6), 2.0).to(x).expand(x.shape[0], 1, 6) - x,
    "masked": lambda x: torch.where(_MASK < 0, 3.0, x[:, :1] + x[:, 1:]).sigmoid(),
    "both halves": lambda x: torch.cat([x[:, :1].relu(), x[:, 1:] * x[:, :1]], 2),
    "reflected": lambda x: F.pad(x, (2, 2), mode="reflect"),
    "circular": lambda x: F.pad(x, (2, 2), mode="circular"),
    "written over": written_over,
    "replicated": lambda x: F.pad(x, (2, 2), mode="replicate"),
}


@pytest.mark.parametrize("name", [*MOVED, *(name for name in ROUGH if "pool" not in name and "norm" not in name)])
def test_no_value_leaves_its_band(name: str) -> None:
    net, rng = Single((MOVED | ROUGH)[name]).eval(), generator(2, name)
    for box in boxes(rng)[1:]:
        chain = Chain(net, box, 0.0, True)
        bands = Bands(chain)
        for op in chain.graph.ops:
            if op.result in chain.graph.moving:
                chain.follow(op)
                bands.follow(op)
        assert all(bool((part >= 0).all()) for part in slacks(chain))
        middle, radius = (part.flatten(1) for part in chain.ends.inside.split())
        live = (radius > 0).any(0)
        band = bands.held[chain.graph.output]
        for x in points(box, rng, 60):
            share = (x.flatten(1) - middle) / radius.clamp(min=1e-30)
            share = torch.cat([share[:, live], torch.ones(len(x), 1)], 1)
            m, d = (torch.einsum("bc,bcn->bn", share, part.flatten(2)) for part in (band.middle, band.spread))
            value = net(x).flatten(1)
            assert bool((m - d <= value + 1e-12).all())
            assert bool((value - 1e-12 <= m + d).all())
