"""Closed forms, exactness, and the cases in which rounding matters."""

import math
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from stages.bounds._layout import trained
from stages.bounds.base import Box, Certifier
from stages.bounds.crown import Crown
from stages.bounds.crown_ibp import CrownIBP
from stages.bounds.ibp import IBP
from stages.method import InputError
from stages.nn.arch import Arch
from stages.nn.layers.gdws_conv import fit, folded
from stages.seeding import generator
from stages.threat import Threat
from stages.tuning import initial

REAL = IBP(arithmetic="real")


def block(a1: list[list[float]], a2: list[float], b1: list[float] | None = None, b2: float = 0.0) -> nn.Module:
    """relu(A1 x + b1) -> A2 . + b2, in float64."""
    first, second = nn.Linear(len(a1[0]), len(a1)), nn.Linear(len(a1), 1)
    net = nn.Sequential(first, nn.ReLU(), second).double().eval()
    with torch.no_grad():
        first.weight.copy_(torch.tensor(a1))
        first.bias.copy_(torch.tensor(b1 or [0.0] * len(a1)))
        second.weight.copy_(torch.tensor([a2]))
        second.bias.fill_(b2)
    return net


def interval(net: nn.Module, x0: list[float], eps: float) -> tuple[float, float]:
    x = torch.tensor([x0], dtype=torch.float64)
    rows = torch.tensor([[[1.0], [-1.0]]], dtype=torch.float64)
    low, negated = REAL.lower(net, Box(x - eps, x + eps), rows).detach()[0].tolist()
    return low, -negated


SQUARE = [[1.0, 1.0], [1.0, -1.0]]


@pytest.mark.parametrize(
    ("net", "x0", "eps", "expected"),
    [
        pytest.param(block(SQUARE, [1.0, 1.0]), [1.0, 0.0], 1.0, (0.0, 6.0), id="case 1"),
        pytest.param(block(SQUARE, [1.0, 1.0]), [0.0, 0.0], 1.0, (0.0, 4.0), id="case 2"),
        pytest.param(block(SQUARE, [1.0, -2.0], [0.5, -0.5], 0.25), [0.5, 0.25], 0.5, (-1.0, 2.5), id="case 3"),
        pytest.param(block([[1.0], [-1.0]], [1.0, 1.0]), [0.0], 1.0, (0.0, 2.0), id="case 4, absolute value"),
        pytest.param(block([[1.0], [-1.0]], [1.0, -1.0]), [0.0], 1.0, (-1.0, 1.0), id="case 4, identity"),
    ],
)
def test_closed_forms_of_the_notes(net: nn.Module, x0: list[float], eps: float, expected: tuple[float, float]) -> None:
    assert interval(net, x0, eps) == pytest.approx(expected, abs=1e-12)


def test_residual_of_case_5() -> None:
    class Residual(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(x) - x / 2

    # Interval arithmetic bounds relu(x) and x apart: 0 - 1/2 below, 1 + 1/2 above.
    assert interval(Residual().eval(), [0.0], 1.0) == pytest.approx((-0.5, 1.5), abs=1e-12)


def affine_net(rng: torch.Generator) -> nn.Module:
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=2, dilation=2, groups=2),
        nn.BatchNorm2d(4),
        nn.AvgPool2d(2, 1, 1, count_include_pad=False),
        nn.Conv2d(4, 3, 2, bias=False),
        nn.Flatten(),
        nn.Linear(3 * 16, 7),
        nn.Linear(7, 3),
    )
    with torch.no_grad():
        for value in net.state_dict().values():
            if value.is_floating_point():
                value.copy_(torch.rand(value.shape, generator=rng) + 0.1)
        for value in net.parameters():
            value.copy_(torch.randn(value.shape, generator=rng))
    return net.eval()


