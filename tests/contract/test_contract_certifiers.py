"""What every certifier promises; a new file in the folder is held to it unasked. What is none proves nowhere."""

from collections.abc import Callable
from functools import cache

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from stages import export, validate
from stages.bounds.base import FOLDER, Ball, Bounds, Box, Certifier, Estimator, lead_rows
from stages.bounds.quantised import Quantised
from stages.bounds.smoothing import Smoothing
from stages.method import InputError, load, names, type_of
from stages.nn.arch import Arch
from stages.seeding import generator
from stages.threat import Threat
from stages.trial import prove

TYPES = {kind: type_of(FOLDER, Bounds, kind) for kind in names(FOLDER)}
KINDS = [kind for kind, method in TYPES.items() if issubclass(method, Certifier)]
OTHERS = [kind for kind in TYPES if kind not in KINDS]
QUICK = {"steps": 5, "box_steps": 2, "seconds": 300, "limit": 4}
THREATS = [Threat(norm="linf", eps=0.05), Threat(norm="l2", eps=0.3), Threat(norm="l1", eps=0.5)]


def certifier(kind: str) -> Certifier:
    """With few steps and domains, and so much time that answers do not depend on it."""
    fields = type_of(FOLDER, Certifier, kind).model_fields  # type: ignore[type-abstract]
    return load(FOLDER, Certifier, {"kind": kind, **{k: v for k, v in QUICK.items() if k in fields}})  # type: ignore[type-abstract]


@cache
def batch() -> tuple[nn.Module, Tensor, Tensor]:
    with torch.random.fork_rng(devices=[]):
        net = Arch(builder="small_cnn", options={"width": 4, "hidden": 16}, input_shape=(1, 8, 8), classes=4).build()
    rng = generator(0, "contract")
    with torch.no_grad():
        for value in net.parameters():
            value.copy_(torch.randn(value.shape, generator=rng) * 0.3)
    return net, torch.rand(4, 1, 8, 8, generator=rng), torch.tensor([0, 1, 2, 3])


def test_there_are_certifiers_and_others() -> None:
    assert {"ibp", "quantised", "branch_and_bound"} <= set(KINDS)
    assert OTHERS == ["etb", "smoothing"]


NAN, INF = float("nan"), float("inf")
BAD_BOXES: list[tuple[Callable[[Tensor], Box], str]] = [
    (lambda x: Box(x * NAN, x), "finite bounds with low <= high"),
    (lambda x: Box(x - INF, x), "finite bounds with low <= high"),
    (lambda x: Box(x + 0.1, x), "finite bounds with low <= high"),
    (lambda x: Box((255 * x).byte(), (255 * x).byte()), "expected float32 or float64, got torch.uint8"),
    (lambda x: Box(x.half(), x.half()), "expected float32 or float64, got torch.float16"),
    (lambda x: Box(x[:1], x), "expected two equal shapes"),
    (lambda x: Box(x[..., :4], x), "expected two equal shapes"),
    (lambda x: Box(x[:0], x[:0]), "expected two equal shapes"),
    (lambda x: Box(x, x, Ball(x[:1], "l2", 0.1)), "ball: expected centres"),
    (lambda x: Box(x, x, Ball(x.long(), "l1", 0.1)), "ball: expected centres"),
    (lambda x: Box(x, x, Ball(x * NAN, "l1", 0.1)), "ball: expected centres"),
    (lambda x: Box(x, x, Ball(x, "l2", -1.0)), "a finite eps of at least 0, got l2 and -1"),
    (lambda x: Box(x, x, Ball(x, "l2", NAN)), "a finite eps of at least 0, got l2 and nan"),
    (lambda x: Box(x, x, Ball(x, "linf", 0.1)), "expected l2 or l1"),  # type: ignore[arg-type]
]
BAD_ROWS: list[tuple[Callable[[Tensor], Tensor], str]] = [
    (lambda rows: rows[:1], "rows: expected"),
    (lambda rows: rows[0], "rows: expected"),
    (lambda rows: torch.cat([rows, rows], 2), "rows: expected"),
    (lambda rows: rows.long(), "rows: expected finite numbers"),
    (lambda rows: rows * NAN, "rows: expected finite numbers"),
    (lambda rows: rows / 0, "rows: expected finite numbers"),
]


