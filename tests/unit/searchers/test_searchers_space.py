"""The space as data: its size, its candidates, and drawing them without repetition."""

import itertools
from collections import Counter

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from stages.method import InputError
from stages.nn.arch import Arch
from stages.searchers._space import Each, Space, Spaces, draw, pick
from stages.searchers.base import Bench
from stages.searchers.fixed import Fixed
from stages.searchers.random_search import RandomSearch

WRN = {"builder": "wrn", "depths": {"each": [[1, 2], [1, 2], [1]]}, "widths": [[1, 1, 1], [2, 2, 1]]}
CNN = {"builder": "small_cnn", "width": [8, 16, 32], "hidden": 64}


def _rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _bench(asked: list[Arch], score: dict[int, float] | None = None) -> Bench:
    def arch(builder: str, options: object) -> Arch:
        return Arch.load({"builder": builder, "options": options, "input_shape": (1, 8, 8), "classes": 3})

    def scored(arch: Arch) -> float:
        asked.append(arch)
        return 0.5 if score is None else score[arch.options["width"]]

    def cost(arch: Arch) -> dict[str, float]:
        width = float(arch.options["width"])
        return {"macs": 100 * width, "params": 1000 / width, "activations": 1.0}

    notes: list[str] = []
    return Bench(arch, scored, cost, notes.append)


def test_lists_are_choices_each_is_one_choice_per_position_and_the_rest_is_given() -> None:
    space = Space.load(WRN)
    assert space.size() == 8
    found = [space.candidate(i) for i in range(8)]
    expected = [
        ("wrn", {"depths": [a, b, 1], "widths": widths})
        for a, b in itertools.product([1, 2], [1, 2])
        for widths in ([1, 1, 1], [2, 2, 1])
    ]
    assert found == expected
    assert Space.load(CNN).candidate(1) == ("small_cnn", {"width": 16, "hidden": 64})


def test_a_space_dumps_and_loads() -> None:
    for data in (WRN, CNN):
        assert Space.load(Space.load(data).dump()) == Space.load(data)


def test_drawing_visits_every_candidate_once_in_an_order_of_the_seed() -> None:
    spaces = TypeAdapter(Spaces).validate_python([WRN, CNN])
    everything = [repr(pick(spaces, i)) for i in range(11)]
    orders = [[repr(c) for c in draw(spaces, _rng(seed))] for seed in (0, 0, 1)]
    assert all(sorted(order) == sorted(everything) for order in orders)
    assert orders[0] == orders[1] != orders[2]
    with pytest.raises(IndexError):
        pick(spaces, 11)


def test_drawing_is_uniform() -> None:
    spaces = (Space.load(CNN),)
    firsts = Counter(next(draw(spaces, _rng(seed)))[1]["width"] for seed in range(900))
    # Three choices, 900 draws: 300 each with a standard deviation of 14.
    assert all(230 < firsts[width] < 370 for width in (8, 16, 32))


def test_an_option_without_choices_is_refused() -> None:
    with pytest.raises(ValidationError, match='option "width" of "small_cnn" has nothing to choose from'):
        Space.load({"builder": "small_cnn", "width": []})
    with pytest.raises(ValidationError, match="nothing to choose from"):
        Space(builder="wrn", options={"depths": Each(each=((1,), ()))})


def test_random_search_returns_the_best_score() -> None:
    asked: list[Arch] = []
    found = RandomSearch.load({"space": CNN}).search(_bench(asked, {8: 0.2, 16: 0.9, 32: 0.4}), _rng())
    assert found.options == {"width": 16, "hidden": 64}
    assert len(asked) == 3


def test_equal_scores_go_to_the_cheaper_network() -> None:
    for seed in range(5):
        assert RandomSearch.load({"space": CNN}).search(_bench([]), _rng(seed)).options["width"] == 8


def test_candidates_beyond_a_limit_are_never_trained() -> None:
    asked: list[Arch] = []
    RandomSearch.load({"space": CNN, "max_macs": 1600, "max_params": 100}).search(_bench(asked), _rng())
    assert [arch.options["width"] for arch in asked] == [16]


def test_at_most_so_many_trials_all_different() -> None:
    asked: list[Arch] = []
    RandomSearch.load({"space": CNN, "trials": 2}).search(_bench(asked), _rng(4))
    assert len({repr(arch) for arch in asked}) == len(asked) == 2


def test_limits_that_nothing_meets_name_the_cheapest() -> None:
    with pytest.raises(InputError, match=r"no candidate within max_macs 10.*'width': 8.*has 800 MACs"):
        RandomSearch.load({"space": CNN, "max_macs": 10}).search(_bench([]), _rng())


@pytest.mark.parametrize(
    ("searcher", "data", "words"),
    [
        (Fixed, {"arch": {"builder": "smal_cnn"}}, 'did you mean "small_cnn"'),
        (Fixed, {"arch": {"width": 3}}, 'expected a table with "builder"'),
        (RandomSearch, {"space": {"builder": "smal_cnn"}}, 'did you mean "small_cnn"'),
        (RandomSearch, {"space": []}, "at least one table"),
        (RandomSearch, {"space": {"width": [1]}}, "builder"),
    ],
)
def test_bad_settings_are_refused(searcher: type[Fixed | RandomSearch], data: object, words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        searcher.load(data)
