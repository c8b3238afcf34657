"""A trace is the network: replayed for any count of images it computes what the network computes."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from stages.bounds._trace import fill, trace
from stages.method import InputError


class Net(nn.Module):
    def __init__(self, forward: Callable[["Net", Tensor], Tensor]) -> None:
        super().__init__()
        self.way = forward
        self.linear, self.token = nn.Linear(6, 4), nn.Parameter(torch.randn(1, 1, 6))
        self.norm, self.attention = nn.BatchNorm1d(4), nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.way(self, x)


def written(net: Net, x: Tensor) -> Tensor:
    y: Tensor = net.linear(x.clone().mul_(2)).relu_()
    y[:, 0] += 1.0
    return y


def attended(net: Net, x: Tensor) -> Tensor:
    tokens = torch.cat([net.token.expand(len(x), 1, 6), x.view(len(x), 1, 6)], 1)
    y: Tensor = net.attention(tokens, tokens, tokens, need_weights=False)[0]
    return y.flatten(1)


def turned(net: Net, x: Tensor) -> Tensor:
    y: Tensor = net.linear(x.T.flip(0).T)
    return y


def mapped(net: Net, x: Tensor) -> Tensor:
    y: Tensor = torch.vmap(lambda one: net.linear.weight @ one.view(6, 1))(x)
    return y.flatten(1)


def replayed(net: nn.Module, x: Tensor) -> Tensor:
    graph = trace(net, x)
    values = {**graph.constants(net), graph.input: x}
    for op in graph.ops:
        if op.result in graph.moving:
            values[op.result] = op.target(*fill(op.args, values), **fill(dict(op.kwargs), values))
    found: Tensor = values[graph.output]
    return found


@pytest.mark.parametrize(
    "way",
    [
        written,
        attended,
        mapped,
        lambda net, x: net.norm(net.linear(x)).split(2, 1)[1],
        lambda net, x: net.linear(x.T.T),
    ],
    ids=["in place", "attention", "vmap", "batch norm", "transposed"],
)
def test_a_trace_computes_what_the_network_computes(way: Callable[[Net, Tensor], Tensor]) -> None:
    net = Net(way).eval()
    for count in (1, 2, 5):
        x = torch.rand(count, 6)
        with torch.no_grad():
            torch.testing.assert_close(replayed(net, x), net(x))


def test_a_trace_survives_training_and_names_modules() -> None:
    net = Net(lambda net, x: net.norm(net.linear(x))).eval()
    graph = trace(net, torch.rand(2, 6))
    with torch.no_grad():
        net.linear.weight.mul_(2)
        x = torch.rand(3, 6)
        torch.testing.assert_close(replayed(net, x), net(x))
    assert trace(net, x) is graph
    assert [op.module for op in graph.ops if op.kind == "addmm"] == ["linear"]


@pytest.mark.parametrize(
    "way",
    [
        lambda net, x: net.linear(x) * float(x[0, 0]),
        lambda net, x: net.linear(x) * x.tolist()[0][0],
        lambda net, x: net.linear(x) * torch.tensor(x.detach().numpy()[0, 0]),
        lambda net, x: net.linear(x) if x.sum() > 1 else x,
        lambda net, x: net.linear(x) / len(x),
        lambda net, x: torch.cat([net.linear(part) for part in x.split(1)]),
        lambda net, x: net.linear(x) + len(x) * torch.ones(4),
        lambda net, x: (net.linear(x), x),
    ],
)
def test_what_depends_on_values_or_on_the_count_of_images_is_refused(way: Callable[[Net, Tensor], Tensor]) -> None:
    with pytest.raises(InputError, match="Net cannot be followed"):
        trace(Net(way).eval(), torch.rand(2, 6))


@pytest.mark.parametrize(
    ("way", "reason"),
    [
        (lambda net, x: net.linear(x - x.mean(0, keepdim=True)), "depend on other images"),
        (lambda net, x: net.linear(x.flip(0)), "depend on other images"),
        (lambda net, x: net.linear(x + 0 * x[:1]), "depend on other images"),
        (lambda net, x: net.linear(torch.cat([x[1:], x[:1]])), "depend on other images"),
        (lambda net, x: net.linear(x.T.reshape(-1, 6)), "depend on other images"),
        (lambda net, x: net.linear(x.softmax(0)), "depend on other images"),
        (lambda net, x: net.linear(x + torch.randn(6)), "draws random numbers"),
        (lambda net, x: net.linear(x) * float(x.detach().numpy().max() > 9), "reads the value of a pixel by numpy"),
    ],
    ids=["mean", "turned", "first", "rolled", "mixed", "softmax", "random", "numpy"],
)
def test_bounds_speak_of_one_image_and_of_no_dice(way: Callable[[Net, Tensor], Tensor], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        trace(Net(way).eval(), torch.rand(2, 6))


def test_how_a_network_lies_in_memory_changes_nothing() -> None:
    """Pooling to one pixel ends in `as_strided` where the network is channels-last."""
    net = nn.Sequential(nn.Conv2d(2, 3, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2))
    net.eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = torch.rand(4, 2, 7, 7)
    with torch.no_grad():
        torch.testing.assert_close(replayed(net, x), net(x))


class Settings:
    def __init__(self) -> None:
        self.factor = 1.0


class Scaled(nn.Module):
    sign = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.settings = Settings()
        self.table = np.ones(2000)
        self.net = nn.Linear(3, 2)
        self.factor = torch.tensor(1.0)
        self.factors = [1.0]
        self.parts = {"shift": torch.zeros(2)}

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.net(x.relu()) * self.factor * self.factors[0] + self.parts["shift"]
        return y * self.settings.factor * self.sign * float(self.table[1000])


def hooked(net: Scaled) -> None:
    net.net.register_forward_hook(lambda _module, _images, result: -result)


def reformed(net: Scaled) -> None:
    net.forward = lambda x: -net.net(x)  # type: ignore[method-assign]


@pytest.mark.parametrize(
    "change",
    [
        lambda net: setattr(net, "factor", torch.tensor(-5.0)),
        lambda net: net.factor.mul_(-5.0),
        lambda net: setattr(net, "factors", [-5.0]),
        lambda net: net.factors.__setitem__(0, -5.0),
        lambda net: net.parts.update(shift=torch.ones(2)),
        lambda net: setattr(net.settings, "factor", -5.0),
        lambda net: net.table.__setitem__(1000, -5.0),
        lambda net: setattr(type(net), "sign", -type(net).sign),
        hooked,
        reformed,
    ],
)
def test_whatever_is_replaced_in_a_network_makes_its_trace_anew(change: Callable[[Scaled], object]) -> None:
    net, x = Scaled().eval().requires_grad_(False), torch.rand(2, 3)
    before = trace(net, x)
    assert trace(net, x) is before
    change(net)
    assert torch.allclose(replayed(net, x), net(x))


def test_weights_that_part_are_read_apart() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)).eval().requires_grad_(False)
    net[1].weight = net[0].weight
    x = torch.rand(2, 3)
    trace(net, x)
    net[1].weight = nn.Parameter(torch.ones(3, 3), requires_grad=False)
    assert torch.allclose(replayed(net, x), net(x))


class Reading(nn.Module):
    def __init__(self, read: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.net, self.scale, self.read = nn.Linear(3, 2), nn.Parameter(torch.tensor([2.0, 1.0])), read

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.net(x.relu()) * self.read(self.scale)
        return y


@pytest.mark.parametrize(
    "read",
    [
        lambda w: w[0].item(),
        lambda w: float(w.detach().sum()),
        lambda w: 2.0 if bool((w > 1.5).any()) else -1.0,
        lambda w: w.tolist()[0],
        lambda w: (w * 2).tolist()[0],
        lambda w: w.data[0],
        lambda w: 1.0 if torch.equal(w, torch.tensor([2.0, 1.0])) else -1.0,
        lambda w: len((w > 1.5).nonzero()),
        lambda w: len(w[w > 1.5]),
    ],
)
@pytest.mark.parametrize("anew", [False, True])
def test_a_weight_that_decides_the_way_makes_the_trace_anew(read: Callable[[Tensor], object], anew: bool) -> None:
    net, x = Reading(read).eval().requires_grad_(False), torch.rand(2, 3)
    before = trace(net, x)
    net.net.weight.add_(1.0)
    assert trace(net, x) is before
    if anew:
        net.scale = nn.Parameter(torch.tensor([-3.0, 0.0]), requires_grad=False)
    else:
        net.scale.copy_(torch.tensor([-3.0, 0.0]))
    assert torch.allclose(replayed(net, x), net(x))


def test_a_constant_that_is_written_into_on_the_way_is_followed_unless_it_has_views() -> None:
    x = torch.rand(2, 3)
    ways: list[Callable[[Tensor], Tensor]] = [
        lambda w: (w / 0.5).round_().mul_(0.5),
        lambda w: (w * 3).clamp(-1, 1).add_(w),
    ]
    for way in ways:
        net = Reading(way).eval().requires_grad_(False)
        net.scale = nn.Parameter(torch.tensor([0.8, -0.3]), requires_grad=False)
        trace(net, x)
        net.scale.copy_(torch.tensor([-0.6, 0.1]))
        assert torch.allclose(replayed(net, x), net(x))
    for bad in (lambda w: (w * 3).view(2, 1).round_().view(2), lambda w: w.mul_(2)):
        with pytest.raises(InputError, match="writes into a value"):
            trace(Reading(bad).eval().requires_grad_(False), x)
