"""Closed forms, order and exactness of backward linear bounds."""

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stages.bounds._ball import Ends
from stages.bounds.base import Ball, Box, Certifier
from stages.bounds.crown import Crown
from stages.bounds.crown_ibp import CrownIBP
from stages.bounds.ibp import IBP
from stages.method import InputError
from stages.seeding import generator
from stages.threat import Threat
from tests.networks import Single

REAL = [CrownIBP(arithmetic="real"), Crown(arithmetic="real")]
SQUARE = [[1.0, 1.0], [1.0, -1.0]]


def block(a1: list[list[float]], a2: list[float], b1: list[float] | None = None, b2: float = 0.0) -> nn.Module:
    first, second = nn.Linear(len(a1[0]), len(a1)), nn.Linear(len(a1), 1)
    net = nn.Sequential(first, nn.ReLU(), second).double().eval()
    with torch.no_grad():
        first.weight.copy_(torch.tensor(a1))
        first.bias.copy_(torch.tensor(b1 or [0.0] * len(a1)))
        second.weight.copy_(torch.tensor([a2]))
        second.bias.fill_(b2)
    return net


class Residual(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x) - x / 2


@pytest.mark.parametrize(
    ("net", "x0", "eps", "expected"),
    [
        pytest.param(block(SQUARE, [1.0, 1.0]), [1.0, 0.0], 1.0, (0.0, 4.5), id="case 1"),
        pytest.param(block(SQUARE, [1.0, 1.0]), [0.0, 0.0], 1.0, (0.0, 3.0), id="case 2, a tie"),
        pytest.param(block(SQUARE, [1.0, -2.0], [0.5, -0.5], 0.25), [0.5, 0.25], 0.5, (-0.25, 2.5), id="case 3"),
        pytest.param(block([[1.0], [-1.0]], [1.0, 1.0]), [0.0], 1.0, (0.0, 1.0), id="case 4, absolute value"),
        pytest.param(block([[1.0], [-1.0]], [1.0, -1.0]), [0.0], 1.0, (-1.0, 1.0), id="case 4, identity"),
        pytest.param(Residual().eval(), [0.0], 1.0, (-0.5, 0.5), id="case 5, residual"),
    ],
)
def test_closed_forms_of_the_notes(net: nn.Module, x0: list[float], eps: float, expected: tuple[float, float]) -> None:
    x = torch.tensor([x0], dtype=torch.float64)
    rows = torch.tensor([[[1.0], [-1.0]]], dtype=torch.float64)
    for certifier in REAL:
        low, negated = certifier.lower(net, Box(x - eps, x + eps), rows).detach()[0].tolist()
        assert (low, -negated) == pytest.approx(expected, abs=1e-9)


def mlp(seed: int, *widths: int) -> nn.Sequential:
    rng = generator(seed, "mlp")
    layers: list[nn.Module] = [nn.Flatten()]
    for i, (a, b) in enumerate(itertools.pairwise(widths)):
        layers += [nn.Linear(a, b), *((nn.ReLU(),) if i < len(widths) - 2 else ())]
    net = nn.Sequential(*layers).eval()
    with torch.no_grad():
        for value in net.parameters():
            value.copy_(torch.randn(value.shape, generator=rng) / value.shape[-1] ** 0.5)
    return net


def around(seed: int, shape: tuple[int, ...], eps: float, double: bool = True) -> Box:
    x = torch.rand(shape, generator=generator(seed, "x"))
    x = x.double() if double else x
    return Box(x - eps, x + eps)


def test_never_looser_than_intervals_and_tighter_with_tighter_boxes() -> None:
    net = mlp(0, 6, 12, 12, 12, 4).double()
    rows = torch.randn(5, 3, 4, generator=generator(0, "rows"), dtype=torch.float64)
    with torch.no_grad():
        for eps in (0.0, 0.05, 0.3, 1.0):
            box = around(0, (5, 6), eps)
            plain, mixed, full = (c.lower(net, box, rows) for c in (IBP(arithmetic="real"), *REAL))
            assert bool((mixed >= plain - 1e-9).all())
            assert bool((full >= plain - 1e-9).all())
            assert float(full.mean()) >= float(mixed.mean()) - 1e-9
    assert float((full - mixed).mean()) > 0.1
    assert float((mixed - plain).mean()) > 0.1


def test_a_box_is_bounded_alone_as_in_a_batch_and_in_any_number_of_blocks() -> None:
    net = mlp(1, 8, 16, 16, 3)
    rows, box = torch.randn(4, 5, 3, generator=generator(1, "rows")), around(1, (4, 8), 0.2, double=False)
    with torch.no_grad():
        together = Crown().lower(net, box, rows)
        # The least that holds an image and a row, and what holds two images and a few rows.
        small = [Crown(memory=share).lower(net, box, rows) for share in (9e-6, 2e-5)]
        alone = [Crown().lower(net, Box(box.low[i : i + 1], box.high[i : i + 1]), rows[i : i + 1]) for i in range(4)]
    for found in small:
        assert torch.allclose(together, found, atol=1e-6)
    assert torch.allclose(together, torch.cat(alone), atol=1e-6)
    with pytest.raises(InputError, match=r"memory: .* hold no row .* give more memory"):
        Crown(memory=1e-9).lower(net, box, rows)


