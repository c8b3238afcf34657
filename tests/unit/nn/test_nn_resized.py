"""What channel pruning leaves can be named as rewrites and rebuilt."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from stages.method import InputError
from stages.nn.arch import Rewrite, apply
from stages.nn.cost import cost
from stages.nn.layers.normalize import Normalize, normalize
from stages.nn.layers.resized import changes, like
from tests.networks import arch, built, images


@pytest.mark.parametrize(
    ("old", "options", "shapes"),
    [
        (nn.Conv2d(4, 8, 3, bias=False), {"inputs": 2, "outputs": 5}, [(5, 2, 3, 3)]),
        (nn.Conv2d(8, 8, 3, groups=8), {"inputs": 3, "outputs": 3}, [(3, 1, 3, 3), (3,)]),
        (nn.Conv2d(8, 8, 3, groups=2), {"outputs": 4}, [(4, 4, 3, 3), (4,)]),
        (nn.Conv2d(8, 8, 3, groups=4), {"groups": 2}, [(8, 4, 3, 3), (8,)]),
        (nn.Linear(6, 4), {"inputs": 3}, [(4, 3), (4,)]),
        (nn.BatchNorm2d(6, eps=1e-3), {"outputs": 3}, [(3,), (3,)]),
        (nn.LayerNorm(6), {"outputs": 3}, [(3,), (3,)]),
    ],
)
def test_the_kind_stays_and_the_counts_change(
    old: nn.Module, options: dict[str, int], shapes: list[tuple[int, ...]]
) -> None:
    new = like(old, **options)
    assert type(new) is type(old)
    assert [tuple(parameter.shape) for parameter in new.parameters()] == shapes
    assert getattr(new, "eps", None) == getattr(old, "eps", None)


def test_how_a_convolution_moves_stays() -> None:
    old = nn.Conv2d(4, 8, 3, stride=2, padding=2, dilation=2, padding_mode="reflect")
    new = like(old, outputs=4)
    for name in ("stride", "padding", "dilation", "padding_mode"):
        assert getattr(new, name) == getattr(old, name)


def test_changes_rebuild_a_pruned_network() -> None:
    before = built(arch("resnet", (3, 8, 8), blocks=(1,)))
    after = copy.deepcopy(before)
    for at, options in (("stage1.0.conv1", {"outputs": 5}), ("stage1.0.bn1", {"outputs": 5})):
        apply(after, Rewrite(at=at, layer="resized", options=options))
    apply(after, Rewrite(at="stage1.0.conv2", layer="resized", options={"inputs": 5}))
    found = changes(before, after)
    assert [rewrite.at for rewrite in found] == ["stage1.0.conv1", "stage1.0.bn1", "stage1.0.conv2"]
    again = copy.deepcopy(before)
    for rewrite in found:
        apply(again, rewrite)
    again.load_state_dict(after.state_dict())
    x = images(2, (3, 8, 8))
    assert torch.equal(again.eval()(x), after.eval()(x))
    assert changes(before, before) == ()


def test_changes_refuse_what_they_cannot_rebuild() -> None:
    before = built(arch("mlp", (1, 8, 8)))
    other = copy.deepcopy(before)
    other.set_submodule("fc1", nn.Identity())
    with pytest.raises(InputError, match='"fc1" was Linear and is now Identity'):
        changes(before, other)
    with pytest.raises(InputError, match='no module at "fc2"'):
        changes(before, built(arch("mlp", (1, 8, 8), hidden=[256])))


@pytest.mark.parametrize(
    ("old", "options", "message"),
    [
        (nn.Linear(2, 2), {"groups": 2}, "Linear has no groups"),
        (nn.BatchNorm2d(2), {"inputs": 2}, "BatchNorm2d takes outputs only"),
        (nn.ReLU(), {"outputs": 2}, "expected one of Conv2d, Linear"),
        (nn.Conv2d(4, 4, 1, groups=2), {"outputs": 3}, "2 groups divide neither or only one of 4 inputs, 3 outputs"),
    ],
)
def test_what_does_not_fit_is_refused(old: nn.Module, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        like(old, **options)


def test_normalisation_is_per_channel_and_refuses_constant_ones() -> None:
    x = images(2, (3, 4, 4))
    layer = normalize(3, (0.1, 0.2, 0.3), (0.5,))
    torch.testing.assert_close(layer(x)[:, 2], (x[:, 2] - 0.3) / 0.5)
    assert list(layer.state_dict()) == ["mean", "std"]
    with pytest.raises(InputError, match="expected deviations above 0"):
        Normalize((0.0,), (0.0,))
    with pytest.raises(InputError, match="std: expected 1 or 3 values"):
        normalize(3, (0.0,), (1.0, 1.0))


def test_costs_of_attention_and_transposed_convolutions_by_hand() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.ConvTranspose2d(3, 8, 2, 2)
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            tokens = self.up(x).flatten(2).transpose(1, 2)
            mixed: torch.Tensor = self.attention(tokens, tokens, tokens, need_weights=False)[0]
            return mixed

    # 4 pixels to 8 channels of 2x2; 16 tokens of 8: projections in and out, scores and their sums.
    by_hand = 4 * 3 * 8 * 4 + 16 * 8 * 24 + 2 * 16 * 16 * 8 + 16 * 8 * 8
    assert cost(Mixed(), (3, 2, 2)).macs == by_hand