def test_exact_on_an_affine_network() -> None:
    rng = generator(0, "affine")
    net = affine_net(rng).double()
    x = torch.rand(2, 2, 7, 7, generator=rng, dtype=torch.float64)
    reach = torch.rand(x.shape, generator=rng, dtype=torch.float64)
    rows = torch.randn(2, 4, 3, generator=rng, dtype=torch.float64)
    with torch.no_grad():
        bound = REAL.lower(net, Box(x - reach, x + reach), rows)
        constant = net(torch.zeros_like(x[:1]))
        basis = torch.eye(98, dtype=torch.float64).view(98, 2, 7, 7)
        matrix = (net(basis) - constant).T
    slopes = rows @ matrix
    exact = (rows @ net(x).detach().unsqueeze(2)).squeeze(2) - (slopes.abs() @ reach.flatten(1).unsqueeze(2)).squeeze(2)
    assert torch.allclose(bound, exact, rtol=1e-9)
    assert bool((bound <= exact + 1e-9).all())


@pytest.mark.parametrize(
    ("builder", "shape", "options"),
    [
        ("small_cnn", (1, 8, 8), {"width": 4, "hidden": 8}),
        ("mlp", (1, 5, 5), {}),
        ("wrn", (3, 8, 8), {}),
    ],
)
def test_networks_of_ours_at_eps_zero_and_beyond(
    builder: str, shape: tuple[int, int, int], options: dict[str, object]
) -> None:
    rng = generator(1, builder)
    torch_state = torch.random.get_rng_state()
    net = Arch(builder=builder, options=options, input_shape=shape, classes=5).build()
    torch.random.set_rng_state(torch_state)
    x, y = torch.rand(5, *shape, generator=rng), torch.tensor([0, 1, 2, 3, 4])
    with torch.no_grad():
        z = net(x)
        lead = z.gather(1, y[:, None])[:, 0] - z.scatter(1, y[:, None], -torch.inf).amax(1)
        exact = REAL.margins(net, x, y, Threat(norm="linf", eps=0))
        covered = [IBP().margins(net, x, y, Threat(norm="linf", eps=eps)) for eps in (0.0, 0.001, 0.01, 0.1)]
    assert torch.allclose(exact, lead, atol=1e-4)
    assert bool((covered[0] <= lead).all())
    for wide, narrow in zip(covered[1:], covered, strict=False):
        assert bool((wide <= narrow).all())
    alone = IBP().margins(net, x[:1], y[:1], Threat(norm="linf", eps=0.01)).detach()
    assert torch.allclose(alone, covered[2][:1], rtol=1e-4)


def test_hidden_units_in_another_order_and_folded_normalisation_give_the_same_bound() -> None:
    rng = generator(2, "order")
    conv, norm, head = nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.Linear(6 * 16, 3)
    net = nn.Sequential(conv, norm, nn.ReLU(), nn.Flatten(), head).eval()
    with torch.no_grad():
        for value in (norm.weight, norm.bias, norm.running_mean):
            assert value is not None
            value.copy_(torch.randn(6, generator=rng))
        scale = norm.weight / (1 + norm.eps) ** 0.5
        fused = nn.Conv2d(1, 6, 3)
        order = torch.randperm(6, generator=rng)
        assert conv.bias is not None
        assert fused.bias is not None
        assert norm.running_mean is not None
        fused.weight.copy_((conv.weight * scale.view(-1, 1, 1, 1))[order])
        fused.bias.copy_(((conv.bias - norm.running_mean) * scale + norm.bias)[order])
        last = nn.Linear(6 * 16, 3)
        last.weight.copy_(head.weight.view(3, 6, 16)[:, order].flatten(1))
        last.bias.copy_(head.bias)
        other = nn.Sequential(fused, nn.ReLU(), nn.Flatten(), last).eval()
        x, y = torch.rand(3, 1, 6, 6, generator=rng), torch.tensor([0, 1, 2])
        threat = Threat(norm="linf", eps=0.05)
        assert torch.allclose(REAL.margins(net, x, y, threat), REAL.margins(other, x, y, threat), atol=1e-5)


