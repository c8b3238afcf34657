"""Removal is exact, the saliency means something, and widths obey their rules."""

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stages.compressors._groups import Graph
from stages.compressors.base import Bench
from stages.compressors.prune import Prune, choose, grain, saliency
from stages.method import InputError
from stages.nn.arch import Arch, Model
from stages.nn.cost import cost
from stages.nn.layers.gdws_conv import fit
from stages.nn.layers.resized import changes
from stages.seeding import generator
from tests import networks

SHAPE = (3, 12, 12)
Batch = tuple[Tensor, Tensor, Tensor]


def model(builder: str, **options: Any) -> Model:
    arch = networks.arch(builder, SHAPE, **options)
    return Model(arch, networks.built(arch))


def batches(seed: int = 0, count: int = 2) -> Iterator[Batch]:
    rng = generator(seed, "batches")
    for _ in range(count):
        x = torch.rand(8, *SHAPE, generator=rng)
        yield x, x.flip(2), torch.randint(0, 10, (8,), generator=rng)


def bench(tuned: list[Model] | None = None, notes: list[str] | None = None) -> Bench:
    def tune(model: Model) -> Model:
        if tuned is not None:
            tuned.append(model)
        return model

    def adversarial(net: nn.Module) -> Iterator[Batch]:
        assert not net.training
        return batches()

    return Bench(tune=tune, adversarial=adversarial, note=(notes if notes is not None else []).append)


def graph(net: nn.Module) -> Graph:
    return Graph(net, torch.zeros(1, *SHAPE))


FAMILIES: list[tuple[str, dict[str, Any]]] = [
    ("small_cnn", {"width": 8, "hidden": 16}),
    ("mlp", {"hidden": (16, 8)}),
    ("resnet", {"width": 8, "blocks": (1, 1, 1)}),
    ("wrn", {}),
    ("mobilenet", {"expansion": 2}),
]


