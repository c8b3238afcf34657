"""The precision rule looks at the network and the kind of processor alone, and losses stay in float32."""

from typing import Any

import pytest
import torch
from torch import nn

from stages.fitting import precision
from stages.fitting.optim import Fit
from stages.fitting.precision import choose, layout, prepare
from stages.nn.arch import Arch


def _net(builder: str, shape: tuple[int, int, int] = (3, 32, 32), **options: Any) -> nn.Module:
    return Arch(builder=builder, options=options, input_shape=shape, classes=10).build()


WRN = {"depths": [1, 1, 1], "widths": [1, 1, 1]}


@pytest.mark.parametrize(
    ("builder", "options", "with_bf16", "without"),
    [
        ("wrn", WRN, "bf16 channels-last", "fp32 channels-last"),
        ("resnet", {}, "bf16 channels-last", "fp32 channels-last"),
        ("mobilenet", {}, "bf16 channels-last", "fp32 channels-last"),
        ("small_cnn", {}, "fp32 channels-last", "fp32 channels-last"),
        ("mlp", {}, "fp32", "fp32"),
    ],
)
def test_the_rule(
    monkeypatch: pytest.MonkeyPatch, builder: str, options: dict[str, Any], with_bf16: str, without: str
) -> None:
    net = _net(builder, **options)
    monkeypatch.setattr(precision, "native", lambda _: True)
    assert choose(net, Fit()) == with_bf16
    monkeypatch.setattr(precision, "native", lambda _: False)
    assert choose(net, Fit()) == without
    assert choose(net, Fit(precision="bf16")) == "bf16 channels-last"
    assert choose(net, Fit(precision="fp32")) == "fp32"


def test_attention_stays_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "native", lambda _: True)
    convolutions = [nn.Conv2d(16, 16, 3) for _ in range(6)]
    assert choose(nn.Sequential(*convolutions), Fit()) == "bf16 channels-last"
    assert choose(nn.Sequential(*convolutions, nn.MultiheadAttention(8, 2)), Fit()) == "fp32"


def test_a_convolution_that_channels_last_memory_breaks_keeps_its_layout() -> None:
    """Its weight gradient ends the process, so a small network with such a shortcut trains in plain float32."""
    narrow = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 8, 1, stride=2))
    assert choose(narrow, Fit()) == "fp32"
    assert choose(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1, stride=2)), Fit()) == "fp32 channels-last"


@pytest.mark.parametrize("mode", ["fp32", "fp32 channels-last", "bf16 channels-last"])
def test_every_mode_computes_the_same_network(mode: precision.Mode) -> None:
    net = _net("wrn", (3, 16, 16), **WRN)
    x = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = net(x)
        seen = prepare(net, mode)
        got = seen(x)
    assert got.dtype == torch.float32
    assert torch.allclose(got, expected, rtol=0, atol=0.05 if mode.startswith("bf16") else 1e-5)
    assert torch.equal(got, expected) is (mode == "fp32") or mode == "fp32 channels-last"
    assert all(p.dtype == torch.float32 for p in net.parameters())


def test_flags_and_parts_are_those_of_the_network() -> None:
    net = _net("wrn", (3, 16, 16), **WRN)
    seen = prepare(net, "bf16 channels-last")
    seen.train()
    assert all(module.training for module in net.modules())
    assert seen.get_submodule("net") is net
    assert list(map(id, seen.parameters())) == list(map(id, net.parameters()))
    first = next(name for name, _ in net.named_children())
    assert getattr(seen, first) is getattr(net, first)
    with pytest.raises(AttributeError, match="nowhere"):
        _ = seen.nowhere


def test_layout_changes_no_number() -> None:
    net = _net("wrn", (3, 16, 16), **WRN)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    layout(net, torch.channels_last)
    assert any(p.dim() == 4 and not p.is_contiguous() for p in net.parameters())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    layout(net, torch.contiguous_format)
    assert all(p.is_contiguous() for p in net.parameters())
