"""Every searcher in the folder: a valid architecture of the task, the same seed the same answer, no global dice."""

from collections.abc import Mapping

import pytest
import torch

from stages.method import load, names, type_of
from stages.nn.arch import Arch
from stages.nn.cost import cost
from stages.search import Config
from stages.searchers.base import FOLDER, Bench, Searcher
from stages.seeding import generator
from stages.tuning import initial

BASE: type[Searcher] = Searcher  # type: ignore[type-abstract]  # only asked for its subclasses
KINDS = names(FOLDER)


def _bench(notes: list[str]) -> Bench:
    def arch(builder: str, options: Mapping[str, object]) -> Arch:
        return Arch(builder=builder, options=dict(options), input_shape=(1, 8, 8), classes=3, mean=(0.3,), std=(0.2,))

    def costs(arch: Arch) -> Mapping[str, float]:
        return cost(initial(arch, 0), arch.input_shape).dump()

    return Bench(arch, lambda arch: (costs(arch)["macs"] % 97) / 97, costs, notes.append)


def test_the_folder_holds_the_searchers_of_the_line() -> None:
    assert {"fixed", "random_search"} <= set(KINDS)


@pytest.mark.parametrize("kind", KINDS)
class TestEverySearcher:
    def test_it_loads_by_name_dumps_every_default_and_refuses_unknown_keys(self, kind: str) -> None:
        searcher = load(FOLDER, BASE, kind)
        assert set(searcher.dump()) == {"kind", *type(searcher).model_fields}
        assert load(FOLDER, BASE, searcher.dump()) == searcher
        assert type(searcher).__doc__
        with pytest.raises(ValueError, match="no_such_key"):
            load(FOLDER, BASE, {"kind": kind, "no_such_key": 1})

    def test_its_keys_do_not_collide_with_the_stages(self, kind: str) -> None:
        assert not set(type_of(FOLDER, BASE, kind).model_fields) & (set(Config.model_fields) | {"kind"})

    def test_it_finds_a_network_of_the_task_that_runs(self, kind: str) -> None:
        found = load(FOLDER, BASE, kind).search(_bench([]), generator(1))
        assert (found.input_shape, found.classes, found.mean, found.std) == ((1, 8, 8), 3, (0.3,), (0.2,))
        assert found.build()(torch.zeros(2, 1, 8, 8)).shape == (2, 3)
        assert Arch.load(found.dump()) == found

    def test_the_same_seed_gives_the_same_answer_and_leaves_the_global_state(self, kind: str) -> None:
        searcher = load(FOLDER, BASE, kind)
        notes: list[list[str]] = [[], []]
        before = torch.random.get_rng_state()
        found = [searcher.search(_bench(said), generator(5)) for said in notes]
        assert torch.equal(torch.random.get_rng_state(), before)
        assert found[0] == found[1]
        assert notes[0] == notes[1]
