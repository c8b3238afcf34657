"""Where a domain is cut: of the cuts that score best the one whose halves gain most."""

import torch
from torch import Tensor

from stages.bounds import _cuts
from stages.bounds._domains import Domains


def domains(*bounds: float) -> Domains:
    count = torch.arange(len(bounds))
    none, zero = torch.zeros(len(bounds), 0), torch.zeros(len(bounds), dtype=torch.int64)
    bound = torch.tensor(bounds, dtype=torch.float64)
    slopes = torch.zeros(len(bounds), 4, dtype=torch.float16)
    return Domains(count, zero, zero, zero, bound, -bound, none.long(), none, none, none, slopes)


def test_the_cut_whose_halves_both_gain_is_taken_of_those_that_score_best() -> None:
    some = domains(-4.0, -2.0)
    scores = torch.tensor([[0.9, 0.8, 0.7, 0.6], [0.5, 0.6, -1.0, 0.7]])
    points = torch.arange(8.0).view(2, 4)
    gains = {  # of image, cut: the two halves', the first one where the value is above the point
        (0, 0): (3.9, 0.0),  # one half gains all, the other nothing
        (0, 1): (1.0, 0.5),
        (0, 2): (-9.0, -9.0),
        (0, 3): (2.0, 2.0),  # best, but it scores too low to be looked at
        (1, 0): (0.1, 0.1),
        (1, 1): (5.0, 0.4),  # the first half is proved: no gain counts beyond that
        (1, 3): (1.5, 0.5),
    }

    def bounded(both: Domains) -> Tensor:
        found = []
        for image, at, side, bound in zip(both.image, both.at[:, 0], both.side[:, 0], both.bound, strict=True):
            found.append(bound + gains[int(image), int(at)][0 if side > 0 else 1])
        return torch.stack(found)

    both = _cuts.halves(some, scores, points, torch.zeros(2, dtype=torch.float64), bounded, 3)
    assert both.image.tolist() == [0, 0, 1, 1]
    assert both.at[:, 0].tolist() == [1, 1, 1, 1]
    assert both.side[:, 0].tolist() == [1.0, -1.0, 1.0, -1.0]
    assert both.point[:, 0].tolist() == [1.0, 1.0, 5.0, 5.0]
    torch.testing.assert_close(both.bound, torch.tensor([-3.0, -3.5, 3.0, -1.6], dtype=torch.float64))


def test_one_cut_is_taken_by_its_score_and_nothing_is_bounded() -> None:
    def bounded(_: Domains) -> Tensor:
        raise AssertionError

    scores = torch.tensor([[0.1, 0.8, -1.0, 0.6]])
    both = _cuts.halves(domains(-4.0), scores, scores, torch.zeros(1, dtype=torch.float64), bounded, 1)
    assert both.at[:, 0].tolist() == [1, 1]
    assert both.bound.tolist() == [-4.0, -4.0]
