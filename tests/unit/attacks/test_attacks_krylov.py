"""Krylov: products and the tridiagonal matrix against the explicit Hessian, the trust region against brute force."""

import math

import pytest
import torch
from torch import Tensor, nn

from stages.attacks._losses import cross_entropy, gradient
from stages.attacks.krylov import Krylov, lanczos, trust_region
from stages.method import InputError
from stages.oracle import Oracle
from stages.seeding import generator
from stages.threat import Threat

PIXELS = 12
LINF, L2 = Threat(norm="linf", eps=0.05), Threat(norm="l2", eps=0.3)


def net_of(activation: nn.Module, classes: int = 5, dtype: torch.dtype = torch.float64) -> nn.Module:
    net = nn.Sequential(nn.Flatten(), nn.Linear(PIXELS, 20), activation, nn.Linear(20, classes)).to(dtype)
    rng = generator(3, "krylov")
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=rng, dtype=torch.float64))
    return net.requires_grad_(False)


def images(net: nn.Module, count: int = 6, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    x = torch.rand(count, 1, 3, 4, generator=generator(4), dtype=torch.float64).to(dtype)
    return x, net(x).argmax(1)


def hessians(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """[B, D, D], one by one, of the cross-entropy itself: leads here are below 10, so the temperature is 1."""
    found = []
    for image, label in zip(x, y, strict=True):

        def loss(flat: Tensor, label: Tensor = label) -> Tensor:
            z: Tensor = net(flat.view(1, 1, 3, 4))
            return torch.logsumexp(z, 1)[0] - z[0, label]

        found.append(torch.autograd.functional.hessian(loss, image.flatten()))  # type: ignore[no-untyped-call]
    return torch.stack(found)


def slopes(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """[B, D], the gradient of the cross-entropy in float64."""
    point = x.detach().requires_grad_(True)
    (slope,) = torch.autograd.grad(nn.functional.cross_entropy(net(point), y, reduction="sum"), point)
    return slope.flatten(1)


def float64_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attacks lose precision to float32 in the loss on purpose; comparing to 1e-9 needs the loss in float64."""

    def precise(z: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(z.double(), y, reduction="none")

    monkeypatch.setattr("stages.attacks.krylov.cross_entropy", precise)
    monkeypatch.setattr(Tensor, "float", lambda tensor: tensor)


@pytest.mark.parametrize("activation", [nn.Softplus(), nn.SiLU(), nn.ReLU()], ids=repr)
def test_products_are_those_of_the_explicit_hessian(activation: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    net = net_of(activation)
    x, y = images(net)
    h = hessians(net, x, y)
    float64_loss(monkeypatch)
    _, heat, slope, product = Krylov()._expand(net, x, y, LINF)
    assert heat.tolist() == [1.0] * len(x)
    everyone = torch.ones(len(x), dtype=torch.bool)
    for seed in range(3):
        v = torch.randn(len(x), PIXELS, generator=generator(seed), dtype=torch.float64)
        assert torch.allclose(product(v, everyone), torch.einsum("bij,bj->bi", h, v), atol=1e-9)
    small = 1e-5 * v.view_as(x)
    ahead, behind = (Krylov()._expand(net, x + sign * small, y, LINF)[2] for sign in (1, -1))
    assert torch.allclose((ahead - behind).flatten(1) / 2e-5, product(v, everyone), rtol=1e-5, atol=1e-6)
    assert slope.shape == x.shape


def test_secant_products_agree_with_exact_ones_where_the_ball_is_small() -> None:
    net = net_of(nn.Softplus())
    x, y = images(net)
    everyone = torch.ones(len(x), dtype=torch.bool)
    v = torch.randn(len(x), PIXELS, generator=generator(0), dtype=torch.float64)
    v /= v.norm(dim=1, keepdim=True)
    tiny = Threat(norm="l2", eps=2e-3)
    exact, secant = (
        Krylov.load({"curvature": kind})._expand(net, x, y, tiny)[3](v, everyone) for kind in ("exact", "secant")
    )
    assert float((exact - secant).norm() / exact.norm()) < 1e-2


def test_the_secant_feels_a_kink_that_the_hessian_does_not() -> None:
    """|x_0 - 1/2| seen from 0.45: curvature zero there, yet the slope turns within reach."""

    def logits(x: Tensor) -> Tensor:
        bend = (x.flatten(1)[:, :1] - 0.5).abs()
        return torch.cat([bend, -bend], 1)

    x, y = torch.full((1, 1, 3, 4), 0.45), torch.zeros(1, dtype=torch.int64)
    v, everyone = torch.eye(PIXELS)[:1], torch.ones(1, dtype=torch.bool)
    threat = Threat(norm="l2", eps=0.4)
    exact, secant = (
        Krylov(curvature=kind)._expand(logits, x, y, threat)[3](v, everyone) for kind in ("exact", "secant")
    )
    assert float(secant.norm()) > 3 * float(exact.norm())


@pytest.mark.parametrize("activation", [nn.Softplus(), nn.SiLU()], ids=repr)
def test_lanczos_is_orthonormal_and_tridiagonalises_the_hessian(activation: nn.Module) -> None:
    net = net_of(activation)
    x, y = images(net)
    h = hessians(net, x, y)
    g = slopes(net, x, y)
    everyone = torch.ones(len(x), dtype=torch.bool)
    basis, t, size = lanczos(lambda v, _: torch.einsum("bij,bj->bi", h, v), g, everyone, 6)
    assert size.tolist() == [6] * len(x)
    assert torch.allclose(basis @ basis.mT, torch.eye(6, dtype=torch.float64).expand(len(x), 6, 6), atol=1e-8)
    assert torch.allclose(basis @ h @ basis.mT, t, atol=1e-7)
    assert torch.equal(t.triu(2), torch.zeros_like(t))
    krylov = torch.stack([torch.linalg.matrix_power(h, k) @ g[..., None] for k in range(6)], 1)
    outside = krylov.squeeze(-1) - (krylov.squeeze(-1) @ basis.mT) @ basis
    assert bool((outside.norm(dim=2) <= 1e-6 * krylov.squeeze(-1).norm(dim=2)).all())


@pytest.mark.parametrize("shift", [-6.0, -2.0, 0.0, 3.0], ids="shift {}".format)
def test_the_trust_region_agrees_with_brute_force(shift: float) -> None:
    """Negative definite with an interior maximum, indefinite, and positive definite, on a fine grid."""
    rng = generator(7)
    t = torch.randn(8, 2, 2, generator=rng, dtype=torch.float64)
    t = t + t.mT + shift * torch.eye(2, dtype=torch.float64)
    length = torch.rand(8, generator=rng, dtype=torch.float64) + 0.1
    radius = 0.7
    c = trust_region(t, length, radius)
    angle = torch.linspace(0, 2 * math.pi, 3001, dtype=torch.float64)
    rings = radius * torch.linspace(0, 1, 201, dtype=torch.float64).view(-1, 1)
    grid = torch.stack([rings * angle.cos(), rings * angle.sin()], 2).view(-1, 2)

    def q(at: Tensor) -> Tensor:
        return length.view(-1, 1) * at[..., 0] + 0.5 * torch.einsum("b...i,bij,b...j->b...", at, t, at)

    best = q(grid.expand(8, -1, 2)).amax(1)
    mine = q(c.unsqueeze(1)).squeeze(1)
    assert float(c.norm(dim=1).max()) <= radius + 1e-9
    assert bool((mine >= best - 1e-9).all())
    assert bool((mine <= best + 1e-3 * best.abs() + 5e-5).all())


def test_a_fitting_interior_maximum_is_the_newton_point() -> None:
    t = torch.diag_embed(torch.tensor([[-4.0, -5.0]], dtype=torch.float64))
    c = trust_region(t, torch.tensor([1.0], dtype=torch.float64), 1.0)
    assert torch.allclose(c, torch.tensor([[0.25, 0.0]], dtype=torch.float64), atol=1e-9)


def test_larger_subspaces_never_lose_and_the_whole_space_is_the_dense_optimum() -> None:
    net = net_of(nn.SiLU())
    x, y = images(net)
    h, g = hessians(net, x, y), slopes(net, x, y)
    radius, everyone = 0.5, torch.ones(len(x), dtype=torch.bool)

    def q(d: Tensor) -> Tensor:
        return (g * d).sum(1) + 0.5 * torch.einsum("bi,bij,bj->b", d, h, d)

    found = []
    for m in range(1, PIXELS + 1):
        basis, t, _ = lanczos(lambda v, _: torch.einsum("bij,bj->bi", h, v), g, everyone, m)
        found.append(q(torch.einsum("bmd,bm->bd", basis, trust_region(t, g.norm(dim=1), radius))))
    values, vectors = torch.linalg.eigh(h)
    share = torch.einsum("bij,bi->bj", vectors, g)
    low, high = values[:, -1].clamp(min=0), values[:, -1].clamp(min=0) + g.norm(dim=1) / radius
    for _ in range(80):
        mid = (low + high) / 2
        long = (share / (mid[:, None] - values)).norm(dim=1) > radius
        low, high = torch.where(long, mid, low), torch.where(long, high, mid)
    dense = q(torch.einsum("bij,bj->bi", vectors, share / (high[:, None] - values)))
    assert bool((torch.stack(found).diff(dim=0) >= -1e-9).all())
    assert torch.allclose(found[-1], dense, rtol=1e-5)
    assert torch.allclose(found[0], g.norm(dim=1) * radius + 0.5 * radius**2 * _along(h, g), rtol=1e-5)


def _along(h: Tensor, g: Tensor) -> Tensor:
    unit = g / g.norm(dim=1, keepdim=True)
    return torch.einsum("bi,bij,bj->b", unit, h, unit)


def test_relu_nets_have_curvature_of_rank_one_less_than_classes_and_newton_goes_downhill() -> None:
    net = net_of(nn.ReLU(), classes=4)
    x, y = images(net, 10)
    h, g = hessians(net, x, y), slopes(net, x, y)
    everyone = torch.ones(len(x), dtype=torch.bool)
    _, t, size = lanczos(lambda v, _: torch.einsum("bij,bj->bi", h, v), g, everyone, 8)
    assert int(size.max()) <= 3
    for one, count in zip(t, size.tolist(), strict=True):
        values = torch.linalg.eigvalsh(one[:count, :count])
        assert float(values[0]) >= -1e-5 * float(values[-1])
    newton = -torch.einsum("bij,bj->bi", torch.linalg.pinv(h, hermitian=True, rtol=1e-9), g)
    assert bool(((newton * g).sum(1) < 0).all())


def test_with_two_classes_and_relu_it_walks_like_pgd_and_asks_no_more_points() -> None:
    """H is g g^T times a number: the subspace ends at g, no second candidate is asked, one product is charged."""
    net = net_of(nn.ReLU(), classes=2, dtype=torch.float32)
    x, y = images(net, dtype=torch.float32)
    oracle = Oracle.of(net, len(x))
    attack = Krylov(steps=4)
    start = LINF.random(x, generator(0))
    found = attack.perturb(oracle, x, y, LINF, generator(0))
    for _ in range(4):
        start = LINF.project(LINF.ascend(start, gradient(net, start, y, "ce")[2], 2.5 / 4 * LINF.eps), x)
    unbroken = net(found).argmax(1) == y
    assert bool(unbroken.any())
    assert torch.allclose(found[unbroken], start[unbroken], atol=1e-6)
    assert oracle.spent.queries[unbroken].tolist() == [4 + 1] * int(unbroken.sum())
    assert oracle.spent.gradients[unbroken].tolist() == [4 * (1 + 2)] * int(unbroken.sum())


@pytest.mark.parametrize(("curvature", "gradients", "queries"), [("exact", 7, 3), ("secant", 4, 6)])
def test_every_gradient_of_a_step_is_charged(curvature: str, gradients: int, queries: int) -> None:
    """One gradient; three products, each two gradients or one query with its gradient; two candidates."""
    net = net_of(nn.SiLU(), dtype=torch.float32)
    x, y = images(net, dtype=torch.float32)
    oracle = Oracle.of(net, len(x))
    found = Krylov.load({"steps": 2, "curvature": curvature}).perturb(
        oracle, x, y, LINF.model_copy(update={"eps": 1e-3}), generator(0)
    )
    assert bool((net(found).argmax(1) == y).all())
    assert oracle.spent.gradients.tolist() == [2 * gradients] * len(x)
    assert oracle.spent.queries.tolist() == [2 * queries + 1] * len(x)


@pytest.mark.parametrize("threat", [LINF, L2, Threat(norm="l1", eps=0.5)], ids=lambda threat: threat.norm)
@pytest.mark.parametrize("activation", [nn.SiLU(), nn.ReLU()], ids=repr)
def test_a_step_raises_the_loss_and_never_less_than_the_step_along_the_gradient(
    activation: nn.Module, threat: Threat
) -> None:
    net = net_of(activation, dtype=torch.float32)
    x, y = images(net, 40, dtype=torch.float32)
    x = 0.3 + 0.4 * x
    y = net(x).argmax(1)
    threat = threat.model_copy(update={"eps": threat.eps / 20})
    attack, start = Krylov(steps=1, step=1.0), threat.random(x, generator(0))
    found = attack.perturb(net, x, y, threat, generator(0))
    slope = gradient(net, start, y, "ce")[2]
    plain = threat.project(threat.ascend(start, slope, threat.eps), x)
    before, along, mine = (cross_entropy(net(point), y) for point in (start, plain, found))
    right = net(found).argmax(1) == y
    assert int(right.sum()) > 20
    assert bool((mine >= along - 1e-6)[right].all())
    assert bool((mine > before)[right].all())


def test_saturated_examples_still_move() -> None:
    net = net_of(nn.SiLU(), dtype=torch.float32)
    x, y = images(net, dtype=torch.float32)
    found = Krylov(steps=3).perturb(lambda x: 400 * net(x), x, y, LINF, generator(0))
    plain = net(found) - net(LINF.random(x, generator(0)))
    assert bool((plain.gather(1, y[:, None]) < 0).all())


def test_a_flat_network_leaves_the_start() -> None:
    x, y = torch.rand(3, 1, 3, 4), torch.zeros(3, dtype=torch.int64)
    flat = torch.tensor([1.0, 0.0]).expand(3, 2)
    found = Krylov(steps=2).perturb(lambda x: flat + 0 * x.sum(), x, y, LINF, generator(0))
    assert torch.equal(found, LINF.random(x, generator(0)))


def test_a_part_without_a_second_derivative_is_named_and_the_secant_does_without() -> None:
    net = net_of(nn.SiLU(), dtype=torch.float32)
    x, y = images(net, dtype=torch.float32)

    def logits(x: Tensor) -> Tensor:
        z: Tensor = net(nn.functional.scaled_dot_product_attention(x, x, x))
        return z

    y = logits(x).argmax(1)
    with pytest.raises(InputError, match=r'without a second derivative.*set curvature = "secant"'):
        Krylov(steps=1)(logits, x, y, LINF, generator(0))
    Krylov(steps=1, curvature="secant")(logits, x, y, LINF, generator(0))