@pytest.mark.parametrize(("builder", "options"), FAMILIES)
def test_channels_that_carry_nothing_are_removed_without_a_trace(builder: str, options: dict[str, Any]) -> None:
    """Silent channels: everything that writes them is zero, so that nothing is read from them either."""
    full = model(builder, **options)
    groups = graph(copy.deepcopy(full.net)).groups()
    assert groups
    gone = {group.root: [0, group.width // 2] for group in groups if group.width >= 4}
    parameters = dict(full.net.named_parameters())
    for group in groups:
        for part in group.slices:
            if part.dim == 0 and group.root in gone:
                rows = [place for channel in gone[group.root] for place in part.places[channel]]
                with torch.no_grad():
                    parameters[part.parameter][rows] = 0
    small = copy.deepcopy(full.net)
    removal = graph(small)
    for root, channels in gone.items():
        removal.remove(root, channels)
    with torch.random.fork_rng(devices=[]):
        rebuilt = full.arch.rewritten(*changes(full.net, small)).build()
    rebuilt.load_state_dict(small.state_dict())
    x = torch.rand(4, *SHAPE, generator=generator(1))
    with torch.no_grad():
        assert torch.allclose(rebuilt(x), full.net(x), atol=1e-5)
    assert cost(rebuilt, SHAPE).params < cost(full.net, SHAPE).params


@pytest.mark.parametrize(("builder", "options"), FAMILIES)
def test_the_output_of_the_network_is_never_a_group(builder: str, options: dict[str, Any]) -> None:
    full = model(builder, **options)
    last = [path for path, module in full.net.named_modules() if isinstance(module, nn.Linear)][-1]
    assert all(last not in group.writes for group in graph(copy.deepcopy(full.net)).groups())


@pytest.mark.parametrize(("builder", "options"), FAMILIES)
def test_prune_rebuilds_from_its_architecture_and_keeps_the_input(builder: str, options: dict[str, Any]) -> None:
    full = model(builder, **options)
    before = {name: value.clone() for name, value in full.net.state_dict().items()}
    tuned: list[Model] = []
    small = Prune(ratio=0.5, steps=2).compress(full, bench(tuned), generator(0))
    assert len(tuned) == 2
    assert all(torch.equal(value, before[name]) for name, value in full.net.state_dict().items())
    with torch.random.fork_rng(devices=[]):
        again = Arch.load(small.arch.dump()).build()
    again.load_state_dict(small.net.state_dict())
    x = torch.rand(2, *SHAPE, generator=generator(2))
    with torch.no_grad():
        assert torch.equal(again(x), small.net(x))
    was = {group.root: group.width for group in graph(copy.deepcopy(full.net)).groups()}
    now = {group.root: group.width for group in graph(copy.deepcopy(small.net)).groups()}
    assert was.keys() == now.keys()
    for root, width in now.items():
        assert width == was[root] or width % grain(was[root], 16) == 0
        assert width >= 0.25 * was[root]
    assert 0.35 <= 1 - sum(now.values()) / sum(was.values()) <= 0.6


def test_the_ends_of_the_network_keep_half() -> None:
    full = model("small_cnn", width=64, hidden=128)
    small = Prune(ratio=0.74, steps=1, round_to=8).compress(full, bench(), generator(0))
    widths = {group.root: group.width for group in graph(copy.deepcopy(small.net)).groups()}
    assert widths["conv1"] >= 32
    assert widths["fc1"] >= 64
    assert widths["conv2"] == 32


def test_ratio_0_gives_the_model_back_and_too_much_says_so() -> None:
    full = model("small_cnn", width=8, hidden=16)
    tuned: list[Model] = []
    assert Prune(ratio=0.0).compress(full, bench(tuned), generator(0)) is full
    assert tuned == []
    notes: list[str] = []
    Prune(ratio=0.95, steps=3, floor=0.5).compress(full, bench(notes=notes), generator(0))
    assert any("no group can shrink further" in note for note in notes)
    assert "16 of 40 channels removed" in notes[-1] or "20 of 40 channels removed" in notes[-1]


def test_the_same_twice() -> None:
    full = model("resnet", width=8, blocks=(1, 1))
    first, second = (Prune(steps=2).compress(full, bench(), generator(0)) for _ in range(2))
    assert first.arch == second.arch
    pairs = zip(first.net.state_dict().values(), second.net.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_a_channel_that_nobody_reads_has_no_saliency() -> None:
    full = model("wrn")
    groups = graph(copy.deepcopy(full.net)).groups()
    group = next(g for g in groups if g.root.endswith("conv1"))
    reader = full.net.get_submodule(group.reads[0]) if group.reads else None
    names = [part for part in group.slices if part.dim == 1]
    assert names
    with torch.no_grad():
        for part in names:
            dict(full.net.named_parameters())[part.parameter][:, list(part.places[2])] = 0
    scores = saliency(full.net, groups, batches())
    assert float(scores[group.root][2]) == 0
    assert float(scores[group.root].mean()) == pytest.approx(1)
    assert reader is None or not reader.training


def test_saliency_covers_batch_normalisation_and_leaves_the_network_as_it_was() -> None:
    full = model("resnet", width=8, blocks=(1,))
    group = next(g for g in graph(copy.deepcopy(full.net)).groups() if g.root.endswith("conv1"))
    kinds = {type(full.net.get_submodule(part.parameter.rpartition(".")[0])).__name__ for part in group.slices}
    assert kinds == {"Conv2d", "BatchNorm2d"}
    flags = [p.requires_grad for p in full.net.parameters()]
    before = {name: value.clone() for name, value in full.net.state_dict().items()}
    found = saliency(full.net, [group], batches())[group.root]
    expected = torch.zeros(group.width, dtype=torch.float64)
    parameters = dict(full.net.named_parameters())
    for _, x_adv, y in batches():
        loss = F.cross_entropy(full.net(x_adv), y)
        slopes = dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))
        for part in group.slices:
            product = (parameters[part.parameter] * slopes[part.parameter]).abs().detach().double()
            for channel, places in enumerate(part.places):
                expected[channel] += product.index_select(part.dim, torch.tensor(places)).sum()
    assert torch.allclose(found, expected / expected.mean(), rtol=1e-4)
    assert [p.requires_grad for p in full.net.parameters()] == flags
    assert all(torch.equal(value, before[name]) for name, value in full.net.state_dict().items())


def ranks(values: Tensor) -> Tensor:
    return values.argsort().argsort().double()


def spearman(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([ranks(a), ranks(b)]))[0, 1])


