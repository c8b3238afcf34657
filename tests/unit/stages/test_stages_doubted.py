"""Detectors that only look good: the checks on the attack that knows the detector must call them out."""

import pytest
import torch
from torch import Tensor, nn

from stages import detection, doubted
from stages.attacks.pgd import PGD
from stages.attacks.square import Square
from stages.detectors._adaptive import Adaptive
from stages.detectors.feature_squeezing import FeatureSqueezing
from stages.evaluate import correct, frozen, under_attack
from stages.oracle import Oracle
from stages.seeding import generator
from stages.task import Task
from stages.threat import Threat
from tests.trained import TASK, digits, digits_model

THREAT = Task.load(TASK).threat
BRIEF = Adaptive(steps=10, weights=(0.0, 10.0))


class Detached(FeatureSqueezing):
    """The same copies without any way back for gradients: a detector that hides."""

    def copies(self, x: Tensor) -> Tensor:
        return super().copies(x.detach())


class Shattered(nn.Module):
    """The same answers, with gradients of another function: the lead's sign is turned."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.net(x)
        return z.detach() - (z - z.detach())


def test_copies_with_a_differentiable_twin_are_told_from_copies_without() -> None:
    x = digits().test.floats(slice(0, 40))
    honest = doubted.twins(FeatureSqueezing(squeezers=("bit_1", "bit_5", "median_2", "nlm_5_3_20")), x)
    assert honest.ok, honest.text
    hidden = doubted.twins(Detached(squeezers=("bit_1", "median_2")), x)
    assert not hidden.ok
    assert "tell 0%, 0% of their change" in hidden.text
    assert "must offer its twin" in hidden.text


def test_two_logits_say_wrong_exactly_where_the_answer_is_wrong_and_not_flagged() -> None:
    net, detector = digits_model().net, FeatureSqueezing(squeezers=("bit_2",))
    x, y = digits().test.floats(slice(0, 80)), digits().test.labels[:80].clone()
    y[::2] = (y[::2] + 1) % 10  # so that half of the answers are wrong
    threshold = float(detector.scores(net, x).median())
    plain = Oracle.of(net, len(x))
    both = doubted.Joint(plain.logits, plain.rows, plain.spent, detector=detector, threshold=threshold, y=y)
    slipped = ~correct(net, x, y) & (detector.scores(net, x) <= threshold)
    with torch.no_grad():
        assert torch.equal(both(x).argmax(1) == 1, slipped)
        rows = torch.tensor([3, 60, 11])
        assert torch.allclose(both[rows](x[rows]), both(x)[rows], atol=1e-4)
    assert 0 < int(slipped.sum()) < 80


def test_a_black_box_that_evades_more_than_gradients_is_a_finding_and_what_it_finds_counts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Gradients of the wrong sign lead away from every wrong answer; asking for outputs alone is not fooled."""
    monkeypatch.setattr(doubted, "_SQUARE", Square(queries=100))
    threat = Threat(norm="linf", eps=0.15)
    net = Shattered(digits_model().net)
    detector = FeatureSqueezing(squeezers=("bit_5",), adaptive=BRIEF)
    x, y = digits().test.floats(slice(0, 60)), digits().test.labels[:60]
    with frozen(net):
        threshold = detector.fit(detector.scores(net, digits().holdout.images)).value
        made = detection.judge(detector, threshold, net, x, y, x, threat, 0)
        found = {f.name: f for f in detection.findings(detector, threshold, net, x, y, threat, 0, made)}
    counts = made.counts(BRIEF.weights)
    assert counts["evaded by black box"] > 5
    assert counts["evaded"] == counts["misled"] == sum(n for key, n in counts.items() if key.startswith("evaded by"))
    assert not found["detector_black_box"].ok
    assert "against the detector, square with 100 queries alone breaks" in found["detector_black_box"].text
    assert found["detector_rechecked"].ok


def test_a_network_without_gradients_stands_in_the_whole_ball_and_is_called_out() -> None:
    class Flat(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                z: Tensor = digits_model().net(x)
            return z

    detector = FeatureSqueezing(squeezers=("bit_5",), adaptive=BRIEF)
    x, y = digits().test.floats(slice(0, 30)), digits().test.labels[:30]
    rows = correct(Flat(), x, y)
    found = doubted.falls(detector, 2.0, Flat(), x[rows], y[rows], 0)
    assert not found.ok
    assert "leaves 1.000 of" in found.text


def test_on_an_honest_detector_nothing_is_found_and_a_large_ball_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(doubted, "_SQUARE", Square(queries=30))
    net, detector = digits_model().net, FeatureSqueezing(squeezers=("bit_3", "median_2"), adaptive=BRIEF)
    x, y = digits().test.floats(slice(0, 30)), digits().test.labels[:30]
    with frozen(net):
        threshold = detector.fit(detector.scores(net, digits().holdout.images)).value
        _, plain = under_attack(net, PGD(steps=10, loss="margin"), x, y, THREAT, 0)
        made = detection.judge(detector, threshold, net, x, y, plain, THREAT, 0)
        large = detection.judge(detector, threshold, net, x, y, x, Threat(norm="linf", eps=0.6), 0)
        found = list(detection.findings(detector, threshold, net, x, y, THREAT, 0, made))
    assert [f.name for f in found if not f.ok] == []
    assert int(large.robust.sum()) <= 1
    assert bool((made.evaded >= made.slipped_plain).all())


def test_what_is_proved_is_not_attacked_and_equal_starts_are_climbed_from_once() -> None:
    net, detector = digits_model().net, FeatureSqueezing(squeezers=("bit_5",), adaptive=BRIEF)
    x, y = digits().test.floats(slice(0, 10)), digits().test.labels[:10]
    with frozen(net):
        made = detection.judge(detector, 0.1, net, x, y, x, THREAT, 0, spared=torch.ones(10, dtype=torch.bool))
    assert not made.wrong.any()
    assert not made.asked.any()
    seen: list[int] = []

    def examine(point: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(len(rows))
        return detector.examine(net, point)

    tiny = THREAT.model_copy(update={"eps": 1e-4})
    settings = Adaptive(steps=3, restarts=0, weights=(1.0,), targets=0)
    right = correct(net, x, y)
    with frozen(net):
        settings.evade(examine, 0.1, x[right], y[right], tiny, generator(0), (x[right], x[right].clone()))
    # Both starts are looked at once; then three steps and a last look for the weight, and for the selective one.
    assert seen == [int(right.sum())] * (2 + 2 * 4)
