"""Boxes clipped to where a case can still be met: no point that meets it, in float32 as executed, is left out."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from stages.bounds.base import Box
from stages.bounds.crown_forward import CrownForward, Planes
from stages.seeding import generator
from stages.verification.cases import Cases
from stages.verification.clock import Clock
from stages.verification.falsify import Hunt
from stages.verification.prove import Boxes, Splitting, clipped
from stages.verification.vnnlib import Spec
from tests.networks import Single

_INPUTS, _OUTPUTS, _BOXES, _POINTS = 3, 3, 6, 300
_CASES = 2


def networks(seed: int) -> nn.Module:
    rng = generator(seed, "net")
    layers = [nn.Linear(_INPUTS, 8), nn.Linear(8, 8), nn.Linear(8, _OUTPUTS)]
    with torch.no_grad():
        for layer in layers:
            layer.weight.copy_(torch.randn(layer.weight.shape, generator=rng) * (2 / layer.in_features) ** 0.5)
            layer.bias.copy_(torch.randn(layer.bias.shape, generator=rng))
    bend = (nn.ReLU, nn.Tanh, nn.Identity)[seed % 3]  # without a bend the half-spaces are exact
    return nn.Sequential(layers[0], bend(), layers[1], bend(), layers[2]).eval()


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("double", [False, True])
def test_no_point_that_meets_a_case_is_clipped_away(seed: int, double: bool) -> None:
    net, rng = networks(seed), generator(seed, "boxes")
    low = torch.randn(_BOXES, _INPUTS, generator=rng)
    low[:, 2] = 0.5  # an input that is fixed
    high = low + torch.tensor([1.0, 0.5, 0.0]) * torch.rand(_BOXES, 1, generator=rng)
    x = low.unsqueeze(1) + torch.rand(_BOXES, _POINTS, _INPUTS, generator=rng) * (high - low).unsqueeze(1)
    rows = torch.randint(-2, 3, (_OUTPUTS, _OUTPUTS), generator=rng).double() + 3 * torch.eye(_OUTPUTS)
    with torch.no_grad():
        values = net(x).double() @ rows.T  # [B, P, U]
        bounds = torch.full((_BOXES, _CASES, _OUTPUTS), torch.inf, dtype=torch.float64)
        bounds[:, 0, :2] = values[..., :2].quantile(0.15, 1)
        bounds[:, 1, 2] = values[..., 2].quantile(0.02, 1)
        found = CrownForward(double=double).planes(net, Box(low, high), rows.expand(_BOXES, -1, -1))
        some = Boxes(
            low, high, torch.zeros(_BOXES), torch.ones(_BOXES, _CASES, dtype=torch.bool), torch.zeros_like(low)
        )
        left = clipped(some, found, bounds)
        assert (left.high - left.low).sum() < (high - low).sum()
        for case in range(_CASES):

            def meets(points: Tensor, case: int = case) -> Tensor:
                met: Tensor = (net(points).double() @ rows.T <= bounds[:, case].unsqueeze(1)).all(2)
                return met

            for points in (x, *farthest(x, low, high, meets)):
                inside = ((points >= left.low.unsqueeze(1)) & (points <= left.high.unsqueeze(1))).all(2)
                assert (inside & left.still[:, case].unsqueeze(1) | ~meets(points)).all()


def farthest(x: Tensor, low: Tensor, high: Tensor, meets: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Points that meet the case moved along every side, either way, as far as they still do."""
    found = []
    for side in range(_INPUTS):
        for end in (low, high):
            stays, goes = x.clone(), x.clone()
            goes[..., side] = end[:, side].unsqueeze(1)
            for _ in range(30):
                middle = (stays + goes) / 2
                met = meets(middle).unsqueeze(2)
                stays, goes = torch.where(met, middle, stays), torch.where(met, goes, middle)
            found.append(stays)
    return found


