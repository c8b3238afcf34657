"""Each loss against its formula on four numbers, on networks whose attacks are known in closed form."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stages.method import load
from stages.recipes.at import AdversarialTraining
from stages.recipes.base import FOLDER, Recipe
from stages.recipes.fast import NoisyFGSM
from stages.recipes.fixed import Fixed
from stages.recipes.natural import Natural
from stages.recipes.trades import Trades, divergence
from stages.threat import Threat

BASE: type[Recipe] = Recipe  # type: ignore[type-abstract]  # only asked for its subclasses
LINF = Threat(norm="linf", eps=0.1)


class Scores(nn.Module):
    """Four pixels, two classes, logits (w . x, 0): everything is computable by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        z = x.flatten(1) @ self.w
        return torch.stack([z, torch.zeros_like(z)], dim=1)


X = torch.tensor([0.5, 0.5, 0.5, 0.5], dtype=torch.float64).view(1, 1, 2, 2)
Z = 0.5 * (1 - 2 + 0.5 + 3)
L1 = 1 + 2 + 0.5 + 3


def _rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _softplus(z: float) -> float:
    return math.log1p(math.exp(z))


def _sigmoid(z: float) -> float:
    return 1 / (1 + math.exp(-z))


def _kl(p: float, q: float) -> float:
    return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))


def _y(label: int) -> Tensor:
    return torch.tensor([label])


@pytest.mark.parametrize("label", [0, 1])
def test_natural_is_cross_entropy(label: int) -> None:
    value, logs = Natural().loss(Scores(), X, _y(label), LINF, _rng(), 0.0)
    assert value.item() == pytest.approx(_softplus(-Z if label == 0 else Z), rel=1e-12)
    assert logs == {}


@pytest.mark.parametrize("label", [0, 1])
@pytest.mark.parametrize("start", ["uniform", "zero"])
def test_adversarial_training_reaches_the_worst_corner(label: int, start: str) -> None:
    # For a linear score the worst case is exact: the margin falls by eps ||w||_1.
    recipe = AdversarialTraining.load({"steps": 10, "step": 0.25, "start": start})
    value, logs = recipe.loss(Scores(), X, _y(label), LINF, _rng(), 0.0)
    worst = Z - 0.1 * L1 if label == 0 else Z + 0.1 * L1
    assert value.item() == pytest.approx(_softplus(-worst if label == 0 else worst), rel=1e-9)
    assert float(logs["accuracy.train"]) == float(label == 0)


def test_fast_without_noise_is_one_step_and_is_not_projected() -> None:
    value, _ = NoisyFGSM(noise=0.0, alpha=2.5).loss(Scores(), X, _y(0), LINF, _rng(), 0.0)
    assert value.item() == pytest.approx(_softplus(-(Z - 0.25 * L1)), rel=1e-12)


def test_fast_steps_from_the_noisy_point() -> None:
    seen: list[Tensor] = []

    class Spy(Scores):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x.detach().clone())
            return Scores.forward(self, x)

    x = torch.rand(64, 1, 2, 2, dtype=torch.float64, generator=_rng(1))
    NoisyFGSM().loss(Spy(), x, torch.zeros(64, dtype=torch.int64), LINF, _rng(), 0.0)
    noisy, adversarial = seen
    assert (noisy - x).abs().max() <= 0.2 + 1e-12
    assert (noisy - x).abs().max() > 0.18  # twice eps, not eps
    step = -0.1 * torch.tensor([1.0, -1.0, 1.0, 1.0], dtype=torch.float64).view(1, 1, 2, 2)
    assert torch.allclose(adversarial, (noisy + step).clamp(0, 1), rtol=0, atol=1e-12)
    assert (adversarial - x).abs().max() > 0.25  # beyond the ball, as published


def test_fast_clips_to_the_range() -> None:
    seen: list[Tensor] = []

    class Spy(Scores):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x.detach().clone())
            return Scores.forward(self, x)

    x = torch.tensor([0.0, 1.0, 0.0, 1.0], dtype=torch.float64).view(1, 1, 2, 2)
    NoisyFGSM().loss(Spy(), x, _y(0), Threat(norm="linf", eps=0.5), _rng(), 0.0)
    assert all(float(points.min()) >= 0 and float(points.max()) <= 1 for points in seen)


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_fast_in_other_norms_stays_within_noise_and_step(norm: str) -> None:
    seen: list[Tensor] = []

    class Spy(Scores):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x.detach().clone())
            return Scores.forward(self, x)

    threat = Threat.load({"norm": norm, "eps": 0.3})
    x = torch.rand(32, 1, 2, 2, dtype=torch.float64, generator=_rng(1))
    NoisyFGSM().loss(Spy(), x, torch.zeros(32, dtype=torch.int64), threat, _rng(), 0.0)
    assert float(threat.distance(seen[0], x).max()) <= 0.6 + 1e-9
    assert float(threat.distance(seen[1], x).max()) <= 0.9 + 1e-9


