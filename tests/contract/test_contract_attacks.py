"""Every attack in the folder: ball and range, state untouched, same seed same answer, honest on tiny nets."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import stages.attacks
from stages.attacks.base import FOLDER, Attack
from stages.evaluate import under_attack
from stages.method import InputError, load, names
from stages.oracle import Oracle
from stages.seeding import generator
from stages.threat import Threat
from tests.linear_nets import EPS, NORMS, Norm, with_leads
from tests.stored_examples import stored_for

# Settings that make an attack small, or that it cannot do without.
SETTINGS: dict[str, dict[str, Any]] = {
    "pgd": {"restarts": 2},
    "apgd": {"steps": 25},
    "square": {"queries": 200},
    "latent": {"epochs": 4, "hidden": 16, "samples": 32},
    "ai_gan": {"epochs": 5, "width": 4, "batch": 64, "lr": 0.02},
    "carlini_wagner": {"steps": 60, "searches": 6, "lr": 0.05, "price": 0.01},
    "transfer": {"path": "nowhere", "sha256": 64 * "0"},
    "fab": {"steps": 40},
    "auto": {"steps": 10, "queries": 60},
    "worst_of": {"attacks": ["fgsm", {"kind": "pgd", "steps": 5}]},
}
KINDS = names(FOLDER)
COMPOSED = {"worst_of", "auto"}
# One step along the gradient at x is not meant to find what brute force finds.
ONE_STEP = {"fgsm"}
# What is learnt or stored beforehand is one guess for each of these; it only has to be sound.
LEARNT = {"latent", "ai_gan", "transfer"}
# Share of the optimum that is reached on a linear net with rough weights; windows of three pixels and more are coarse.
REACH: dict[tuple[str, Norm], float] = {("square", "l2"): 0.4, ("latent", "l1"): 0.4, ("ai_gan", "linf"): 0.4}
REACH |= {("transfer", norm): 0.4 for norm in NORMS}


def attack(kind: str) -> Attack:
    return made({"kind": kind, **SETTINGS.get(kind, {})})


def made(data: object) -> Attack:
    return load(FOLDER, Attack, data)  # type: ignore[type-abstract]


def ready(kind: str, net: nn.Module, x: Tensor) -> Attack:
    """The attack, taught on a few batches of noise like x that the network itself has labelled."""
    if kind == "transfer":
        return stored_for(net, x)
    rng = generator(2, "taught")
    batches = []
    for _ in range(4):
        noise = x[torch.randint(len(x), (64,), generator=rng)] + 0.2 * torch.randn(64, *x.shape[1:], generator=rng)
        with torch.no_grad():
            batches.append((noise.clamp(0, 1), net(noise.clamp(0, 1)).argmax(1)))
    return attack(kind).prepare(net, iter(batches), generator(3, "taught"))


def norm_of(kind: str) -> Norm:
    """linf, or another norm where the attack has no version for that."""
    return next(norm for norm in NORMS if norm in attack(kind).norms)


def cases() -> Iterator[tuple[str, Norm]]:
    for kind in KINDS:
        for norm in NORMS:
            if norm in attack(kind).norms:
                yield kind, norm


CASES = list(cases())


def small_net(seed: int = 0) -> nn.Module:
    """Convolution with batch normalisation and dropout, so that a pass in training mode would leave traces."""
    net = nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(8 * 36, 4)
    )
    rng = generator(seed, "net")
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=rng))
    return net.eval()


def images(net: nn.Module, count: int = 12) -> tuple[Tensor, Tensor]:
    x = torch.rand(count, 2, 6, 6, generator=generator(1, "images"))
    x[0], x[1] = 0.0, 1.0
    with torch.no_grad():
        return x, net(x).argmax(1)


def test_the_folder_is_what_is_tested() -> None:
    files = {path.stem for path in Path(stages.attacks.__file__).parent.glob("[a-z]*.py")} - {"base"}
    assert files <= set(KINDS)
    assert {"fgsm", "pgd", "apgd", "square", "worst_of"} <= set(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_it_dumps_and_loads_to_itself_and_refuses_unknown_settings(kind: str) -> None:
    value = attack(kind)
    assert value.dump()["kind"] == kind
    assert made(value.dump()) == value
    with pytest.raises(ValueError, match="steeps"):
        made({**value.dump(), "steeps": 3})


@pytest.mark.parametrize("kind", KINDS)
def test_it_says_what_it_does_and_where_it_comes_from(kind: str) -> None:
    doc = type(attack(kind)).__doc__ or ""
    assert len(doc.strip()) > 80
    assert kind == "worst_of" or "Source:" in doc


@pytest.mark.parametrize(("kind", "norm"), CASES)
@pytest.mark.parametrize("eps", [0.02, 0.3, 2.0])
def test_it_stays_in_ball_and_range_even_before_the_call_projects(kind: str, norm: Norm, eps: float) -> None:
    net, threat = small_net(), Threat(norm=norm, eps=eps)
    x, y = images(net)
    for found in (
        ready(kind, net, x)(net, x, y, threat, generator(0)),
        ready(kind, net, x).perturb(net, x, y, threat, generator(0)),
    ):
        assert found.shape == x.shape
        assert found.dtype == x.dtype
        assert not found.requires_grad
        assert float(threat.distance(found, x).max()) <= eps + 1e-5 * max(1.0, eps)
        assert float(found.min()) >= 0
        assert float(found.max()) <= 1


@pytest.mark.parametrize("kind", [kind for kind, norm in CASES if norm == "linf"])
def test_linf_stays_in_the_ball_to_a_millionth(kind: str) -> None:
    net, threat = small_net(), Threat(norm="linf", eps=8 / 255)
    x, y = images(net)
    assert float((ready(kind, net, x).perturb(net, x, y, threat, generator(0)) - x).abs().max()) <= 8 / 255 + 1e-6


@pytest.mark.parametrize(("kind", "norm"), CASES)
def test_at_eps_zero_nothing_moves(kind: str, norm: Norm) -> None:
    net = small_net()
    x, y = images(net)
    assert torch.equal(ready(kind, net, x)(net, x, y, Threat(norm=norm, eps=0), generator(0)), x)
    assert torch.allclose(ready(kind, net, x).perturb(net, x, y, Threat(norm=norm, eps=0), generator(0)), x, atol=1e-7)


@pytest.mark.parametrize(("kind", "norm"), CASES)
def test_same_seed_same_answer_and_the_global_generator_stays(kind: str, norm: Norm) -> None:
    net, threat = small_net(), Threat(norm=norm, eps=2 * EPS[norm])
    x, y = images(net)
    before = torch.random.get_rng_state()
    first, second = (ready(kind, net, x).perturb(net, x, y, threat, generator(4)) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(("kind", "norm"), CASES)
@pytest.mark.parametrize("training", [False, True])
def test_the_network_is_left_as_it_was(kind: str, norm: Norm, training: bool) -> None:
    net = small_net().train(training)
    # Running statistics move in training mode whoever calls; eval mode of that one layer is the caller's duty.
    net[1].eval()  # type: ignore[index]
    net[5].bias.requires_grad_(False)  # type: ignore[index]
    state = {name: value.clone() for name, value in net.state_dict().items()}
    modes = [module.training for module in net.modules()]
    flags = [parameter.requires_grad for parameter in net.parameters()]
    x, y = images(small_net())
    ready(kind, net, x)(net, x, y, Threat(norm=norm, eps=EPS[norm]), generator(0))
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert [module.training for module in net.modules()] == modes
    assert [parameter.requires_grad for parameter in net.parameters()] == flags
    assert all(parameter.grad is None for parameter in net.parameters())


@pytest.mark.parametrize(("kind", "norm"), CASES)
def test_an_oracle_charges_every_pass_to_the_examples_that_were_in_it(kind: str, norm: Norm) -> None:
    net, threat = small_net(), Threat(norm=norm, eps=2 * EPS[norm])
    x, y = images(net)
    passes = {"queries": 0, "gradients": 0}

    def counted(batch: Tensor) -> Tensor:
        passes["queries"] += len(batch)
        passes["gradients"] += len(batch) * int(torch.is_grad_enabled() and batch.requires_grad)
        out: Tensor = net(batch)
        return out

    oracle = Oracle.of(counted, len(x))
    one = ready(kind, net, x)
    plain, charged = (one.perturb(how, x, y, threat, generator(0)) for how in (net, oracle))
    assert torch.equal(plain, charged)
    spent = int(oracle.spent.queries.sum())
    # Between its members a composition judges what they found, which no example pays for.
    assert 0 < spent <= passes["queries"] if kind in COMPOSED else spent == passes["queries"] > 0
    # Several gradients may be drawn from one pass, and are charged beyond it.
    assert int(oracle.spent.gradients.sum()) >= passes["gradients"]
    assert bool(oracle.spent.gradients.any()) == one.needs_gradients
    assert int(oracle.spent.queries.min()) >= 1


@pytest.mark.parametrize(("kind", "norm"), CASES)
def test_inputs_are_not_written_to(kind: str, norm: Norm) -> None:
    net = small_net()
    x, y = images(net)
    x_before, y_before = x.clone(), y.clone()
    ready(kind, net, x)(net, x, y, Threat(norm=norm, eps=EPS[norm]), generator(0))
    assert torch.equal(x, x_before)
    assert torch.equal(y, y_before)
    assert not x.requires_grad


@pytest.mark.parametrize(("kind", "norm"), CASES)
def test_wrong_examples_and_unbroken_ones_come_back_as_they_are(kind: str, norm: Norm) -> None:
    net, threat = small_net(), Threat(norm=norm, eps=EPS[norm])
    x, y = images(net)
    y[::3] = (y[::3] + 1) % 4
    found = ready(kind, net, x)(net, x, y, threat, generator(0))
    moved = (found != x).flatten(1).any(1)
    with torch.no_grad():
        right, after = net(x).argmax(1) == y, net(found).argmax(1) == y
    assert not bool(moved[~right].any())
    assert bool((moved == (right & ~after)).all())


@pytest.mark.parametrize(("kind", "norm"), CASES)
def test_on_a_linear_net_it_breaks_nothing_that_is_beyond_the_optimum(kind: str, norm: Norm) -> None:
    net, x, y, threat = with_leads(norm, 1.001)
    assert torch.equal(ready(kind, net, x)(net, x, y, threat, generator(0)), x)


@pytest.mark.parametrize(("kind", "norm"), CASES)
def test_on_a_linear_net_it_breaks_what_is_well_within_the_optimum(kind: str, norm: Norm) -> None:
    net, x, y, threat = with_leads(norm, REACH.get((kind, norm), 0.7))
    found = ready(kind, net, x)(net, x, y, threat, generator(0))
    assert bool((found != x).flatten(1).any(1).all())


def tiny_problem(norm: Norm) -> tuple[nn.Module, Tensor, Tensor, Threat]:
    """Two pixels, a net with kinks, and images near its boundaries."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(2, 10), nn.ReLU(), nn.Linear(10, 3))
    rng = generator(11, "tiny")
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=rng))
    x = torch.rand(40, 1, 1, 2, generator=rng)
    with torch.no_grad():
        return net.eval(), x, net(x).argmax(1), Threat(norm=norm, eps=0.15)