@pytest.mark.parametrize("form", ["gather", "sum", "concat"])
def test_gdws_layers_are_traced_as_primitives(form: str) -> None:
    rng = generator(3, "gdws")
    dense = nn.Conv2d(3, 8, 3, stride=2, padding=1)
    layer = fit(dense, (1, 0, 2), form)  # type: ignore[arg-type]
    x = torch.rand(2, 3, 6, 6, generator=rng)
    y, threat = torch.tensor([0, 1]), Threat(norm="linf", eps=0.02)
    tail = (nn.ReLU(), nn.Flatten(), nn.Linear(72, 4))
    with torch.no_grad():
        apart = REAL.margins(nn.Sequential(layer, *tail).eval(), x, y, threat)
        dense_form = REAL.margins(nn.Sequential(folded(layer), *tail).eval(), x, y, threat)
    # Two steps are never tighter than the same function in one.
    assert bool((apart <= dense_form + 1e-5).all())


def test_float32_cancellation_is_covered_and_exact_arithmetic_is_not_enough() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(3, 2, bias=False)).eval()
    with torch.no_grad():
        net[1].weight.copy_(torch.tensor([[1e8, 1.0, -1e8], [0.0, 0.0, 0.0]]))  # type: ignore[operator]
        # In float32 1e8 + 1 is 1e8: every execution that adds from left to right loses the margin of 1.
        x, y = torch.ones(1, 1, 1, 3), torch.tensor([0])
        point = Threat(norm="linf", eps=0)
        assert float(REAL.margins(net, x, y, point)) == pytest.approx(1.0, abs=1e-4)
        lost = torch.tensor(1e8, dtype=torch.float32) + 1 - 1e8
        assert float(lost) == 0.0
        assert float(IBP().margins(net, x, y, point)) <= float(lost)


def test_bounds_are_differentiable_in_the_weights() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).eval()
    x, y = torch.rand(2, 1, 2, 2, generator=generator(4)), torch.tensor([0, 1])
    IBP().margins(net, x, y, Threat(norm="linf", eps=0.1)).sum().backward()  # type: ignore[no-untyped-call]
    assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in net.parameters())


def test_weights_that_train_keep_their_layout_which_a_kernel_of_torch_needs() -> None:
    # Channels-last, the weight gradient of this shortcut writes past its memory (torch 2.13): see `_layout.trained`.
    short = nn.Conv2d(3, 16, 1, stride=2)
    net = nn.Sequential(short, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3)).eval()
    x, y = torch.rand(32, 3, 16, 16, generator=generator(6)), torch.arange(32) % 3
    for certifier in (IBP(), CrownIBP()):
        for _ in range(3):
            certifier.margins(net, x, y, Threat(norm="linf", eps=0.1)).sum().backward()  # type: ignore[no-untyped-call]
    assert short.weight.grad is not None
    assert short.weight.grad.is_contiguous()
    assert trained(net)
    with torch.no_grad():
        assert not trained(net)
    assert not trained(net.requires_grad_(False))