def test_the_least_value_on_boxes_of_float32_lies_just_under_the_exact_one() -> None:
    rng = generator(2, "least")
    slopes = torch.randn(16, 4, 3, 8, 8, generator=rng)
    for eps, last in itertools.product((0.0, 1e-3, 1.0), (False, True)):
        x = torch.randn(4, 3, 8, 8, generator=rng)
        low, high = x - eps, x + eps
        exact = (slopes.double() * torch.where(slopes > 0, low, high).double()).flatten(2).sum(2)
        found = Ends(Box(low, high), torch.float32, last).least(slopes, 0.0)
        assert bool((found <= exact).all())
        assert bool((found >= exact - 2e-6 * (slopes.abs() * (x.abs() + eps)).flatten(2).sum(2)).all())


def test_the_least_value_on_balls_is_that_of_the_dual_norm() -> None:
    net = mlp(3, 6, 3).double()
    x = torch.full((2, 6), 0.5, dtype=torch.float64)
    rows = torch.randn(2, 4, 3, generator=generator(3, "rows"), dtype=torch.float64)
    slopes = (rows @ net.get_parameter("1.weight")).detach()
    middle = torch.einsum("brk,bk->br", rows, net(x)).detach()
    wide = torch.full_like(x, 9.0)
    for norm, dual in (("l2", 2.0), ("l1", float("inf"))):
        ball = Ball(x, norm, 0.3)  # type: ignore[arg-type]
        exact = middle - 0.3 * torch.linalg.vector_norm(slopes, dual, 2)
        for box in (Box(x - wide, x + wide, ball), Box(x - 0.3, x + 0.3, ball)):
            found = Crown(arithmetic="real").lower(net, box, rows).detach()
            assert torch.allclose(found, exact, atol=1e-5)
            assert bool((found <= exact + 1e-12).all())


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_a_ball_cut_with_its_box_is_bounded_tighter_than_either(norm: str) -> None:
    rng = generator(4, norm)
    net = nn.Sequential(nn.Flatten(), nn.Linear(5, 1, bias=False)).double().eval()
    with torch.no_grad():
        net.get_parameter("1.weight").copy_(torch.tensor([[2.0, -1.5, 1.0, 0.5, -0.25]]))
    x = torch.rand(1, 5, generator=rng, dtype=torch.float64)
    rows = torch.ones(1, 1, 1, dtype=torch.float64)
    threat = Threat(norm=norm, eps=0.9)
    cut = Box.around(x, threat)
    with torch.no_grad():
        bounds = [
            float(Crown(arithmetic="real").lower(net, box, rows))
            for box in (cut, Box(cut.low, cut.high), Box(cut.low - 9, cut.high + 9, cut.ball))
        ]
        assert bounds[0] > max(bounds[1:]) + 1e-6
        # Projected descent finds the least value on the set, for l2; for l1 a point of the set that is not far above.
        point = x
        weight = net.get_parameter("1.weight")
        for i in range(2000):
            point = threat.project(point - 0.5 / (i + 5) * weight, x)
        reached = float(net(point))
    assert bounds[0] <= reached
    if norm == "l2":
        assert bounds[0] == pytest.approx(reached, abs=2e-2)