def test_trades_is_its_formula() -> None:
    # The KL of a two-class softmax grows with |z' - z|; the farther end of the interval z +- eps ||w||_1 is worst.
    value, logs = Trades(beta=6.0, steps=20).loss(Scores(), X, _y(1), LINF, _rng(), 0.0)
    p = _sigmoid(Z)
    ends = [_kl(p, _sigmoid(Z + sign * 0.1 * L1)) for sign in (-1, 1)]
    assert min(abs(float(logs["kl"]) - end) for end in ends) < 1e-9
    assert value.item() == pytest.approx(_softplus(Z) + 6.0 * float(logs["kl"]), rel=1e-12)
    assert float(logs["loss.natural"]) == pytest.approx(_softplus(Z), rel=1e-12)


def test_trades_with_beta_zero_is_cross_entropy_with_its_gradient() -> None:
    one, two = Scores(), Scores()
    value, _ = Trades(beta=0.0).loss(one, X, _y(0), LINF, _rng(), 0.0)
    expected, _ = Natural().loss(two, X, _y(0), LINF, _rng(), 0.0)
    value.backward()  # type: ignore[no-untyped-call]
    expected.backward()  # type: ignore[no-untyped-call]
    assert value.item() == expected.item()
    assert one.w.grad is not None
    assert two.w.grad is not None
    assert torch.allclose(one.w.grad, two.w.grad, rtol=0, atol=1e-15)


def test_trades_without_steps_has_no_gap() -> None:
    _, logs = Trades(steps=0).loss(Scores(), X, _y(0), LINF, _rng(), 0.0)
    assert float(logs["kl"]) == 0.0


def test_trades_differentiates_both_arguments() -> None:
    # d KL(p || q) / d w with p = sigmoid(z), q = sigmoid(z'): the part through p would be missing were p detached.
    net = Scores()
    _, logs = Trades(beta=1.0, steps=20).loss(net, X, _y(0), LINF, _rng(), 0.0)
    value, _ = Trades(beta=1.0, steps=20).loss(net, X, _y(0), LINF, _rng(), 0.0)
    (grad,) = torch.autograd.grad(value, net.w)
    p = _sigmoid(Z)
    gaps = {sign: _kl(p, _sigmoid(Z + sign * 0.1 * L1)) for sign in (-1, 1)}
    sign = min(gaps, key=lambda s: abs(gaps[s] - float(logs["kl"])))
    z_adv = Z + sign * 0.1 * L1
    q = _sigmoid(z_adv)
    x_adv = X.flatten() + sign * 0.1 * net.w.detach().sign()
    through_p = p * (1 - p) * (Z - z_adv) * X.flatten()
    through_q = (q - p) * x_adv
    natural = (p - 1) * X.flatten()
    assert torch.allclose(grad, natural + through_p + through_q, rtol=0, atol=1e-9)


def test_divergence_is_zero_on_equals_positive_else_and_asymmetric() -> None:
    a = torch.randn(50, 7, dtype=torch.float64, generator=_rng(1))
    b = torch.randn(50, 7, dtype=torch.float64, generator=_rng(2))
    assert torch.equal(divergence(a, a), torch.zeros(50, dtype=torch.float64))
    assert bool((divergence(a, b) > 0).all())
    assert torch.allclose(divergence(a, b), divergence(a + 3.0, b - 1.0))
    expected = (a.softmax(1) * (a.softmax(1) / b.softmax(1)).log()).sum(1)
    assert torch.allclose(divergence(a, b), expected)


def test_given_weights_pass_the_loss_of_the_later_recipe_on() -> None:
    recipe: dict[str, Any] = {"kind": "at", "steps": 3}
    value, _ = Fixed.load({"retune": recipe}).loss(Scores(), X, _y(0), LINF, _rng(), 0.0)
    expected, _ = AdversarialTraining(steps=3).loss(Scores(), X, _y(0), LINF, _rng(), 0.0)
    assert value.item() == expected.item()


def test_the_monitor_of_fast_is_pgd_accuracy() -> None:
    x = torch.rand(200, 1, 2, 2, dtype=torch.float32, generator=_rng(1))
    net = Scores().float()
    y = (net(x).argmax(1)).detach()
    margin = (x.flatten(1) @ net.w.detach()).abs()
    robust = float((margin > 0.1 * L1).float().mean())
    found = NoisyFGSM().monitor(net, x, y, Threat(norm="linf", eps=0.1), _rng())
    # Exact but for points whose worst corner the pixel range cuts off.
    assert robust <= found["accuracy.pgd"] <= robust + 0.2
    assert found["accuracy.pgd"] < 0.95


@pytest.mark.parametrize("kind", ["at", "fast", "trades"])
def test_a_ramp_lets_eps_grow_linearly(kind: str) -> None:
    recipe = load(FOLDER, BASE, {"kind": kind, "ramp": 0.5})
    plain = load(FOLDER, BASE, kind)

    def loss(recipe: Recipe, eps: float, progress: float) -> float:
        return float(recipe.loss(Scores(), X, _y(0), Threat(norm="linf", eps=eps), _rng(), progress)[0].detach())

    assert loss(recipe, 0.1, 0.0) == pytest.approx(_softplus(-Z), rel=1e-9)
    assert loss(recipe, 0.1, 0.125) == pytest.approx(loss(plain, 0.025, 0.0), rel=1e-9)
    assert loss(recipe, 0.1, 0.5) == loss(recipe, 0.1, 0.9) == loss(plain, 0.1, 0.0)