@pytest.mark.parametrize("certifier", [IBP(), CrownIBP(), Crown()], ids=lambda certifier: certifier.kind)
def test_images_taken_in_groups_have_the_bounds_that_they_have_together(
    certifier: Certifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = initial(Arch(builder="small_cnn", options={"width": 4, "hidden": 8}, input_shape=(1, 8, 8), classes=3), 0)
    net.eval()
    x, y = torch.rand(5, 1, 8, 8, generator=generator(7)), torch.tensor([0, 1, 2, 0, 1])
    threat = Threat(norm="linf", eps=0.05)
    with torch.no_grad():
        together = certifier.margins(net, x, y, threat)
        for module in ("ibp", "_sweep"):
            monkeypatch.setattr(f"stages.bounds.{module}._CACHE", 2 * 4 * 64)
        apart = certifier.margins(net, x, y, threat)
    assert torch.allclose(together, apart, atol=1e-5)


def test_a_trace_is_made_anew_when_the_network_changes() -> None:
    conv = nn.Conv2d(1, 2, 3, padding=1)
    net = nn.Sequential(conv, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    x, y, point = torch.rand(1, 1, 5, 5, generator=generator(5)), torch.tensor([0]), Threat(norm="linf", eps=0)
    with torch.no_grad():
        REAL.margins(net, x, y, point)
        conv.stride = (2, 2)
        z = net(x)[0]
        assert float(REAL.margins(net, x, y, point)) == pytest.approx(float(z[0] - z[1]), abs=1e-6)


class Sorted(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1).sort(1).values[:, :2]


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) if float(x.sum()) > 0 else -x.flatten(1)


def test_what_cannot_be_bounded_is_refused_by_name() -> None:
    x, y, threat = torch.rand(1, 1, 2, 2), torch.tensor([0]), Threat(norm="linf", eps=0.1)
    with pytest.raises(InputError, match=r'no rule for operation "sort" in module "0"'):
        IBP().margins(nn.Sequential(Sorted()).eval(), x, y, threat)
    with pytest.raises(InputError, match="Branching cannot be followed"):
        IBP().margins(Branching().eval(), x, y, threat)
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    with pytest.raises(InputError, match="eval mode"):
        IBP().margins(net.train(), x, y, threat)
    rows = torch.ones(1, 1, 2)
    for low, high, message in (
        (x, x - 1, "low <= high"),
        (x, x + torch.inf, "finite"),
        (x, torch.cat([x, x]), "two equal shapes"),
    ):
        with pytest.raises(InputError, match=message):
            IBP().lower(net.eval(), Box(low, high), rows)
    with pytest.raises(InputError, match="rows"):
        IBP().lower(net.eval(), Box(x, x), torch.ones(1, 1, 3))
    with pytest.raises(InputError, match="rows"):
        IBP().lower(net.eval(), Box(x, x), torch.ones(2, 1, 2))


@pytest.mark.parametrize("arithmetic", ["real", "float32"])
def test_bounds_that_float32_cannot_hold_are_no_nan(arithmetic: Literal["real", "float32"]) -> None:
    net = nn.Linear(1, 1, bias=False)
    net.weight.data.fill_(1e30)
    x, rows = torch.tensor([[1.0]]), torch.tensor([[[1e30], [-1e30]]])
    low = IBP(arithmetic=arithmetic).lower(net, Box(x, 2 * x), rows).detach()[0]
    assert 0 < float(low[0]) <= 1e60
    assert float(low[1]) == -math.inf


@pytest.mark.parametrize("method", [IBP(), CrownIBP()], ids=lambda method: method.kind)
def test_gradients_pass_the_rounding_to_the_rows_precision(method: Certifier) -> None:
    last = nn.Linear(3, 2)
    net, x = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), last), torch.full((2, 2), 0.5)
    low = method.lower(net, Box(x, x + 0.1), torch.eye(2).expand(2, 2, 2))
    for row in (0, 1):
        (slope,) = torch.autograd.grad(low[0, row], last.bias, retain_graph=True)
        assert float(slope[row]) == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_half_precision_is_refused(kind: torch.dtype) -> None:
    net, x, rows = nn.Linear(2, 2).requires_grad_(False), torch.rand(1, 2), torch.ones(1, 1, 2)
    for method in (IBP(), CrownIBP()):
        method.lower(net, Box(x, x), rows)
        with pytest.raises(InputError, match="expected float32 or float64"):
            method.lower(net, Box(x.to(kind), x.to(kind)), rows)
    net.to(kind)
    for method in (IBP(), CrownIBP()):
        with pytest.raises(InputError, match=r"cover float32 and float64 alone"):
            method.lower(net, Box(x, x), rows)
