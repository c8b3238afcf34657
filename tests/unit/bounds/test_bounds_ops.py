"""One rule at a time: sound on a grid, and tight where the operation allows it."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from stages.bounds._interval import Interval, Rounding
from stages.bounds._trace import trace
from stages.bounds.ibp import _double, propagate
from stages.method import InputError
from stages.seeding import generator
from tests.networks import Single


def bounds(function: Callable[[Tensor], Tensor] | Single, low: Tensor, high: Tensor) -> Interval:
    net = function if isinstance(function, Single) else Single(function).eval()
    graph = trace(net, low)
    constants = {name: _double(value) for name, value in graph.constants(net).items()}
    result = propagate(graph, constants, {graph.input: Interval(low, high)}, {graph.output}, Rounding())[graph.output]
    assert isinstance(result, Interval)
    return result


ELEMENTWISE: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "relu6": F.relu6,
    "clamp": lambda x: x.clamp(-0.5, 1.5),
    "leaky_relu": F.leaky_relu,
    "elu": F.elu,
    "celu": lambda x: F.celu(x, 1.7),
    "floor": torch.floor,
    "ceiling": torch.ceil,
    "truncated": torch.trunc,
    "softplus": F.softplus,
    "softplus, low threshold": lambda x: F.softplus(x, beta=2.0, threshold=1.0),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "atan": torch.atan,
    "asinh": torch.asinh,
    "exp": torch.exp,
    "hardsigmoid": F.hardsigmoid,
    "silu": F.silu,
    "hardswish": F.hardswish,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "square": lambda x: x * x,
    "power": lambda x: x**2,
    "cube": lambda x: x**3,
    "fourth power": lambda x: x**4,
    "broken power": lambda x: (x.abs() + 0.2) ** 1.7,
    "inverse power": lambda x: (x.abs() + 1) ** -1.0,
    "root": lambda x: (x.abs() + 0.1).sqrt(),
    "inverse root": lambda x: (x.abs() + 0.5) ** -0.5,
    "logarithm": lambda x: (x.abs() + 0.5).log(),
    "absolute": torch.abs,
    "negated": lambda x: -x,
    "scaled": lambda x: 2 - 3 * x / 1.5,
    "reciprocal": lambda x: 1 / (x * x + 1),
    "sine": torch.sin,
    "cosine": torch.cos,
    "sine of large values": lambda x: torch.sin(100 * x),
}


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_elementwise_rules_contain_the_range_and_little_more(name: str) -> None:
    function = Single(ELEMENTWISE[name]).eval()
    rng = generator(0, name)
    low = torch.randn(64, 4, generator=rng, dtype=torch.float64) * 3
    high = low + torch.rand(low.shape, generator=rng, dtype=torch.float64) * 4
    found = bounds(function, low, high)
    grid = torch.linspace(0, 1, 2001, dtype=torch.float64).view(-1, 1, 1)
    values = function(low + grid * (high - low))
    assert bool((found.low <= values.amin(0)).all())
    assert bool((values.amax(0) <= found.high).all())
    if name not in {"reciprocal", "softplus, low threshold"}:
        assert torch.allclose(found.low, values.amin(0), atol=5e-3)
        assert torch.allclose(found.high, values.amax(0), atol=5e-3)
    _point_stays_a_point(function, low)


SHAPED: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda x: torch.softmax(x.flatten(2), -1),
    "max_pool": lambda x: F.max_pool2d(x, 3, 2, 1),
    "avg_pool": lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False),
    "nothing negative": lambda x: F.avg_pool2d(x.abs(), 2) / 2 + x[:, :, :2, :2] ** 2,
    "adaptive": lambda x: F.adaptive_avg_pool2d(x, 2),
    "mean": lambda x: x.mean((2, 3)),
    "sum": lambda x: x.sum(1),
    "pad": lambda x: F.pad(x, (1, 0, 2, 1), value=0.3),
    "slice and cat": lambda x: torch.cat([x[:, 1:], x[:, :1].flip(2)], 1),
    "product": lambda x: x[:, :1] * x[:, 1:],
    "quotient": lambda x: x[:, :1] / (2 + torch.sigmoid(x[:, 1:])),
    "attention": lambda x: torch.softmax(x[:, 0] @ x[:, 1].transpose(1, 2), -1) @ x[:, 1],
    "maximum": lambda x: torch.maximum(x[:, 0], x[:, 1]),
    "transposed convolution": lambda x: F.conv_transpose2d(x, torch.ones(2, 3, 2, 2, dtype=x.dtype).sub(0.6), stride=2),
    "one-dimensional": lambda x: F.conv1d(x.flatten(2), torch.linspace(-1, 1, 12, dtype=x.dtype).view(2, 2, 3)),
    "upsampled": lambda x: F.interpolate(x, scale_factor=2.0, mode="nearest"),
    "where": lambda x: torch.where((x > 0.3) & ~(x >= x.flip(1)), x, 0.5 * x - 1),
    "threshold": lambda x: F.threshold(x, 0.2, -0.5),
    "constants of its shape": lambda x: x + torch.ones_like(x) * 0.3,
    "running sums": lambda x: x.cumsum(2),
    "products along": lambda x: x.prod(1),
    "largest and least": lambda x: x.max(1, keepdim=True).values - x.min(2, keepdim=True).values,
    "pools of bodies": lambda x: F.max_pool3d(x.unsqueeze(1), 2, 1) + F.avg_pool3d(x.unsqueeze(1), 2, 1),
    "views": lambda x: x.permute(0, 2, 3, 1).reshape(x.shape[0], -1).unsqueeze(1).squeeze(1),
}


@pytest.mark.parametrize("name", SHAPED)
def test_shaped_rules_contain_every_sample(name: str) -> None:
    rng = generator(1, name)
    low = torch.randn(3, 2, 5, 5, generator=rng, dtype=torch.float64)
    high = low + torch.rand(low.shape, generator=rng, dtype=torch.float64)
    function = Single(SHAPED[name]).eval()
    found = bounds(function, low, high)
    for i in range(200):
        share = torch.rand(low.shape, generator=rng, dtype=torch.float64)
        value = function(low + (share.round() if i % 2 else share) * (high - low))
        assert value.shape == found.low.shape
        assert bool(((found.low <= value) & (value <= found.high)).all())
    _point_stays_a_point(function, low)


def _point_stays_a_point(function: Single, x: Tensor) -> None:
    found = bounds(function, x, x)
    assert torch.allclose(found.low, function(x), atol=1e-9)
    assert torch.allclose(found.high, function(x), atol=1e-9)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: 1 / x, 'operation "reciprocal" by a value that may be zero'),
        (torch.log, "of a value that may be negative"),
        (lambda x: x**2.5, "of a value that may be negative"),
        (lambda x: F.leaky_relu(x, -0.1), "with a negative slope"),
        (lambda x: x.round(decimals=2), "to decimals"),
        (lambda x: F.softplus(x, -1.0), "with a negative beta"),
        (lambda x: x.half().float(), "to torch.float16"),
        (lambda x: torch.ones(x.shape[0], 2), "does not depend on the image"),
        (lambda x: torch.sort(x, 1).values, 'no rule for operation "sort"'),
    ],
)
def test_what_has_no_rule_is_named(function: Callable[[Tensor], Tensor], message: str) -> None:
    x = torch.ones(1, 2, dtype=torch.float64)
    with pytest.raises(InputError, match=message):
        bounds(function, -x, x)


def test_margins_follow_the_textbook() -> None:
    rounding = Rounding(2.0**-24)
    assert rounding.share(100) == pytest.approx(102 * 2.0**-24, rel=1e-4)
    assert Rounding().share(100) == pytest.approx(432 * 2.0**-53, rel=1e-4)
    with pytest.raises(InputError, match="too wide"):
        rounding.share(2**24)
