"""Everything this project builds or makes of what it built is bounded; a new file in a folder is held to it unasked."""

from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stages.bounds.base import Box, Certifier
from stages.bounds.crown import Crown
from stages.bounds.crown_ibp import CrownIBP
from stages.bounds.ibp import IBP
from stages.compressors.base import FOLDER, Bench, Compressor
from stages.method import load, names
from stages.nn.arch import BUILDERS, Model
from stages.seeding import generator
from tests.networks import arch, built

# Small enough that every neuron can have its backward rows; a builder that is not named here is built with defaults.
_SMALL: dict[str, tuple[tuple[int, int, int], dict[str, Any]]] = {
    "mlp": ((1, 4, 4), {"hidden": [6, 5]}),
    "small_cnn": ((1, 8, 8), {"width": 2, "hidden": 6}),
    "resnet": ((1, 8, 8), {"width": 2, "blocks": [1, 1], "activation": "silu"}),
    "wrn": ((1, 8, 8), {"widths": [0.125, 0.125, 0.125]}),
    "mobilenet": ((1, 8, 8), {"width": 0.125, "expansion": 1, "head": 8}),
}
COMPRESSORS = names(FOLDER)


@cache
def network(builder: str) -> Model:
    shape, options = _SMALL.get(builder, ((3, 32, 32), {}))
    wanted = arch(builder, shape, **options)
    return Model(wanted, built(wanted))


@cache
def compressed(kind: str) -> Model:
    def adversarial(net: nn.Module) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        del net
        x = torch.rand(6, 1, 8, 8, generator=generator(0, "bench"))
        yield x, (x + 0.03).clamp(max=1), torch.arange(6)

    bench = Bench(tune=lambda model: model, adversarial=adversarial, note=list[str]().append)
    compressor = load(FOLDER, Compressor, kind)  # type: ignore[type-abstract]
    wanted = arch("resnet", (1, 8, 8), width=16, blocks=[1, 1])
    return compressor.compress(Model(wanted, built(wanted)), bench, generator(1))


def holds(net: nn.Module, shape: tuple[int, ...], certifiers: list[Certifier], eps: float = 0.002) -> None:
    """Bounds of two logits, both ways, lie under what an attack finds; CROWN's not far under it."""
    rng = generator(3, "covered")
    x = torch.rand(1, *shape, generator=rng)
    box = Box((x - eps).clamp(min=0), (x + eps).clamp(max=1))
    with torch.no_grad():
        classes = net(x).shape[1]
    rows = torch.cat([torch.eye(classes)[:2], -torch.eye(classes)[:2]]).unsqueeze(0)
    least = torch.full((1, 4), torch.inf)
    for r in range(4):
        point = x
        for _ in range(4):
            point = point.detach().requires_grad_()
            value = torch.einsum("brk,bk->br", rows, net(point))
            least = torch.minimum(least, value.detach())
            (grad,) = torch.autograd.grad(value[0, r], point)
            point = torch.where(grad > 0, box.low, box.high)
    for certifier in certifiers:
        with torch.no_grad():
            bound = certifier.lower(net, box, rows)
        assert bool((bound <= least).all())
        assert bool(torch.isfinite(bound).all())
        assert not isinstance(certifier, Crown) or bool((bound > least - 1).all())


@pytest.mark.parametrize("builder", names(BUILDERS))
def test_every_builder_is_bounded(builder: str) -> None:
    model = network(builder)
    # CROWN costs two rows per neuron: a network of torchvision has tens of thousands.
    quick: list[Certifier] = [IBP(), CrownIBP()]
    holds(model.net, model.arch.input_shape, [*quick, Crown()] if builder in _SMALL else quick, 0.0002)


@pytest.mark.parametrize("kind", COMPRESSORS)
def test_every_compressed_network_is_bounded(kind: str) -> None:
    model = compressed(kind)
    holds(model.net, model.arch.input_shape, [IBP(), CrownIBP(), Crown()])