def test_saliency_ranks_channels_as_their_removal_does() -> None:
    """A tiny trained network: remove each hidden unit in turn and compare the rise of the loss with the score."""
    rng = generator(3)
    x = torch.rand(128, *SHAPE, generator=rng)
    y = (x.mean((2, 3)).argmax(1) + 3 * (x[:, 0, :6].mean((1, 2)) > x[:, 0, 6:].mean((1, 2)))).long()
    found = []
    for seed in range(3):
        arch = networks.arch("mlp", SHAPE, hidden=(24,))
        net = networks.built(arch, seed)
        optimiser = torch.optim.Adam(net.parameters(), lr=3e-3)
        for _ in range(60):
            optimiser.zero_grad()
            F.cross_entropy(net(x), y).backward()  # type: ignore[no-untyped-call]
            optimiser.step()
        [group] = graph(copy.deepcopy(net)).groups()
        scores = saliency(net, [group], [(x, x, y)])[group.root]
        layer = net.get_submodule(group.root)
        assert isinstance(layer, nn.Linear)
        with torch.no_grad():
            whole, rises = float(F.cross_entropy(net(x), y)), torch.zeros(24)
            for unit in range(24):
                kept = layer.weight[unit].clone(), layer.bias[unit].clone()
                layer.weight[unit], layer.bias[unit] = 0, 0
                rises[unit] = float(F.cross_entropy(net(x), y)) - whole
                layer.weight[unit], layer.bias[unit] = kept
        found.append(spearman(scores, rises.abs()))
    assert min(found) > 0.6


@pytest.mark.parametrize(
    ("width", "round_to", "expected"),
    [(64, 16, 16), (32, 16, 16), (31, 16, 8), (16, 16, 8), (8, 16, 4), (3, 16, 1), (1, 16, 1), (100, 32, 32)],
)
def test_grain(width: int, round_to: int, expected: int) -> None:
    assert grain(width, round_to) == expected


def test_blocks_go_from_the_least_salient_up_and_stop_at_the_quota() -> None:
    scores = {"a": torch.tensor([4.0, 1.0, 3.0, 2.0]), "b": torch.tensor([0.5, 9.0, 9.0, 0.1, 9.0, 9.0])}
    grains, floors = {"a": 1, "b": 2}, {"a": 2, "b": 2}
    assert choose(scores, 2, grains, floors) == {"a": (), "b": (0, 3)}
    assert choose(scores, 3, grains, floors) == {"a": (1,), "b": (0, 3)}
    assert choose(scores, 4, grains, floors) == {"a": (1, 3), "b": (0, 3)}
    assert choose(scores, 99, grains, floors) == {"a": (1, 3), "b": (0, 1, 2, 3)}
    # Nearer to nothing than to a whole block: nothing.
    assert choose({"a": torch.arange(8.0)}, 1, {"a": 4}, {"a": 1}) == {"a": ()}


def test_a_width_that_is_no_multiple_falls_to_one_first() -> None:
    gone: Mapping[str, tuple[int, ...]] = choose({"a": torch.arange(10.0)}, 3, {"a": 4}, {"a": 1})
    assert gone == {"a": (0, 1)}


def test_grouped_convolutions_keep_their_channels() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2), nn.Flatten(), nn.Linear(512, 10))
    assert graph(net.eval()).groups() == ()


def test_layers_that_were_replaced_before_are_refused_by_name() -> None:
    full = model("small_cnn", width=8, hidden=16)
    conv = full.net.get_submodule("conv2")
    assert isinstance(conv, nn.Conv2d)
    full.net.set_submodule("conv2", fit(conv, (1,) * 8).eval())
    with pytest.raises(InputError, match=r'"conv2" \(GDWSConv\); prune before'):
        Prune().compress(full, bench(), generator(0))
