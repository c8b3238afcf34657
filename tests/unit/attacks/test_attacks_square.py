"""Square: exact number of outputs, any callable, the schedule, and proposals on the surface."""

from pathlib import Path
from typing import Literal

import onnxruntime
import pytest
import torch
from torch import Tensor

from stages.attacks._bumps import move, tiles
from stages.attacks.square import Square, _draw, _side, _stripes
from stages.method import InputError
from stages.nn.to_onnx import export
from stages.seeding import generator
from stages.threat import Threat

LINF, L2, L1 = Threat(norm="linf", eps=0.1), Threat(norm="l2", eps=0.5), Threat(norm="l1", eps=2.0)


class Counted:
    """Class 0 whatever comes; counts what it is asked."""

    def __init__(self) -> None:
        self.calls, self.images = 0, 0

    def __call__(self, x: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        self.calls += 1
        self.images += len(x)
        return torch.tensor([1.0, 0.0, 0.0]).expand(len(x), 3)


@pytest.mark.parametrize("threat", [LINF, L2, L1], ids=["linf", "l2", "l1"])
@pytest.mark.parametrize("queries", [1, 2, 37])
def test_every_example_costs_exactly_its_queries(threat: Threat, queries: int) -> None:
    logits, x = Counted(), torch.rand(5, 3, 8, 8)
    Square(queries=queries).perturb(logits, x, torch.zeros(5, dtype=torch.int64), threat, generator(0))
    assert (logits.calls, logits.images) == (queries, queries * 5)


def test_a_broken_example_is_asked_no_more() -> None:
    asked: list[int] = []

    def logits(x: Tensor) -> Tensor:
        asked.append(len(x))
        bright = (x.mean(dim=(1, 2, 3)) > 0.5).float()
        return torch.stack([1 - 2 * bright, torch.zeros(len(x))], 1)

    x = torch.full((4, 1, 8, 8), 0.2)
    x[:2] = 0.6
    Square(queries=10).perturb(logits, x, torch.zeros(4, dtype=torch.int64), LINF, generator(0))
    assert asked == [4] + [2] * 9


def test_an_example_takes_the_same_path_whoever_else_is_left() -> None:
    """Three of six are wrong from the start in one run and in no run broken in the other; the other three agree."""
    rng = generator(5)
    w = torch.randn(64, 3, generator=rng)

    def logits(x: Tensor) -> Tensor:
        return x.flatten(1) @ w

    x = torch.rand(6, 1, 8, 8, generator=rng)
    y = logits(x).argmax(1)
    wrong = torch.where(torch.arange(6) < 3, (y + 1) % 3, y)
    together = Square(queries=60).perturb(logits, x, y, LINF, generator(0))
    fewer = Square(queries=60).perturb(logits, x, wrong, LINF, generator(0))
    assert torch.equal(together[3:], fewer[3:])


def test_the_side_follows_the_schedule_stretched_over_the_queries() -> None:
    sides = [_side(0.8, query, 10_000, 32, 32) for query in (1, 10, 11, 51, 201, 501, 1001, 2001, 4001, 6001, 8001)]
    shares = [0.8 / 2**k for k in (0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9)]
    assert sides == [max(1, round((p * 1024) ** 0.5)) for p in shares]
    assert _side(0.8, 11, 100, 32, 32) == _side(0.8, 1100, 10_000, 32, 32)
    assert _side(1.0, 1, 10_000, 8, 5) == 5


def test_linf_proposals_lie_on_the_surface_and_change_one_square() -> None:
    x = torch.rand(32, 3, 9, 7, generator=generator(0)) * 0.6 + 0.2
    start = _stripes(x, LINF, generator(1))
    assert torch.allclose((start - x).abs(), torch.full_like(x, 0.1), atol=1e-6)
    assert bool(((start - x).std(dim=2) < 1e-6).all())
    up, down = LINF.project(x + 0.1, x), LINF.project(x - 0.1, x)
    seen = torch.zeros(9, 7, dtype=torch.bool)
    for seed in range(40):
        at, raised = _draw(x, torch.arange(len(x)), 3, generator(seed))
        painted = torch.where(raised, up.flatten(1).gather(1, at), down.flatten(1).gather(1, at))
        moved = start.flatten(1).scatter(1, at, painted).view_as(x)
        changed = (moved != start).any(1)
        assert torch.allclose((moved - x).abs(), torch.full_like(x, 0.1), atol=1e-6)
        assert bool((changed.flatten(1).sum(1) <= 9).all())
        for channel in (moved - x).sign().flatten(2).gather(2, at[:, None, :9].expand(32, 3, 9)).unbind(1):
            assert bool((channel == channel[:, :1]).all()), "one sign per channel"
        seen |= changed.any(0)
    assert bool(seen.all()), "the last row and column are reached too"


def test_the_schedule_of_the_ensemble_counts_queries_and_is_not_stretched() -> None:
    """5,000 queries end at 1/128 of the start share, where a stretched schedule would end at 1/512."""
    asked: dict[bool, list[int]] = {}
    for stretch in (True, False):
        counts: list[int] = []
        before: list[Tensor] = []

        def logits(x: Tensor, counts: list[int] = counts, before: list[Tensor] = before) -> Tensor:
            if before:
                counts.append(int((x != before[0]).sum()))
            else:
                before.append(x.clone())
            return torch.tensor([1.0, 0.0]).expand(len(x), 2)

        x = torch.full((1, 1, 32, 32), 0.5)
        Square(queries=600, stretch=stretch).perturb(logits, x, torch.zeros(1, dtype=torch.int64), LINF, generator(0))
        asked[stretch] = counts
    assert max(asked[True][-90:]) <= _side(0.8, 9999, 10_000, 32, 32) ** 2
    assert _side(0.8, 9999, 10_000, 32, 32) ** 2 < max(asked[False][-90:]) <= _side(0.8, 599, 10_000, 32, 32) ** 2


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32), (2, 5, 9), (1, 2, 2), (1, 1, 1)])
@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_proposals_keep_the_whole_radius(shape: tuple[int, int, int], norm: Literal["l2", "l1"]) -> None:
    x = torch.full((16, *shape), 0.5)
    threat = Threat(norm=norm, eps=0.3)
    best = tiles(x, threat, generator(0))
    assert torch.allclose(threat.distance(best, x), torch.full((16,), 0.3), atol=1e-5)
    for seed, side in enumerate((1, 3, 6, 7)):
        best = move(best, x, threat, side, torch.arange(16), generator(seed))
        assert torch.allclose(threat.distance(best, x), torch.full((16,), 0.3), atol=1e-5)


@pytest.mark.parametrize("threat", [LINF, L2], ids=["linf", "l2"])
def test_it_attacks_an_onnxruntime_session_like_the_network_it_came_from(threat: Threat, tmp_path: Path) -> None:
    rng = generator(7)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 4))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=rng))
    net.eval()
    export(net, (1, 8, 8), tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])

    def engine(x: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {"input": x.numpy()})[0])

    x = torch.rand(40, 1, 8, 8, generator=rng)
    y = net(x).argmax(1)
    threat = threat.model_copy(update={"eps": 3 * threat.eps})
    found = [Square(queries=100)(logits, x, y, threat, generator(0)) for logits in (net, engine)]
    broken = [(adversarial != x).flatten(1).any(1) for adversarial in found]
    assert int((broken[0] != broken[1]).sum()) <= 1
    assert bool(broken[1].any())


def test_flat_inputs_are_refused() -> None:
    with pytest.raises(InputError, match=r"square: expected images \[B, C, H, W\], got \(2, 4\)"):
        Square()(lambda x: x, torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64), LINF, generator(0))
