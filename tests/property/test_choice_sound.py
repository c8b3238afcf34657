"""No point of a box escapes the bounds of choices, jumps, powers, running sums and pools of three sides."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stages.bounds.base import Box, Certifier
from stages.bounds.crown import Crown
from stages.bounds.crown_ibp import CrownIBP
from stages.bounds.ibp import IBP
from stages.nn.imported import imported
from stages.nn.to_onnx import export
from stages.seeding import generator
from targets.runtime.ort import OrtEngine
from tests.networks import Single
from tests.property.test_bounds_sound import K, escapes

ALL: list[Certifier] = [IBP(), CrownIBP(), Crown()]
MIDDLES: dict[str, Callable[[Tensor], Tensor]] = {
    "where": lambda x: torch.where(x > 0, x, 0.1 * x),
    "one side fixed": lambda x: torch.where(x <= 0.1, torch.full_like(x, 0.7), x),
    "either": lambda x: torch.where((x > 0.2) | ~(x >= -0.2), x.flip(1), x),
    "steps": lambda x: (x > 0.1).float() * x + (x != x.flip(1)).float(),
    "threshold": lambda x: F.threshold(x, 0.2, -0.5),
    "shrunk": lambda x: F.hardshrink(x, 0.3) - F.softshrink(x, 0.2),
    "whole": lambda x: torch.floor(3 * x) + torch.ceil(x) - torch.trunc(5 * x),
    "powers": lambda x: (x.abs() + 0.3) ** 1.7 + (x.abs() + 0.3) ** -1.3 + (x.abs() + 0.1) ** 2.6,
    "celu": lambda x: F.celu(x, 0.6),
    "hyperbolic": lambda x: torch.sinh(x) - torch.cosh(x.flip(1)),
    "tangent": lambda x: torch.tan(x.clamp(-1.2, 1.2)),
    "running": lambda x: x.cumsum(1) - x.cumsum(3),
    "products": lambda x: x.prod(1, keepdim=True) + x,
    "extremes": lambda x: x.max(1, keepdim=True).values * 0.5 + x.min(2, keepdim=True).values - x,
    "bodies": lambda x: F.max_pool3d(x.unsqueeze(1), 3, 2, 1) - F.avg_pool3d(x.unsqueeze(1), 3, 2, 1),
}


def network(middle: nn.Module, name: str) -> nn.Module:
    net = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), middle, nn.Flatten(), nn.LazyLinear(K)).eval()
    rng = generator(0, name)
    with torch.no_grad():
        net(torch.zeros(1, 3, 6, 6))
        for value in net.parameters():
            value.copy_(torch.randn(value.shape, generator=rng) * 0.4)
    return net.requires_grad_(False)


def box(eps: float) -> Box:
    x = torch.rand(2, 3, 6, 6, generator=generator(1, "x"))
    return Box((x - eps).clamp(min=0), (x + eps).clamp(max=1))


@pytest.mark.parametrize("eps", [0.0, 0.01, 0.2])
@pytest.mark.parametrize("name", MIDDLES)
def test_nothing_escapes(name: str, eps: float) -> None:
    net = network(Single(MIDDLES[name]), name)
    assert max(escapes(net, box(eps), ALL, generator(2, name), 24)) <= 0


@pytest.mark.parametrize("middle", [nn.Softplus(), nn.MaxPool2d(2, 2, ceil_mode=True)], ids=["softplus", "ceiling"])
def test_crown_is_tight_on_what_exporters_write_otherwise(middle: nn.Module, tmp_path: Path) -> None:
    """softplus as a choice; the last window of a pool beyond the image."""
    net = network(middle, "exported")
    export(net, (3, 6, 6), tmp_path / "n.onnx", 20, "dynamo")
    twin = imported(tmp_path / "n.onnx").eval()
    rows, small = torch.randn(2, 3, K, generator=generator(3, "rows")), box(0.01)
    with torch.no_grad():
        ours, theirs = (Crown().lower(one, small, rows) for one in (net, twin))
    torch.testing.assert_close(theirs, ours, rtol=0, atol=2e-2)
    assert max(escapes(twin, small, ALL, generator(4, "exported"), 24)) <= 0
    answer = torch.from_numpy(OrtEngine(tmp_path / "n.onnx")(small.low.numpy()))
    torch.testing.assert_close(twin(small.low), answer, rtol=0, atol=1e-5)
