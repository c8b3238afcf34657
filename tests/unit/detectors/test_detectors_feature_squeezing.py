"""The joint score by hand, the paper's squeezers, names that are refused, and the attack that knows the detector."""

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from stages.attacks.pgd import PGD
from stages.detectors._adaptive import Adaptive, Evaded
from stages.detectors._squeezers import bit_depth, median_2x2, non_local_means
from stages.detectors.feature_squeezing import FeatureSqueezing
from stages.evaluate import correct, frozen, under_attack
from stages.method import InputError
from stages.seeding import generator
from stages.task import Task
from stages.threat import Threat
from tests.trained import TASK, digits, digits_model

THREAT = Task.load(TASK).threat
DETECTOR = FeatureSqueezing(squeezers=("bit_2", "nlm_5_3_20"))


def test_the_score_is_the_largest_distance_of_probabilities() -> None:
    z = torch.tensor([[0.0, 0.0], [2.0, -1.0]])
    others = torch.tensor([[[0.0, 0.0], [0.0, 0.0]], [[torch.log(torch.tensor(3.0)), 0.0], [2.0, -1.0]]])
    p = torch.tensor([2.0, -1.0]).softmax(0)
    expected = torch.tensor([[0.0, 2 * (float(p[0]) - 0.5)], [0.5, 0.0]])  # (3/4, 1/4) against (1/2, 1/2) is 1/2 apart
    assert torch.allclose(FeatureSqueezing().suspicions(z, others), expected, atol=1e-6)
    far = FeatureSqueezing().suspicions(torch.tensor([[99.0, -99.0]]), torch.tensor([[[-99.0, 99.0]]]))
    assert far.tolist() == [[2.0]]


def test_without_a_list_it_is_the_papers_joint_detector() -> None:
    grey, colour = torch.rand(2, 1, 9, 9, generator=generator(0)), torch.rand(2, 3, 9, 9, generator=generator(1))
    assert torch.equal(FeatureSqueezing().copies(grey), torch.stack([bit_depth(grey, 1), median_2x2(grey)]))
    expected = torch.stack([bit_depth(colour, 5), median_2x2(colour), non_local_means(colour, 13, 3, 2)])
    assert torch.equal(FeatureSqueezing().copies(colour), expected)


@pytest.mark.parametrize(
    "name", ["bit_0", "bit_9", "median_3", "nlm_4_3_2", "nlm_5_2_2", "nlm_5_3_0", "nlm_5_3", "jpeg"]
)
def test_squeezers_that_are_none_are_refused_with_the_forms(name: str) -> None:
    with pytest.raises(ValidationError, match=f'"bit_1" to "bit_8", "median_2", or .* got "{name}"'):
        FeatureSqueezing.load({"squeezers": [name]})
    with pytest.raises(InputError, match=r"expected images \[B, C, H, W\], got \(2, 784\)"):
        FeatureSqueezing().copies(torch.zeros(2, 784))


def test_a_squeezer_that_changes_nothing_is_never_suspicious() -> None:
    x = digits().test.floats(slice(0, 20))
    assert float(FeatureSqueezing(squeezers=("bit_8",)).scores(digits_model(epochs=2).net, x).max()) == 0


class Blind(nn.Module):
    """Two classes by the mean of the first column; the second column is all that the detector below looks at."""

    def forward(self, x: Tensor) -> Tensor:
        lead = (x[:, 0, :, 0].mean(1) - 0.5) * 20
        return torch.stack([-lead, lead], 1)


def second_column(x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """A detector of mean(second column) > mean(first column) - 0.3: evaded by moving both, which is 0.5 apart here."""
    del rows
    gap = x[:, 0, :, 0].mean(1) - x[:, 0, :, 1].mean(1) - 0.3
    return Blind()(x), gap.unsqueeze(0)


def evade(settings: Adaptive, eps: float) -> Evaded:
    x = torch.full((6, 1, 4, 2), 0.45)
    labels = torch.zeros(6, dtype=torch.int64)
    threat = Threat(norm="linf", eps=eps)
    found = settings.evade(second_column, -0.25, x, labels, threat, generator(0))
    assert float((found.x_adv - x).abs().max()) <= eps + 1e-6
    return found


def test_a_wrong_answer_that_is_not_flagged_is_found_exactly_where_there_is_one() -> None:
    """Wrong: first > 0.5. Unflagged: first - second <= 0.05. From 0.45 both need a change of more than 0.05 at most."""
    far = evade(Adaptive(), 0.1)
    assert far.evaded.all()
    assert (far.score <= -0.25).all()
    near = evade(Adaptive(), 0.04)
    assert not near.wrong.any()
    assert not near.evaded.any()
    assert torch.isinf(near.score).all()
    assert (near.by == -1).all()


def test_a_detector_that_flags_everything_is_not_evaded_but_wrong_answers_are_told() -> None:
    def always(x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        z, suspicions = second_column(x, rows)
        return z, suspicions * 0 + 1

    x, labels = torch.full((3, 1, 4, 2), 0.45), torch.zeros(3, dtype=torch.int64)
    found = Adaptive(steps=20).evade(always, 0.5, x, labels, Threat(norm="linf", eps=0.1), generator(0))
    assert found.wrong.all()
    assert not found.evaded.any()
    assert (found.score == 1).all()
    assert (Blind()(found.x_adv).argmax(1) == 1).all()


def test_on_a_real_network_the_attack_that_knows_the_detector_evades_far_more_than_one_that_does_not() -> None:
    net = digits_model().net
    with frozen(net):
        threshold = DETECTOR.fit(DETECTOR.scores(net, digits().holdout.images)).value
        x, y = digits().test.floats(slice(0, 80)), digits().test.labels[:80]
        rows = correct(net, x, y).nonzero().flatten()
        x, y = x[rows], y[rows]
        alive, plain = under_attack(net, PGD(steps=20, loss="margin"), x, y, THREAT, 0)
        slipped = ~alive & (DETECTOR.scores(net, plain) <= threshold)
        seen: list[int] = []

        def examine(point: Tensor, who: Tensor) -> tuple[Tensor, Tensor]:
            assert point.shape[0] == len(who)
            seen.append(len(who))
            return DETECTOR.examine(net, point)

        settings = Adaptive(steps=30, weights=(0.0, 10.0))
        found = settings.evade(examine, threshold, x, y, THREAT, generator(1), starts=(plain,))
        z, suspicions = DETECTOR.examine(net, found.x_adv)
        again = settings.evade(examine, threshold, x, y, THREAT, generator(1), starts=(plain,))
    broken = int((~alive).sum())
    assert int(slipped.sum()) < 0.6 * broken
    assert int(found.evaded.sum()) > 1.3 * int(slipped.sum())
    assert bool((found.evaded >= slipped).all())
    assert bool((found.wrong >= ~alive).all())
    assert bool((z.argmax(1) != y)[found.wrong].all())
    assert bool((suspicions.amax(0) <= threshold + 1e-5)[found.evaded].all())
    assert torch.equal(found.x_adv[~found.wrong], x[~found.wrong])
    assert float((found.x_adv - x).abs().max()) <= THREAT.eps + 1e-6
    assert bool((found.by == -2).equal(slipped))
    assert torch.equal(again.x_adv, found.x_adv)
    assert torch.equal(again.evaded, found.evaded)