CASES: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "relu6": lambda x: F.relu6(3 * x),
    "clamp": lambda x: x.clamp(-0.5, 0.7),
    "leaky_relu": F.leaky_relu,
    "elu": F.elu,
    "softplus": F.softplus,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "atan": torch.atan,
    "asinh": torch.asinh,
    "exp": torch.exp,
    "erf": torch.erf,
    "hardsigmoid": lambda x: F.hardsigmoid(2 * x),
    "silu": F.silu,
    "hardswish": lambda x: F.hardswish(2 * x),
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "square": lambda x: x * x,
    "power": lambda x: x**2,
    "absolute": torch.abs,
    "reciprocal": lambda x: 1 / (x * x + 1),
    "quotient": lambda x: x[:, :1] / (2 + torch.sigmoid(x[:, 1:])),
    "product": lambda x: x[:, :1] * x[:, 1:],
    "gate": lambda x: x * torch.sigmoid(x.mean((2, 3), keepdim=True)),
    "softmax": lambda x: torch.softmax(x.flatten(2), -1),
    "attention": lambda x: torch.softmax(x[:, 0] @ x[:, 1].transpose(1, 2), -1) @ x[:, 1],
    "max_pool": lambda x: F.max_pool2d(x, 3, 2, 1),
    "max_pool ceil": lambda x: F.max_pool2d(x, 2, 2, ceil_mode=True, dilation=2),
    "avg_pool": lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False),
    "adaptive": lambda x: F.adaptive_avg_pool2d(x, 2),
    "mean": lambda x: x.mean((2, 3)),
    "sum": lambda x: x.sum(1),
    "pad": lambda x: F.pad(x, (1, 0, 2, 1), value=0.3),
    "slice and cat": lambda x: torch.cat([x[:, 1:], x[:, :1].flip(2)], 1),
    "split": lambda x: torch.split(x, [1, 1], 1)[1] - torch.split(x, [1, 1], 1)[0],
    "maximum": lambda x: torch.maximum(x[:, 0], x[:, 1]),
    "transposed convolution": lambda x: F.conv_transpose2d(x, torch.ones(2, 3, 2, 2, dtype=x.dtype).sub(0.6), stride=2),
    "one-dimensional": lambda x: F.conv1d(x.flatten(2), torch.linspace(-1, 1, 12, dtype=x.dtype).view(2, 2, 3)),
    "strides that leave pixels": lambda x: F.conv2d(x, torch.ones(1, 2, 1, 1, dtype=x.dtype), stride=3),
    "upsampled": lambda x: F.interpolate(x, scale_factor=2.0, mode="nearest"),
    "views": lambda x: x.permute(0, 2, 3, 1).reshape(x.shape[0], -1).unsqueeze(1).squeeze(1),
    "batch second": lambda x: (x.flatten(2).permute(2, 0, 1) + 0.25).relu().permute(1, 0, 2),
}
AFFINE = {
    "avg_pool",
    "adaptive",
    "mean",
    "sum",
    "pad",
    "slice and cat",
    "split",
    "transposed convolution",
    "upsampled",
} | {"one-dimensional", "strides that leave pixels", "views"}


@pytest.mark.parametrize("name", CASES)
def test_every_operation_is_bounded_soundly_and_affine_ones_exactly(name: str) -> None:
    rng = generator(5, name)
    net = Single(lambda x: CASES[name](x).flatten(1)).eval()
    low = torch.randn(3, 2, 5, 5, generator=rng, dtype=torch.float64)
    high = low + 1.5 * torch.rand(low.shape, generator=rng, dtype=torch.float64)
    width = net(low).shape[1]
    rows = torch.randn(3, 4, width, generator=rng, dtype=torch.float64)
    with torch.no_grad():
        found = {kind: c.lower(net, Box(low, high), rows) for kind, c in zip(("mixed", "full"), REAL, strict=True)}
        # Interval arithmetic wants the batch in front at its last non-linear operation.
        ibp = found["mixed"] if name == "batch second" else IBP(arithmetic="real").lower(net, Box(low, high), rows)
        least = torch.full((3, 4), torch.inf, dtype=torch.float64)
        for i in range(200):
            share = torch.rand(low.shape, generator=rng, dtype=torch.float64)
            x = low + (share.round() if i % 2 else share) * (high - low)
            least = torch.minimum(least, torch.einsum("brk,bk->br", rows, net(x)))
        point = Crown(arithmetic="real").lower(net, Box(low, low), rows)
    for bound in found.values():
        assert bool((bound <= least).all())
        assert bool((bound >= ibp - 1e-8).all())
        if name in AFFINE:
            assert torch.allclose(bound, ibp, atol=1e-8)
    assert torch.allclose(point, torch.einsum("brk,bk->br", rows, net(low)), atol=1e-7)


def test_bounds_are_differentiable_in_the_weights() -> None:
    net = mlp(6, 4, 5, 5, 3)
    x, y = torch.rand(2, 1, 2, 2, generator=generator(6)), torch.tensor([0, 1])
    for certifier in (CrownIBP(), Crown()):
        net.zero_grad()
        certifier.margins(net, x, y, Threat(norm="linf", eps=0.1)).sum().backward()  # type: ignore[no-untyped-call]
        assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in net.parameters())


def test_float32_bounds_are_close_to_exact_ones() -> None:
    net = mlp(7, 20, 40, 40, 4)
    rows, box = torch.randn(6, 3, 4, generator=generator(7, "rows")), around(7, (6, 20), 0.1, double=False)
    with torch.no_grad():
        for single, exact in ((CrownIBP(), REAL[0]), (Crown(), REAL[1])):
            covered, real = single.lower(net, box, rows), exact.lower(net, box, rows)
            assert bool((covered <= real + 1e-6).all())
            assert torch.allclose(covered, real, atol=2e-3)


def test_bad_rows_and_boxes_are_refused() -> None:
    net = mlp(8, 4, 5, 3)
    x = torch.rand(1, 4)
    certifiers: list[Certifier] = [CrownIBP(), Crown()]
    for certifier in certifiers:
        with pytest.raises(InputError, match="rows"):
            certifier.lower(net, Box(x, x), torch.ones(1, 1, 7))
        with pytest.raises(InputError, match="low <= high"):
            certifier.lower(net, Box(x, x - 1), torch.ones(1, 1, 3))
