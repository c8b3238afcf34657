"""No point of a box escapes its bound on random graphs: any operation may read any value that there is.

`python -m tests.property.test_graphs_sound FIRST SECONDS` goes on from seed FIRST for so long and prints what it finds.
"""

import sys
import time
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from stages.bounds.base import Box
from stages.method import InputError
from stages.seeding import generator
from tests.certifiers import ALL

Way = Callable[..., Tensor]
Made = tuple[Way, nn.Module | None]
K, LARGEST, MOST = 3, 30.0, 120
SHAPES = [(5,), (2, 3, 3), (3, 4), (1, 4, 4), (4, 3)]

CURVES: list[Way] = [
    F.relu, torch.tanh, torch.sigmoid, F.gelu, F.silu, F.hardswish, F.leaky_relu, F.elu, F.softplus, torch.abs, F.mish,
    lambda x: x.clamp(-0.5, 0.6), lambda x: x.clamp(max=0.1), lambda x: x**2, lambda x: x**3, lambda x: 0.7 - x,
    lambda x: (x.abs() + 0.05).sqrt(), lambda x: (x * x + 0.1).rsqrt(), lambda x: x.clamp(max=2).exp(),
    lambda x: 1 / (x.abs() + 0.3), lambda x: torch.round(4 * x) / 4, torch.sign, lambda x: x + x.flip(-1),
]  # fmt: skip
PAIRS: list[Way] = [
    torch.add, torch.sub, torch.mul, torch.maximum, torch.minimum, lambda x, y: x / (1 + y.abs()),
    lambda x, y: torch.cat([x, y], 1), lambda x, y: torch.cat([y, x], -1), lambda x, y: torch.stack([x, y], 1).mean(1),
    lambda x, y: torch.stack([x, y], 2).amax(2), lambda x, y: torch.clamp(x, -y.abs(), y.abs()),
    lambda x, y: x * torch.sigmoid(y), lambda x, y: torch.maximum(x, x - y), lambda x, y: torch.lerp(x, y, 0.3),
    lambda x, y: torch.where(torch.arange(x.shape[-1]) % 2 == 0, x, y),
]  # fmt: skip
MOVES: list[Way] = [
    lambda x: x.flatten(1), lambda x: x - x.mean(-1, keepdim=True), lambda x: x.softmax(-1), lambda x: x.softmax(1),
    lambda x: x.mean(-1), lambda x: x.amax(1, keepdim=True), lambda x: x.amin(-1), lambda x: x[:, ::2],
    lambda x: x[..., 1:], lambda x: x.roll(1, -1), lambda x: F.layer_norm(x, x.shape[-1:]), lambda x: x.sum(1),
    lambda x: x.unsqueeze(1), lambda x: x.reshape(len(x), -1, 2), lambda x: x.repeat(1, 2, *[1] * (x.dim() - 2)),
    lambda x: x[:, [0, 0]], lambda x: F.pad(x, (1, 1)), lambda x: F.normalize(x, dim=-1),
    lambda x: x.chunk(2, 1)[0] - x.chunk(2, 1)[-1],
]  # fmt: skip
POOLS: list[Way] = [
    lambda x: F.avg_pool2d(x, 2, 1, 1), lambda x: F.avg_pool2d(x, (2, 1), ceil_mode=True),
    lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False), lambda x: F.max_pool2d(x, 2),
    lambda x: F.max_pool2d(x, 3, 2, 1), lambda x: F.adaptive_avg_pool2d(x, 2), lambda x: F.adaptive_max_pool2d(x, 1),
    lambda x: F.interpolate(x, scale_factor=2), F.instance_norm, lambda x: F.pad(x, (1, 0, 2, 1), value=0.3),
]  # fmt: skip
PRODUCTS: list[Way] = [
    lambda x, y: x @ y.transpose(1, 2), lambda x, y: (x @ y.transpose(1, 2)).softmax(-1) @ y,
    lambda x, y: F.scaled_dot_product_attention(*(z.unsqueeze(1) for z in (x, y, y)))[:, 0],
    lambda x, y: F.scaled_dot_product_attention(x.unsqueeze(1), y.unsqueeze(1), x.unsqueeze(1), is_causal=True)[:, 0],
]  # fmt: skip


