"""What every compressor promises; a new file in the folder is held to it unasked."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from stages.bounds.ibp import IBP
from stages.compressors.base import FOLDER, Bench, Compressor
from stages.method import load, names
from stages.nn import checkpoint, to_onnx
from stages.nn.arch import Arch, Model
from stages.nn.cost import cost
from stages.seeding import generator
from stages.threat import Threat
from tests import networks

KINDS = names(FOLDER)
SHAPE = (3, 12, 12)


def compressor(kind: str) -> Compressor:
    return load(FOLDER, Compressor, kind)  # type: ignore[type-abstract]


def model() -> Model:
    arch = networks.arch("resnet", SHAPE, width=16, blocks=[1, 1])
    return Model(arch, networks.built(arch))


def bench(tuned: list[Model], notes: list[str]) -> Bench:
    def tune(model: Model) -> Model:
        tuned.append(model)
        return model

    def adversarial(net: nn.Module) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        assert not net.training
        rng = generator(0, "contract")
        for _ in range(2):
            x = torch.rand(6, *SHAPE, generator=rng)
            yield x, (x + 0.03).clamp(max=1), torch.randint(0, 10, (6,), generator=rng)

    return Bench(tune=tune, adversarial=adversarial, note=notes.append)


def compressed(kind: str, full: Model) -> tuple[Model, list[Model], list[str]]:
    tuned: list[Model] = []
    notes: list[str] = []
    return compressor(kind).compress(full, bench(tuned, notes), generator(1)), tuned, notes


def test_the_methods_of_the_line_are_there() -> None:
    assert {"fixed", "gdws", "prune"} <= set(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_dumps_and_loads_to_itself(kind: str) -> None:
    assert load(FOLDER, Compressor, compressor(kind).dump()) == compressor(kind)  # type: ignore[type-abstract]


@pytest.mark.parametrize("kind", KINDS)
def test_rebuilds_from_files_alone_and_costs_less(kind: str, tmp_path: Path) -> None:
    full = model()
    before = {name: value.clone() for name, value in full.net.state_dict().items()}
    small, tuned, _ = compressed(kind, full)
    assert all(torch.equal(value, before[name]) for name, value in full.net.state_dict().items())
    checkpoint.save(small, tmp_path)
    again = checkpoint.load(tmp_path / checkpoint.ARCH, tmp_path / checkpoint.WEIGHTS)
    x = torch.rand(3, *SHAPE, generator=generator(2))
    with torch.no_grad():
        assert torch.equal(again.net(x), small.net(x))
    if small is full:
        assert not tuned
    else:
        assert cost(again.net, SHAPE).macs < cost(full.net, SHAPE).macs
        # Fine-tuning comes after the last change.
        assert tuned[-1].arch == small.arch
    assert all(p.requires_grad for p in small.net.parameters())
    assert small.arch.builder == full.arch.builder
    assert Arch.load(small.arch.dump()) == small.arch


@pytest.mark.parametrize("kind", KINDS)
def test_the_result_exports_and_can_be_bounded(kind: str, tmp_path: Path) -> None:
    small, _, _ = compressed(kind, model())
    x, y = torch.rand(3, *SHAPE, generator=generator(3)), torch.tensor([0, 1, 2])
    to_onnx.export(small.net, SHAPE, tmp_path / "model.onnx")
    with torch.no_grad():
        z = small.net(x)
        assert torch.allclose(networks.onnx_logits((tmp_path / "model.onnx").read_bytes(), x), z, atol=1e-4)
        lead = z.gather(1, y[:, None])[:, 0] - z.scatter(1, y[:, None], -torch.inf).amax(1)
        assert bool((IBP().margins(small.net, x, y, Threat(norm="linf", eps=0.0)) <= lead).all())


@pytest.mark.parametrize("kind", KINDS)
def test_same_seed_same_weights(kind: str) -> None:
    first, second = (compressed(kind, model())[0] for _ in range(2))
    assert first.arch == second.arch
    pairs = zip(first.net.state_dict().values(), second.net.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
