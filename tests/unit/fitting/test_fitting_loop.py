"""The loop: what it computes, what it refuses, and that no interruption can be told from the result."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from stages.fitting import resume
from stages.fitting.loop import Diverged, Row, fit
from stages.fitting.optim import Fit
from stages.method import InputError
from tests.unit.fitting import _killed

HERE = Path(__file__).resolve()
ROOT = HERE.parents[3]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Interrupted(Exception):
    """Raised by a test's callback."""


def _state(net: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in net.state_dict().items()}


def _same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def _train(scratch: Path | None = None, stop: int | None = None, **changes: Any) -> tuple[dict[str, Tensor], list[Row]]:
    def on_step(done: int, total: int) -> None:
        if done == stop:
            raise Interrupted

    x, y = _killed.images()
    rows: list[Row] = []
    net = fit(_killed.network(), x, y, _killed.loss, _killed.config(**changes), 5, scratch, on_step, on_row=rows.append)
    return _state(net), rows


def test_it_lowers_the_loss_and_hands_back_a_network_in_eval_mode() -> None:
    x, y = _killed.images()
    net = _killed.network()
    rows: list[Row] = []
    out = fit(net, x, y, _killed.loss, _killed.config(epochs=12), 5, on_row=rows.append)
    assert out is net
    assert not any(module.training for module in out.modules())
    assert all(p.grad is None and p.requires_grad for p in out.parameters())
    assert [row["epoch"] for row in rows] == list(range(1, 13))
    assert rows[-1]["loss"] < 0.8 * rows[0]["loss"]
    assert set(rows[0]) == {"epoch", "step", "lr", "loss", "accuracy.train"}


def test_equal_seeds_equal_weights_and_other_seeds_other_weights() -> None:
    x, y = _killed.images()
    first, second = (fit(_killed.network(), x, y, _killed.loss, _killed.config(), 5) for _ in range(2))
    third = fit(_killed.network(), x, y, _killed.loss, _killed.config(), 6)
    assert _same(first.state_dict(), second.state_dict())
    assert not _same(first.state_dict(), third.state_dict())


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"ema": None, "optimiser": "adam", "lr": 0.003},
        {"optimiser": "adamw", "lr": 0.003, "clip_norm": 0.5, "augment": {"crop": 1, "flip": True}},
        {"ema": None, "momentum": 0.0, "nesterov": False, "schedule": "onecycle"},
        {"precision": "bf16"},
    ],
)
def test_an_interruption_anywhere_changes_no_bit(tmp_path: Path, changes: dict[str, Any]) -> None:
    whole, rows = _train(**changes)
    for stop in (1, 4, 5, 6, 13, 15):
        place = tmp_path / str(stop)
        with pytest.raises(Interrupted):
            _train(place, stop, **changes)
        with pytest.raises(Interrupted):
            _train(place, min(stop + 2, 15), **changes)
        again, rows_again = _train(place, **changes)
        assert _same(again, whole), stop
        assert rows_again == rows, stop


@pytest.mark.parametrize("pause", [1, 8, 14])
def test_sigkill_changes_no_bit(tmp_path: Path, pause: int) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(HERE.parent / "_killed.py"), str(tmp_path), str(pause)]
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        reached = next(line for line in process.stdout if line.split()[0] == str(pause))
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert reached.split() == [str(pause), "15"]
    assert pause == 1 or (tmp_path / resume.FILE).is_file()
    seen: list[tuple[int, int]] = []
    x, y = _killed.images()
    net = fit(_killed.network(), x, y, _killed.loss, _killed.config(), 5, tmp_path, lambda *at: seen.append(at))
    assert seen[0] == (max(pause - 1, 1), 15)
    assert _same(_state(net), _train()[0])


def test_a_finished_training_is_handed_back_until_it_is_cleared(tmp_path: Path) -> None:
    whole, rows = _train(tmp_path)
    again, rows_again = _train(tmp_path, stop=1)  # would be interrupted if it trained
    assert _same(again, whole)
    assert rows_again == rows
    resume.clear(tmp_path)
    assert list(tmp_path.iterdir()) == []
    resume.clear(tmp_path)


