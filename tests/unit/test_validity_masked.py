"""Networks that hide their gradients are called out, honest ones are believed; each check fails where it must."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

import stages
from pipeline.core.measurement import wilson
from stages import validity
from stages.attacks.apgd import APGD
from stages.attacks.pgd import PGD
from stages.attacks.square import Square
from stages.evaluate import correct, frozen, under_attack
from stages.finding import Finding, Point, binomial_tail
from stages.oracle import Logits
from stages.seeding import generator
from stages.threat import Threat
from tests.trained import digits, digits_model

PLANTED = Path(stages.__file__).resolve().parents[1] / "tests" / "planted"
THREAT = Threat(norm="linf", eps=0.1)
MULTIPLES = (0.5, 1.0, 2.0, 3.0)


def examples(count: int = 100) -> tuple[Tensor, Tensor]:
    test = digits().test
    return test.floats(slice(0, count)), test.labels[:count]


def survey(logits: Logits, threat: Threat = THREAT) -> dict[str, Finding]:
    x, y = examples()
    points = validity.curve(logits, x, y, threat, MULTIPLES, 0)
    return {finding.name: finding for finding in validity.checks(logits, x, y, threat, 0, points)}


def failed(findings: dict[str, Finding]) -> set[str]:
    return {name for name, finding in findings.items() if not finding.ok}


@pytest.mark.parametrize("recipe", ["natural", "at"])
@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_an_honest_network_passes_every_check(recipe: str, norm: str) -> None:
    threat = Threat.load({"norm": norm, "eps": {"linf": 0.1, "l2": 0.4, "l1": 1.0}[norm]})
    net = digits_model(recipe=recipe).net
    with frozen(net):
        assert float(correct(net, *examples()).float().mean()) > 0.85
        assert failed(survey(net, threat)) == set()


def test_a_network_that_rounds_its_input_is_called_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(PLANTED)
    net = digits_model("masked_cnn").net
    with frozen(net):
        assert float(correct(net, *examples()).float().mean()) > 0.85
        found = survey(net)
    assert {"gradients_present", "gradients_explain", "falls_to_chance", "black_box"} <= failed(found)
    assert "gradients tell 0% of the change" in found["gradients_explain"].text
    assert "(0 (Round) tells 0%); a part that is not smooth must offer" in found["gradients_explain"].text
    assert "100 of 100 images have a loss gradient of exactly zero" in found["gradients_present"].text


def test_a_saturated_network_is_called_out() -> None:
    """Logits times a million: cross-entropy is flat to the last bit where the answer is right."""
    net = digits_model().net
    with frozen(net):
        found = survey(lambda x: net(x) * 1e6)
    assert "gradients_present" in failed(found)


def test_a_dead_band_inside_the_network_is_called_out_and_the_same_network_without_it_is_not() -> None:
    """As in MeanSparse: a hidden value within `width` deviations of its channel's mean is set to the mean.

    Accuracy stays, gradients vanish in the band, and the set that is believed on the plain network is not on this one.
    """
    net = digits_model(recipe="at").net
    assert isinstance(net, torch.nn.Sequential)
    x, y = examples(400)
    with frozen(net):
        hidden = net[:2](digits().train.floats())
        mean, spread = hidden.mean((0, 2, 3), keepdim=True), hidden.std((0, 2, 3), keepdim=True)

        def banded(width: float) -> Logits:
            def logits(image: Tensor) -> Tensor:
                h = net[:2](image)
                z: Tensor = net[2:](torch.where((h - mean).abs() < width * spread, mean.expand_as(h), h))
                return z

            return logits

        class Banded(torch.nn.Module):
            def forward(self, h: Tensor) -> Tensor:
                return torch.where((h - mean).abs() < 0.25 * spread, mean.expand_as(h), h)

        # A quarter of a deviation hides too little for the attacks to disagree, and is found all the same.
        found = survey(torch.nn.Sequential(net[:2], Banded(), net[2:]))
        assert failed(found) == {"gradients_explain"}
        assert "(1 (Banded) tells " in found["gradients_explain"].text
        verdicts = []
        for width in (0.0, 1.0):
            assert float(correct(banded(width), x, y).float().mean()) > 0.85
            margin, apgd, square = (
                under_attack(banded(width), attack, x, y, THREAT, 0)[0]
                for attack in (PGD(loss="margin"), APGD(steps=50), Square(queries=500))
            )
            verdicts.append(validity.black_box(margin & apgd, square).ok)
    assert verdicts == [True, False]


def test_on_a_robust_network_the_margin_breaks_more_than_cross_entropy() -> None:
    """Why the probe climbs the margin: cross-entropy leaves examples that a black box then finds."""
    net = digits_model(recipe="at").net
    x, y = examples(200)
    with frozen(net):
        ce, margin = (under_attack(net, PGD(loss=loss), x, y, THREAT, 0)[0] for loss in ("ce", "margin"))
    assert int(margin.sum()) < int(ce.sum())


def test_probabilities_and_noise_are_called_out() -> None:
    net = digits_model().net
    rng = generator(0)
    with frozen(net):
        assert "not_probabilities" in failed(survey(lambda x: net(x).softmax(1)))
        x, _ = examples()
        noisy = validity.repeatable(lambda x: net(x + 0.01 * torch.randn(x.shape, generator=rng)), x)
        batchy = validity.batch_free(lambda x: net(x - x.mean(0)) + torch.arange(len(x)).view(-1, 1), x)
    assert not noisy.ok
    assert not batchy.ok
    assert "must be <= 0.0001" in noisy.text


def test_accuracy_that_rises_is_called_out_and_noise_within_the_interval_is_not() -> None:
    rising = (Point(0.0, 90, 100), Point(0.1, 40, 100), Point(0.2, 60, 100))
    found = validity.falls_with_eps(rising)
    assert not found.ok
    assert found.text.startswith("accuracy rises with eps: 0.600 at 0.2 must be <= 0.498, the 95 % high at 0.1")
    assert validity.falls_with_eps((Point(0.0, 90, 100), Point(0.1, 40, 100), Point(0.2, 45, 100))).ok
    assert not validity.falls_with_steps((Point(1, 10, 100), Point(20, 50, 100))).ok


def test_the_ladder_goes_from_one_step_to_many() -> None:
    net = digits_model(recipe="at").net
    x, y = examples()
    with frozen(net):
        points = validity.step_curve(net, x, y, THREAT, 0)
    assert [point.at for point in points] == [1, 5, 20, 60]
    assert points[0].hits >= points[-1].hits > 0


def test_the_black_box_test_is_exact_mcnemar() -> None:
    white = torch.ones(50, dtype=torch.bool)
    black = white.clone()
    black[:4] = False
    assert validity.black_box(white, black).ok
    black[:5] = False
    found = validity.black_box(white, black)
    assert not found.ok
    assert "breaks 5 of 50 examples that no gradient attack breaks, gradient attacks 0" in found.text
    assert "p = 0.031, must be >= 0.05" in found.text
    assert validity.black_box(black, white).ok
    assert validity.black_box(white, white).ok


@pytest.mark.parametrize(
    ("hits", "total", "p"), [(0, 0, 1.0), (0, 9, 1.0), (5, 5, 1 / 32), (2, 3, 0.5), (9, 10, 11 / 1024)]
)
def test_the_tail_of_fair_coins(hits: int, total: int, p: float) -> None:
    assert binomial_tail(hits, total) == p


def test_the_interval_is_wilsons() -> None:
    """Against the gate's own, on every share of small samples."""
    for total in (1, 7, 100):
        for hits in range(total + 1):
            assert Point(0.0, hits, total).interval == pytest.approx(wilson(hits, total), abs=1e-12)


def test_the_curve_starts_clean_and_stops_where_everything_is_reachable() -> None:
    net = digits_model().net
    x, y = examples(40)
    with frozen(net):
        points = validity.curve(net, x, y, Threat(norm="linf", eps=0.4), (0.5, 1.0, 3.0, 9.0), 0)
        clean = int(correct(net, x, y).sum())
    assert [point.at for point in points] == [0.0, 0.2, 0.4, 1.0]
    assert points[0].hits == clean
    assert points[-1].hits == 0


def test_eps_zero_is_asked_of_the_attack_itself() -> None:
    calls = 0

    def forgetful(x: Tensor) -> Tensor:
        """Right only when first asked."""
        nonlocal calls
        calls += 1
        right = torch.tensor([[1.0, 0.0]]).expand(len(x), 2)
        return right + 0 * x.flatten(1).sum(1, keepdim=True) if calls < 3 else -right

    x, y = torch.rand(30, 1, 4, 4), torch.zeros(30, dtype=torch.int64)
    found = validity.eps_zero(forgetful, x, y, THREAT, 0)
    assert not found.ok
    assert found.text == "at eps 0, 0 of 30 images survive and 30 are right without an attack; must be equal"
