"""What train, search and compress share: seeded weights, samples that pair up, monitoring, and the collapse alarm."""

from collections.abc import Mapping

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from stages.data.base import Split
from stages.fitting.loop import Row
from stages.fitting.optim import Fit
from stages.nn.arch import Arch
from stages.recipes.base import Recipe
from stages.recipes.natural import Natural
from stages.threat import Threat
from stages.tuning import fallen, initial, sample, tune

ARCH = Arch(builder="small_cnn", options={"width": 4, "hidden": 8}, input_shape=(1, 8, 8), classes=2)
LINF = Threat(norm="linf", eps=0.1)


def _split(count: int = 40) -> Split:
    rng = torch.Generator().manual_seed(0)
    return Split(
        torch.randint(0, 256, (count, 1, 8, 8), generator=rng, dtype=torch.uint8),
        torch.arange(count) % 2,
        torch.arange(count) * 3,
    )


def test_initial_weights_follow_the_seed_and_leave_the_global_state() -> None:
    before = torch.random.get_rng_state()
    nets = [initial(ARCH, seed).state_dict() for seed in (1, 1, 2)]
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(nets[0][name], nets[1][name]) for name in nets[0])
    assert not all(torch.equal(nets[0][name], nets[2][name]) for name in nets[0])


def test_a_sample_is_the_same_every_time_in_file_order() -> None:
    split = _split()
    some = sample(split, 10)
    assert len(some) == 10
    assert some.indices.tolist() == sorted(some.indices.tolist())
    assert torch.equal(some.indices, sample(split, 10).indices)
    assert sample(split, None) is split
    assert sample(split, 99) is split


def test_a_fall_is_told_and_a_rise_is_not() -> None:
    def rows(*values: float) -> list[Row]:
        return [{"epoch": float(i), "accuracy.pgd": value} for i, value in enumerate(values)]

    assert fallen(rows(0.1, 0.4, 0.25, 0.6)) is None
    text = fallen(rows(0.1, 0.45, 0.02, 0.6))
    assert text is not None
    assert "accuracy.pgd fell from 0.45 to 0.02 by epoch 2" in text
    assert fallen([{"epoch": 1.0, "loss": 5.0}, {"epoch": 2.0, "loss": 0.1}]) is None
    assert fallen([{"epoch": float(i), "accuracy.train": value} for i, value in enumerate([0.9, 0.1])]) is None
    assert fallen([]) is None


class Watched(Recipe):
    """Notes what the monitor saw."""

    def loss(
        self, net: nn.Module, x: Tensor, y: Tensor, threat: Threat, rng: Generator, progress: float
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        del threat, rng, progress
        return F.cross_entropy(net(x), y), {}

    def monitor(self, net: nn.Module, x: Tensor, y: Tensor, threat: Threat, rng: Generator) -> Mapping[str, float]:
        del y, threat, rng
        assert not net.training
        return {"watched": float(len(x))}


def test_the_monitor_is_asked_every_two_hundred_steps_and_at_the_end() -> None:
    rows: list[Row] = []
    # 60 epochs of 5 steps: step 200 ends epoch 40, step 300 is the end.
    tune(initial(ARCH, 0), Watched(), Fit(epochs=60, batch=8), _split(), LINF, 0, on_row=rows.append)
    assert [row["epoch"] for row in rows if "watched" in row] == [40.0, 60.0]
    assert rows[-1]["watched"] == 40.0


def test_the_best_score_is_kept_and_asked_for_as_often_as_wanted() -> None:
    asked: list[dict[str, Tensor]] = []
    values = iter([0.5, 0.9, 0.1])

    def score(net: nn.Module) -> float:
        asked.append({name: value.clone() for name, value in net.state_dict().items()})
        return next(values)

    config = Fit(epochs=5, batch=8, ema=None)
    net = tune(initial(ARCH, 0), Natural(), config, _split(), LINF, 0, score=score, score_epochs=2)
    assert len(asked) == 3  # epochs 2, 4 and the last
    assert all(torch.equal(value, asked[1][name]) for name, value in net.state_dict().items())


class Curated(Watched):
    """Trains on a changed set."""

    def curate(self, x: Tensor, y: Tensor, threat: Threat, rng: Generator) -> tuple[Tensor, Tensor]:
        del threat, rng
        assert x.dtype == torch.float32
        assert float(x.max()) <= 1
        return x[:8], y[:8]


def test_a_recipe_may_curate_the_training_set_as_floats() -> None:
    steps: list[tuple[int, int]] = []
    tune(initial(ARCH, 0), Curated(), Fit(epochs=2, batch=8), _split(), LINF, 0, None, lambda *at: steps.append(at))
    assert steps == [(1, 2), (2, 2)]
