"""Every file in stages/detectors keeps the promises of stages/detectors/base.py."""

import itertools
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from stages.detectors.base import FOLDER, Detector, guard
from stages.method import load, names
from stages.nn.arch import Model
from stages.oracle import Oracle
from tests.trained import digits, digits_model

# Settings beside the defaults under which a detector must keep its promises too.
MORE: dict[str, list[dict[str, Any]]] = {
    "feature_squeezing": [
        {"squeezers": ["nlm_5_3_20"]},
        {"squeezers": ["bit_3", "median_2", "nlm_3_1_40"], "false_alarms": 0.1},
    ]
}
DETECTORS: list[Detector] = [
    load(FOLDER, Detector, {"kind": name, **settings})  # type: ignore[type-abstract]
    for name in names(FOLDER)
    for settings in ({}, *MORE.get(name, []))
]
IDS = [f"{d.kind}-{number}" for number, d in enumerate(DETECTORS)]
each = pytest.mark.parametrize("detector", DETECTORS, ids=IDS)


def model() -> Model:
    return digits_model(epochs=2)


def images(count: int = 12) -> Tensor:
    return digits().test.floats(slice(0, count))


def noisy(x: Tensor) -> Tensor:
    """Off the grid of 8 bits, as attacks leave them."""
    return (x + 0.03 * torch.sin(torch.arange(x.numel(), dtype=torch.float32)).view_as(x)).clamp(0, 1)


def test_the_folder_holds_detectors() -> None:
    assert "feature_squeezing" in names(FOLDER)


@each
def test_it_dumps_and_loads_to_itself_and_says_where_it_comes_from(detector: Detector) -> None:
    assert load(FOLDER, Detector, detector.dump()) == detector  # type: ignore[type-abstract]
    assert "Source:" in (type(detector).__doc__ or "")
    with pytest.raises(ValidationError, match="unknown key"):
        load(FOLDER, Detector, {"kind": detector.kind, "thresold": 1})  # type: ignore[type-abstract]
    for share in (0, 1):
        with pytest.raises(ValidationError, match="false_alarms"):
            load(FOLDER, Detector, {"kind": detector.kind, "false_alarms": share})  # type: ignore[type-abstract]


@each
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 5, 9), (1, 1, 2)])
def test_copies_lie_in_range_and_do_not_depend_on_the_batch(detector: Detector, shape: tuple[int, int, int]) -> None:
    x = noisy(torch.linspace(0, 1, 4 * int(np.prod(shape))).view(4, *shape))
    kept = x.clone()
    copies = detector.copies(x)
    assert copies.shape[1:] == x.shape
    assert len(copies) >= 1
    assert 0 <= float(copies.min()) <= float(copies.max()) <= 1
    for row in range(4):
        assert torch.equal(detector.copies(x[row : row + 1])[:, 0], copies[:, row])
    assert torch.equal(x, kept)


@each
def test_asking_for_gradients_changes_no_value_and_every_pixel_can_have_one(detector: Detector) -> None:
    x, net = noisy(images(4)), model().net
    point = x.clone().requires_grad_(True)
    z, suspicions = detector.examine(net, point)
    plain = detector.examine(net, x)
    assert torch.equal(z.detach(), plain[0].detach())
    assert torch.equal(suspicions.detach(), plain[1].detach())
    (slope,) = torch.autograd.grad(detector.copies(point).square().sum(), point)
    assert bool(torch.isfinite(slope).all())
    assert float((slope != 0).float().mean()) > 0.3


@each
def test_the_networks_own_answer_is_untouched_and_the_books_are_kept(detector: Detector) -> None:
    x, net = images(), model().net
    oracle = Oracle.of(net, len(x))
    with torch.no_grad():
        z, suspicions = detector.examine(oracle, x)
        assert torch.equal(z, net(x))
    count = 1 + len(detector.copies(x))
    assert oracle.spent.queries.tolist() == [count] * len(x)
    assert oracle.spent.gradients.tolist() == [0] * len(x)
    assert torch.equal(detector.scores(net, x, batch=5), detector.scores(net, x, batch=5))
    assert torch.allclose(detector.scores(net, x, batch=5), suspicions.amax(0), atol=1e-5)
    eight_bit = digits().test.images[:12]
    assert torch.equal(detector.scores(net, eight_bit), detector.scores(net, x))


@each
def test_a_constant_network_is_never_suspicious_before_it_answers(detector: Detector) -> None:
    """Its answer tells nothing of the input, so all inputs score the same."""
    last = nn.Linear(64, 3)
    constant = nn.Sequential(nn.Flatten(), last)
    with torch.no_grad():
        last.weight.zero_()
        scores = detector.scores(constant, images())
    assert float(scores.max() - scores.min()) < 1e-6


@each
def test_on_the_hold_out_no_more_are_flagged_than_asked_and_one_image_lower_would_be_too_many(
    detector: Detector,
) -> None:
    scores = detector.scores(model().net, digits().holdout.images)
    found, n = detector.fit(scores), len(scores)
    flagged = int((scores > found.value).sum())
    assert found.rate == detector.false_alarms
    assert flagged <= detector.false_alarms * n
    assert (n + 1 - found.rank) / (n + 1) <= detector.false_alarms < (n + 2 - found.rank) / (n + 1)


@each
@pytest.mark.parametrize("batch", [1, 3])
def test_its_graph_agrees_with_torch(detector: Detector, batch: int) -> None:
    net, threshold = model().net, 0.3
    graph = guard(detector, threshold, (1, 8, 8), 10)
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    x = noisy(images(batch))
    with torch.no_grad():
        copies = detector.copies(x)
        z, others = net(x), net(copies.flatten(0, 1))
        score = detector.examine(net, x)[1].amax(0)
    given = {"input": x.numpy(), "logits": z.numpy(), "copies_logits": others.numpy()}
    found = dict(zip(("copies", "score", "flag"), session.run(["copies", "score", "flag"], given), strict=True))
    assert np.abs(found["copies"] - copies.flatten(0, 1).numpy()).max() < 1e-6
    assert np.abs(found["score"] - score.numpy()).max() < 1e-5
    assert np.array_equal(found["flag"], found["score"] > np.float32(threshold))


def test_graphs_are_told_apart_and_repeatable() -> None:
    graphs = [guard(detector, 0.3, (1, 8, 8), 10) for detector in DETECTORS]
    assert graphs == [guard(detector, 0.3, (1, 8, 8), 10) for detector in DETECTORS]
    assert all(one != other for one, other in itertools.combinations(graphs, 2))