def brute_force(net: nn.Module, x: Tensor, y: Tensor, threat: Threat) -> Tensor:
    """The lowest lead of the true class on a grid of 201 x 201 points of each threat, [B]."""
    side = torch.linspace(-threat.eps, threat.eps, 201)
    grid = torch.cartesian_prod(side, side).view(-1, 1, 1, 2)
    grid = grid[threat.distance(grid, torch.zeros_like(grid)) <= threat.eps]
    lowest = []
    for image, label in zip(x, y, strict=True):
        with torch.no_grad():
            z = net((image + grid).clamp(0, 1))
        rest = z.clone()
        rest[:, label] = float("-inf")
        lowest.append((z[:, label] - rest.amax(1)).min())
    return torch.stack(lowest)


@pytest.mark.parametrize(("kind", "norm"), CASES)
def test_it_agrees_with_brute_force_on_two_pixels(kind: str, norm: Norm) -> None:
    net, x, y, threat = tiny_problem(norm)
    lowest = brute_force(net, x, y, threat)
    assert 5 < int((lowest < 0).sum()) < 35
    broken = (ready(kind, net, x)(net, x, y, threat, generator(0)) != x).flatten(1).any(1)
    assert not bool(broken[lowest > 0.05].any())
    if kind not in ONE_STEP | LEARNT:
        assert int((~broken[lowest < -0.05]).sum()) <= 1