def test_a_checkpoint_of_another_training_is_not_continued(tmp_path: Path) -> None:
    _train(tmp_path)
    with pytest.raises(Interrupted):
        _train(tmp_path, stop=1, lr=0.01)
    x, y = _killed.images()
    for net, labels, seed in [(_killed.network(4), y, 5), (_killed.network(), y.flip(0), 5), (_killed.network(), y, 6)]:
        steps: list[tuple[int, int]] = []
        fit(net, x, labels, _killed.loss, _killed.config(epochs=1), seed, tmp_path, lambda *at, s=steps: s.append(at))
        assert [done for done, _ in steps] == [1, 2, 3, 4, 5]


def test_a_torn_checkpoint_is_treated_as_absent(tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        _train(tmp_path, stop=9)
    path = tmp_path / resume.FILE
    path.write_bytes(path.read_bytes()[:100])
    assert _same(_train(tmp_path)[0], _train()[0])


def test_the_best_weights_are_kept_across_an_interruption(tmp_path: Path) -> None:
    def run(scratch: Path | None, stop: int | None) -> tuple[nn.Module, list[dict[str, Tensor]], list[Row]]:
        states: list[dict[str, Tensor]] = []
        rows: list[Row] = []

        def after_epoch(net: nn.Module, step: int, total: int) -> tuple[Mapping[str, float], float | None]:
            assert not net.training
            states.append(_state(net))
            score = {5: 0.3, 10: 0.7, 15: 0.7}[step]
            return {"score": score}, score

        def on_step(done: int, total: int) -> None:
            if done == stop:
                raise Interrupted

        x, y = _killed.images()
        config = _killed.config()
        net = fit(
            _killed.network(),
            x,
            y,
            _killed.loss,
            config,
            5,
            scratch,
            on_step,
            after_epoch=after_epoch,
            on_row=rows.append,
        )
        return net, states, rows

    net, states, rows = run(None, None)
    assert _same(_state(net), states[1])
    assert [row["score"] for row in rows] == [0.3, 0.7, 0.7]
    with pytest.raises(Interrupted):
        run(tmp_path, 13)
    again, _, rows_again = run(tmp_path, None)
    assert _same(_state(again), states[1])
    assert rows_again == rows


def test_zero_epochs_change_nothing() -> None:
    before = _state(_killed.network())
    assert _same(_train(epochs=0)[0], before)


def test_fewer_images_than_a_batch_are_one_batch() -> None:
    x, y = _killed.images()
    seen: list[int] = []

    def loss(net: nn.Module, x: Tensor, y: Tensor, rng: Generator, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        seen.append(len(x))
        return F.cross_entropy(net(x), y), {}

    fit(_killed.network(), x[:7], y[:7], loss, _killed.config(epochs=2), 0)
    assert seen == [7, 7]


def test_an_epoch_visits_nobody_twice_and_images_arrive_as_floats() -> None:
    x = torch.arange(90, dtype=torch.uint8).view(90, 1, 1, 1).expand(90, 1, 8, 8).contiguous()
    seen: list[int] = []

    def loss(net: nn.Module, x: Tensor, y: Tensor, rng: Generator, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        assert x.dtype == torch.float32
        assert 0 <= progress < 1
        seen.extend((x[:, 0, 0, 0] * 255).round().long().tolist())
        return F.cross_entropy(net(x), y), {}

    fit(_killed.network(), x, _killed.images()[1], loss, _killed.config(epochs=2), 0)
    assert len(seen) == 160
    assert len(set(seen[:80])) == len(set(seen[80:])) == 80
    assert seen[:80] != seen[80:]


def test_a_loss_that_is_not_finite_names_its_step() -> None:
    def loss(net: nn.Module, x: Tensor, y: Tensor, rng: Generator, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        value = F.cross_entropy(net(x), y)
        return (value * float("nan") if progress > 0.5 else value), {}

    x, y = _killed.images()
    with pytest.raises(Diverged, match=r"got nan at step 8 of 15 \(epoch 1, lr .*lower lr"):
        fit(_killed.network(), x, y, loss, _killed.config(), 0)


def test_images_and_labels_that_do_not_fit_are_refused() -> None:
    x, y = _killed.images()
    with pytest.raises(InputError, match="labels"):
        fit(_killed.network(), x, y[:3], _killed.loss, Fit(), 0)
    with pytest.raises(InputError, match="images"):
        fit(_killed.network(), x[:0], y[:0], _killed.loss, Fit(), 0)