@pytest.mark.parametrize("kind", KINDS)
def test_what_cannot_be_a_question_is_refused(kind: str) -> None:
    method, (net, x, y) = certifier(kind), batch()
    rows = lead_rows(net, x, y)
    for box, message in BAD_BOXES:
        with pytest.raises(InputError, match=message):
            method.lower(net, box(x), rows)
    for change, message in BAD_ROWS:
        with pytest.raises(InputError, match=message):
            method.lower(net, Box(x, x), change(rows))
    for images, labels in ((x, y[:1]), (x, y + 1), (x, y - 1), (x, y.float()), ((255 * x).byte(), y)):
        with pytest.raises(InputError, match="certifier: expected"):
            method.margins(net, images, labels, THREATS[0])


@pytest.mark.parametrize("kind", OTHERS)
def test_what_is_no_certifier_gets_no_certified_figure_anywhere(kind: str) -> None:
    """Not by a spec, not inside another certifier, not handed over in code; it has not even the verb."""
    method: Bounds = load(FOLDER, Bounds, kind)
    assert isinstance(method, Estimator | Smoothing)
    assert not hasattr(method, "lower")
    assert not hasattr(method, "margins")
    for config in (validate.Config, export.Config):
        for given in (kind, {"kind": kind}, method):
            with pytest.raises(
                ValidationError, match=f"{kind} .*it never counts as certified; .*audit --certify {kind}"
            ):
                config.load({"certify": [given]})
    with pytest.raises(ValidationError, match="never counts as certified"):
        Quantised.load({"inner": kind})
    net, x, y = batch()
    with pytest.raises(InputError, match="never counts as certified"):
        prove(net, x, y, 4, THREATS[0], {kind: method}, lambda _: lambda *_: None)  # type: ignore[dict-item]


@pytest.mark.parametrize("kind", KINDS)
def test_dumps_and_loads_to_itself(kind: str) -> None:
    assert load(FOLDER, Certifier, certifier(kind).dump()) == certifier(kind)  # type: ignore[type-abstract]


@pytest.mark.parametrize("threat", THREATS, ids=lambda threat: threat.norm)
@pytest.mark.parametrize("kind", KINDS)
def test_never_above_a_margin_that_any_point_of_the_threat_has(kind: str, threat: Threat) -> None:
    net, x, y = batch()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with torch.no_grad():
        bound = certifier(kind).margins(net, x, y, threat)
    assert bound.shape == (4,)
    rng, worst = generator(1, kind), torch.full((4,), torch.inf)
    rows = lead_rows(net, x, y)
    for r in range(rows.shape[1]):
        point = threat.random(x, rng)
        for _ in range(15):
            point = point.detach().requires_grad_()
            leads = torch.einsum("brk,bk->br", rows, net(point))
            worst = torch.minimum(worst, leads.detach().amin(1))
            (grad,) = torch.autograd.grad(leads[:, r].sum(), point)
            point = threat.project(threat.ascend(point, -grad, threat.eps / 4), x)
    assert bool((bound <= worst).all())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert not net.training


@pytest.mark.parametrize("kind", KINDS)
def test_exact_on_an_affine_network(kind: str) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3)).eval()
    rng = generator(2, kind)
    low = torch.rand(2, 1, 2, 2, generator=rng)
    high = low + torch.rand(low.shape, generator=rng)
    rows = torch.randn(2, 2, 3, generator=rng)
    layer = net[1]
    assert isinstance(layer, nn.Linear)
    with torch.no_grad():
        for value in layer.parameters():
            value.copy_(torch.rand(value.shape, generator=rng) - 0.5)
        bound = certifier(kind).lower(net, Box(low, high), rows)
        slopes = rows @ layer.weight
        ends = torch.where(slopes > 0, low.flatten(1).unsqueeze(1), high.flatten(1).unsqueeze(1))
        exact = (slopes * ends).sum(2) + rows @ layer.bias
    # Below, and by no more than what summing a handful of float32 products may lose, outward at every step.
    assert bool((bound <= exact + 1e-6).all())
    assert torch.allclose(bound, exact, atol=4e-5, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_same_question_same_answer_and_a_network_in_training_is_refused(kind: str) -> None:
    net, x, y = batch()
    with torch.no_grad():
        first, second = (certifier(kind).margins(net, x, y, THREATS[0]) for _ in range(2))
    assert torch.equal(first, second)
    with pytest.raises(InputError, match="eval mode"):
        certifier(kind).margins(nn.Sequential(net).train(), x, y, THREATS[0])
    net.eval()
