"""Values that do not lie batch-first: bounds of an image depend on nothing but the image."""

import pytest
import torch
from torch import Tensor, nn

from stages.bounds._interval import Interval
from stages.bounds._ops import parts
from stages.bounds._trace import fill, trace
from stages.bounds.base import Box
from stages.bounds.crown_ibp import CrownIBP
from stages.bounds.etb import ETB
from stages.bounds.ibp import IBP
from stages.seeding import generator


class Tokens(nn.Module):
    """Pieces of the image through two layers with ReLUs, one after the other in the value's first dimension or not."""

    def __init__(self, pieces: int, first: bool) -> None:
        super().__init__()
        self.pieces, self.first = pieces, first
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        pieces = x.view(-1, self.pieces, 4)
        h = torch.relu(self.b(torch.relu(self.a(pieces.transpose(0, 1) if self.first else pieces))))
        weights = torch.arange(1.0, self.pieces + 1).view((-1, 1, 1) if self.first else (1, -1, 1))
        logits: Tensor = self.c((h * weights).sum(0 if self.first else 1))
        return logits


class Folded(nn.Module):
    """The image and its mirror image as one batch of twice the size."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.a(torch.cat([x, x.flip(1)], 0)))
        logits: Tensor = self.b(h[: len(x)] - h[len(x) :])
        return logits


def drawn(net: nn.Module, rng: torch.Generator) -> nn.Module:
    with torch.no_grad():
        for weight in net.parameters():
            weight.copy_(torch.randn(weight.shape, generator=rng) / 2)
    return net.requires_grad_(False)


def box_of(count: int, entries: int, rng: torch.Generator) -> Box:
    centre = torch.rand(count, entries, generator=rng) * torch.arange(1, count + 1).view(-1, 1) - 1
    return Box(centre - 0.05, centre + 0.05)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_tokens_first_have_the_bounds_of_tokens_second(count: int) -> None:
    rng = generator(count)
    first, second = drawn(Tokens(2, True), rng).eval(), Tokens(2, False).eval()
    second.load_state_dict(first.state_dict())
    box, rows = box_of(count, 8, rng), torch.randn(count, 5, 3, generator=rng)
    for method in (IBP(), CrownIBP()):
        torch.testing.assert_close(
            method.lower(first, box, rows), method.lower(second, box, rows), rtol=1e-4, atol=1e-3
        )
    for form in ("deep", "blocks"):
        ours, theirs = (ETB(form=form).estimate(net, box, rows) for net in (first, second))
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("count", [1, 2])
def test_a_folded_batch_is_bounded_image_by_image(count: int) -> None:
    rng = generator(count)
    net, box, rows = drawn(Folded(), rng).eval(), box_of(count, 6, rng), torch.randn(count, 4, 3, generator=rng)
    low = IBP().lower(net, box, rows)
    points = torch.stack(
        [box.low, box.high, *(torch.lerp(box.low, box.high, torch.rand(6, generator=rng)) for _ in range(50))]
    )
    reached = torch.einsum("brk,sbk->sbr", rows, net(points.flatten(0, 1)).view(52, count, 3)).amin(0)
    assert low.shape == (count, 4)
    assert bool((low <= reached).all())


def test_a_mean_over_the_first_dimension_counts_what_it_sums() -> None:
    class Mean(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.view(-1, 512, 2).transpose(0, 1).mean(0)

    graph = trace(Mean(), torch.zeros(1, 1024))
    [op] = [op for op in graph.ops if op.kind == "mean"]
    lain = Interval(torch.zeros(512, 1, 2), torch.zeros(512, 1, 2))
    [operand] = op.reads()
    assert parts(op, fill(op.args, {operand: lain}), {}).terms == 513