@pytest.mark.parametrize("kind", KINDS)
def test_it_takes_a_batch_of_one_and_works_under_autocast(kind: str) -> None:
    net, threat = small_net(), Threat(norm=norm_of(kind), eps=0.1)
    x, y = images(net)
    ready(kind, net, x)(net, x[:1], y[:1], threat, generator(0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = ready(kind, net, x)(net, x, y, threat, generator(0))
    assert found.dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_with_it_is_repeatable_and_never_above_clean(kind: str) -> None:
    net, threat = small_net(), Threat(norm=norm_of(kind), eps=0.02)
    x, y = images(net)
    y[:4] = (y[:4] + 1) % 4
    first, second = (under_attack(net, ready(kind, net, x), x, y, threat, 3, batch=5) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    assert not bool(first[0][:4].any())


@pytest.mark.parametrize("kind", KINDS)
def test_bad_input_is_refused_by_name(kind: str) -> None:
    net, threat = small_net(), Threat(norm=norm_of(kind), eps=0.1)
    x, y = images(net)
    with pytest.raises(InputError, match=r"expected pixels within \[0, 1\], got .*keep normalisation inside"):
        attack(kind)(net, x * 255, y, threat, generator(0))
    with pytest.raises(InputError, match="expected images"):
        attack(kind)(net, x, y[:-1], threat, generator(0))
    with pytest.raises(InputError, match="expected pixels within"):
        attack(kind)(net, x * float("nan"), y, threat, generator(0))
    for norm in set(NORMS) - attack(kind).norms:
        with pytest.raises(InputError, match=f"{kind}: expected a threat in .*got {norm}"):
            attack(kind)(net, x, y, Threat(norm=norm, eps=0.1), generator(0))