class Mixed(nn.Module):
    """A constant from the left."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, size))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.weight.tril() @ x
        return y


class Graph(nn.Module):
    """Steps that each make one value more from two of those there are; the logits are linear in the last."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.rng, self.shape = generator(seed, "graph"), SHAPES[seed % len(SHAPES)]
        self.steps, self.parts = list[tuple[int, int, Way]](), nn.ModuleList()
        values = [torch.rand(2, *self.shape, generator=self.rng)]
        wanted = 2 + self.pick(7)
        for _ in range(20 * wanted):
            if len(self.steps) == wanted:
                break
            first = len(values) - 1 if self.pick(3) else self.pick(len(values))
            like = [i for i, value in enumerate(values) if value.shape == values[first].shape]
            step = first, like[self.pick(len(like))], self.made(values[first])
            try:
                found = step[2](values[first], values[step[1]])
            except (RuntimeError, IndexError, ValueError):
                continue
            fits = 2 <= found.dim() <= 4 and len(found) == 2 and 0 < found[0].numel() <= MOST
            if fits and bool(found.abs().max() < LARGEST):
                self.steps.append(step)
                values.append(found)
        self.head = self.filled(nn.Linear(values[-1][0].numel(), K))
        self.eval().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for first, second, way in self.steps:
            values.append(way(values[first], values[second]))
        y: Tensor = self.head(values[-1].flatten(1))
        return y

    def pick(self, count: int) -> int:
        return int(torch.randint(count, (1,), generator=self.rng))

    def filled(self, part: nn.Module) -> nn.Module:
        with torch.no_grad():
            for value in part.parameters():
                value.copy_(1.2 * torch.randn(value.shape, generator=self.rng) / max(1, value[0].numel()) ** 0.5)
        return part.requires_grad_(False)

    def made(self, x: Tensor) -> Way:
        kind = self.pick(9)
        if kind < 3:
            part = self.filled(self.affine(x))
            self.parts.append(part)
            return lambda x, _: part(x)
        if kind < 6:
            table = CURVES if kind < 5 else MOVES if x.dim() < 4 or self.pick(2) else POOLS
            one = table[self.pick(len(table))]
            return lambda x, _: one(x)
        table = PRODUCTS if x.dim() == 3 and self.pick(2) else PAIRS
        return table[self.pick(len(table))]

    def affine(self, x: Tensor) -> nn.Module:
        if x.dim() == 4 and self.pick(4):
            channels, out = x.shape[1], x.shape[1] * (1 + self.pick(2))
            kernel, stride, padding = (
                (1 + self.pick(3), 1 + self.pick(3)),
                (1 + self.pick(2), 1 + self.pick(3)),
                self.pick(2),
            )
            if self.pick(4) == 0:
                return nn.ConvTranspose2d(channels, out, kernel, stride)
            groups = channels if self.pick(3) == 0 else 1
            return nn.Conv2d(channels, out, kernel, stride, padding, 1 + self.pick(2), groups, bool(self.pick(2)))
        return Mixed(x.shape[1]) if x.dim() == 3 and self.pick(3) == 0 else nn.Linear(x.shape[-1], 1 + self.pick(6))


def question(net: Graph, seed: int) -> tuple[Box, Tensor]:
    """A box round two images, some of its sides a point, and rows of coefficients."""
    rng = generator(seed, "question")
    x = torch.rand(2, *net.shape, generator=rng)
    reach = (0.0, 1e-4, 0.01, 0.1, 0.5)[net.pick(5)] * torch.rand(x.shape, generator=rng)
    reach = reach * (torch.rand(x.shape, generator=rng) > 0.3)
    return Box(x - reach, x + reach), torch.randn(2, 3, K, generator=rng)


def reached(net: nn.Module, box: Box, rows: Tensor, rng: Generator) -> Tensor:
    """[B, R]: the least that corners, random points and sign steps find, in float32 and in batches of two sizes."""
    share = torch.rand(24, *box.low.shape, generator=rng)
    share[::2] = share[::2].round()
    points = torch.cat([box.low + share * (box.high - box.low), box.low.unsqueeze(0), box.high.unsqueeze(0)])
    points = points.clamp(box.low, box.high)

    def values(points: Tensor) -> Tensor:
        z = net(points.flatten(0, 1)).unflatten(0, points.shape[:2])
        return torch.einsum("brk,sbk->sbr", rows.double(), z.double())

    with torch.no_grad():
        least = torch.minimum(values(points).amin(0), values(points[:1]).amin(0))
    for row in range(rows.shape[1]):
        x = points[:4].clone()
        for step in range(4):
            with torch.enable_grad():
                found = values(x.requires_grad_())
                (slope,) = torch.autograd.grad(found[..., row].sum(), x)
            least = torch.minimum(least, found.detach().amin(0))
            x = (x.detach() - slope.sign() * (box.high - box.low) * 0.6 * 0.7**step).clamp(box.low, box.high)
    return least


def escapes(seed: int) -> Iterator[str]:
    """What a graph shows: a bound above a point, one that is no number, or an error that is no refusal."""
    with torch.random.fork_rng(devices=[]):
        net = Graph(seed)
    box, rows = question(net, seed)
    least = reached(net, box, rows, generator(seed, "points"))
    for certifier in ALL:
        try:
            bound = certifier.lower(net, box, rows).double()
        except InputError:
            continue
        except Exception as error:  # whatever it is
            yield f"{seed}: {certifier!r}: {type(error).__name__}: {error}"
        else:
            if not bool((bound <= least).all()):
                yield f"{seed}: {certifier!r}: {float((bound - least).max()):.3g} above a point"


@pytest.mark.parametrize("seed", range(8))
def test_nothing_escapes_a_random_graph(seed: int) -> None:
    assert list(escapes(seed)) == []


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    at, end = int(sys.argv[1]), time.monotonic() + float(sys.argv[2])
    while time.monotonic() < end:
        for line in escapes(at):
            sys.stdout.write(f"{line}\n")
        at += 1
    sys.stdout.write(f"up to seed {at}\n")
