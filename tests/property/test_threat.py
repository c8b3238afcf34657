"""Projection: within ball and range, idempotent, does not stretch; random points and steps are what they say."""

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stages.seeding import generator
from stages.threat import Threat
from tests.linear_nets import NORMS, Norm

_SEEDS = st.integers(0, 2**31)
_EPS = st.one_of(st.just(0.0), st.floats(1e-4, 4.0))
_NORM = st.sampled_from(NORMS)
_SIZES = st.tuples(st.integers(1, 5), st.integers(1, 3), st.integers(1, 6), st.integers(1, 6))


def images(seed: int, shape: tuple[int, ...], edges: bool = True) -> Tensor:
    """Uniform pixels, a third of them exactly black or white."""
    x = torch.rand(shape, generator=generator(seed, "x"))
    kind = torch.randint(0, 6, shape, generator=generator(seed, "edges"))
    return torch.where((kind < 2) & edges, kind.to(x.dtype), x)


def far(seed: int, shape: tuple[int, ...]) -> Tensor:
    return 3 * torch.randn(shape, generator=generator(seed, "far"))


def slack(eps: float) -> float:
    return 1e-6 + 4e-6 * eps


@settings(deadline=None)
@given(_SEEDS, _NORM, _EPS, _SIZES)
def test_a_projected_point_is_in_ball_and_range(
    seed: int, norm: Norm, eps: float, shape: tuple[int, int, int, int]
) -> None:
    x, threat = images(seed, shape), Threat(norm=norm, eps=eps)
    found = threat.project(far(seed, shape), x)
    assert float(threat.distance(found, x).max()) <= eps + slack(eps)
    assert float(found.min()) >= 0
    assert float(found.max()) <= 1


@settings(deadline=None)
@given(_SEEDS, _NORM, _EPS, _SIZES)
def test_projecting_twice_is_projecting_once(
    seed: int, norm: Norm, eps: float, shape: tuple[int, int, int, int]
) -> None:
    x, threat = images(seed, shape), Threat(norm=norm, eps=eps)
    once = threat.project(far(seed, shape), x)
    assert torch.allclose(threat.project(once, x), once, atol=2e-6)


@settings(deadline=None)
@given(_SEEDS, _NORM, _EPS, _SIZES)
def test_the_origin_and_every_inner_point_stay(
    seed: int, norm: Norm, eps: float, shape: tuple[int, int, int, int]
) -> None:
    x, threat = images(seed, shape), Threat(norm=norm, eps=eps)
    assert torch.allclose(threat.project(x, x), x, atol=1e-7)
    inner = threat.random(x, generator(seed, "inner"))
    assert torch.allclose(threat.project(inner, x), inner, atol=2e-6)


@settings(deadline=None)
@given(_SEEDS, _NORM, st.floats(1e-3, 4.0), _SIZES)
def test_projection_does_not_stretch_distances(
    seed: int, norm: Norm, eps: float, shape: tuple[int, int, int, int]
) -> None:
    """Nearest points of convex sets (ball, then box) are non-expansive in the Euclidean norm."""
    x, threat = images(seed, shape), Threat(norm=norm, eps=eps)
    a, b = far(seed, shape), far(seed + 1, shape)
    before = (a - b).flatten(1).norm(dim=1)
    after = (threat.project(a, x) - threat.project(b, x)).flatten(1).norm(dim=1)
    assert bool((after <= before * (1 + 1e-5) + 1e-6).all())


@settings(deadline=None)
@given(_SEEDS, _NORM, _EPS, _SIZES)
def test_random_points_are_within_the_threat(
    seed: int, norm: Norm, eps: float, shape: tuple[int, int, int, int]
) -> None:
    x, threat = images(seed, shape), Threat(norm=norm, eps=eps)
    found = threat.random(x, generator(seed))
    assert float(threat.distance(found, x).max()) <= eps + slack(eps)
    assert float(found.min()) >= 0
    assert float(found.max()) <= 1
    assert torch.equal(found, threat.random(x, generator(seed)))


@settings(deadline=None)
@given(_SEEDS, _NORM, st.floats(1e-3, 1.0), _SIZES)
def test_an_ascent_step_has_its_length_and_gains_most(
    seed: int, norm: Norm, step: float, shape: tuple[int, int, int, int]
) -> None:
    """<grad, move> = step ||grad||_dual, away from the edges; a zero gradient moves nothing."""
    x, threat = images(seed, shape, edges=False).clamp(0.01, 0.99), Threat(norm=norm, eps=1.0)
    grad = torch.randn(shape, generator=generator(seed, "grad"))
    moved = threat.ascend(x, grad, step)
    dual = {"linf": 1.0, "l2": 2.0, "l1": float("inf")}[norm]
    gain = (grad * (moved - x)).flatten(1).sum(1)
    best = step * torch.linalg.vector_norm(grad.flatten(1), ord=dual, dim=1)
    assert torch.allclose(gain, best, rtol=1e-4, atol=1e-5)
    assert float(threat.distance(moved, x).max()) <= step * (1 + 1e-4) + 1e-6
    assert torch.equal(threat.ascend(x, torch.zeros_like(x), step), x)


@pytest.mark.parametrize("norm", NORMS)
def test_the_projection_onto_the_ball_is_the_nearest_point(norm: Norm) -> None:
    """Against a fine grid in two dimensions, with a range so wide that only the ball matters."""
    threat = Threat(norm=norm, eps=0.7, low=-10, high=10)
    side = torch.linspace(-0.7, 0.7, 141)
    grid = torch.tensor(list(product(side.tolist(), side.tolist())))
    grid = grid[threat.distance(grid, torch.zeros_like(grid)) <= 0.7 + 1e-6]
    points = 2 * torch.randn(50, 2, generator=generator(0))
    found = threat.project(points, torch.zeros_like(points))
    best = torch.cdist(points, grid).min(1).values
    assert torch.allclose((found - points).norm(dim=1), best, atol=0.012)


def test_an_l1_step_takes_the_best_pixel_that_can_still_move() -> None:
    threat = Threat(norm="l1", eps=1.0)
    x = torch.tensor([[[[1.0, 0.5]], [[0.0, 0.2]]]])
    grad = torch.tensor([[[[9.0, 2.0]], [[-5.0, 1.0]]]])
    assert threat.ascend(x, grad, 0.25).flatten().tolist() == pytest.approx([1.0, 0.75, 0.0, 0.2])


@pytest.mark.parametrize(("text", "value"), [("8/255", 8 / 255), ("0.1", 0.1), (0, 0.0)])
def test_eps_may_be_written_as_a_fraction(text: str | float, value: float) -> None:
    assert Threat.load({"norm": "linf", "eps": text}).eps == value


@pytest.mark.parametrize("eps", ["8/0", "many", -0.1, float("nan"), float("inf")])
def test_an_impossible_eps_is_refused(eps: object) -> None:
    with pytest.raises(ValueError, match="eps"):
        Threat.load({"norm": "linf", "eps": eps})