@pytest.mark.parametrize("seed", range(3))
def test_a_plane_stays_below_and_reaches_the_bound(seed: int) -> None:
    net, rng = networks(seed), generator(seed, "planes")
    low = torch.rand(4, _INPUTS, generator=rng)
    high = low + 0.02 * torch.rand(4, _INPUTS, generator=rng)
    rows = torch.eye(_OUTPUTS, dtype=torch.float64).expand(4, -1, -1)
    with torch.no_grad():
        found = CrownForward().planes(net, Box(low, high), rows)
        ends = torch.where(found.slopes > 0, low.unsqueeze(1), high.unsqueeze(1))
        least = (found.slopes * ends).sum(2) + found.offset
        assert (least <= found.lower + 1e-12).all()
        torch.testing.assert_close(least, found.lower, rtol=0, atol=1e-4)
        share = torch.rand(500, 4, _INPUTS, generator=rng)
        x = torch.cat([low + share * (high - low), ends.float().transpose(0, 1)])
        plane = torch.einsum("pbn,brn->pbr", x.double(), found.slopes) + found.offset
        assert (plane <= net(x).double()).all()


def test_what_exact_bounds_say_of_an_input_is_said_of_that_input() -> None:
    """Inputs that are fixed everywhere have no column, and the boxes that are close have more of those."""
    net, rows = networks(0), torch.eye(_OUTPUTS, dtype=torch.float64)
    low = torch.tensor([[0.5, 0.1, 0.2], [0.5, -0.3, 0.4]])
    high = low + torch.tensor([[0.0, 0.0, 0.1], [0.0, 0.1, 0.1]])
    splitting = Splitting(net, cases(rows), CrownForward(double=False), CrownForward(), None)  # type: ignore[arg-type]
    with torch.no_grad():
        exact = CrownForward().planes(net, Box(low, high), rows.expand(2, -1, -1))
        bounds = torch.stack([exact.lower[0] + 1e-6, exact.lower[1] - 1]).unsqueeze(1)  # the first box is close
        still = torch.ones(2, 1, dtype=torch.bool)
        some = Boxes(low, high, torch.zeros(2, dtype=torch.int64), still, torch.zeros_like(low))
        found = splitting._planes(some, torch.arange(_OUTPUTS), bounds)
    assert found.free.tolist() == [1, 2]
    torch.testing.assert_close(found.slopes[0, :, 1], exact.slopes[0, :, 1])


def cases(rows: Tensor) -> Cases:
    one, none = torch.zeros(1, _INPUTS), torch.zeros(1, dtype=torch.bool)
    bounds = torch.zeros(1, len(rows), dtype=torch.float64)
    spec = Spec(_INPUTS, _OUTPUTS, ())
    return Cases(spec, one, one, none, one, one, rows, bounds, torch.zeros(1, dtype=torch.int64))


def test_boxes_that_cannot_be_cut_stay_open() -> None:
    """Between two neighbours there is nothing to bound apart: a step inside leaves it open, and that is the answer."""
    low = torch.tensor([[0.5, 0.25]])
    high = torch.nextafter(low, low + 1)
    net = Single(lambda x: torch.cat([x[:, :1] > 0.5, x[:, :1] <= 0.5], 1).float()).eval()
    rows, bounds = torch.ones(1, 2, dtype=torch.float64), torch.tensor([[0.5]], dtype=torch.float64)
    none, first = torch.zeros(1, dtype=torch.bool), torch.zeros(1, dtype=torch.int64)
    asked = Cases(Spec(2, 2, ()), low, high, none, low, high, rows, bounds, first)
    hunt = Hunt(net, asked, lambda _: False, generator(0, "hunt"), particles=1)
    clock = Clock(300.0)
    done, witness = Splitting(net, asked, CrownForward(double=False), CrownForward(), hunt).run(first, clock)
    assert (done, witness) == (False, None)
    assert clock.left() > 0


@pytest.mark.parametrize(
    ("slope", "offset", "left"), [(1e-35, 0.0, 2e9), (1e-35, torch.nan, 1e10), (torch.inf, 0.0, 0)]
)
def test_planes_that_are_faint_or_no_numbers_leave_what_they_say_nothing_about(
    slope: float, offset: float, left: float
) -> None:
    low, high = torch.zeros(1, 1), torch.full((1, 1), 1e10)
    some = Boxes(low, high, torch.zeros(1), torch.ones(1, 1, dtype=torch.bool), torch.zeros_like(low))
    ends = torch.tensor([[offset]], dtype=torch.float64)
    slopes = torch.full((1, 1, 1), slope).double()
    found = Planes(torch.full_like(ends, -1.0), ends, slopes, torch.zeros_like(slopes), torch.zeros(1).long())
    cut = clipped(some, found, torch.full((1, 1, 1), 2e-26, dtype=torch.float64))
    assert bool(cut.still.all())
    assert float(cut.low) == 0
    assert float(cut.high) >= left
