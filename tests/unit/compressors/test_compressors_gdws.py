"""The nine checks of the notes on GDWS, brute force where the case is small, and the allocation over a network."""

from collections.abc import Iterator
from itertools import product
from pathlib import Path

import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from stages.compressors import gdws as subject
from stages.compressors._account import account
from stages.compressors._importance import importance
from stages.compressors._svd import atoms, error, lego, mego
from stages.compressors.base import Bench
from stages.compressors.gdws import GDWS
from stages.method import InputError
from stages.nn import to_onnx
from stages.nn.arch import Arch, Model
from stages.nn.cost import cost
from stages.nn.layers.gdws_conv import fit, folded
from stages.seeding import generator

Batch = tuple[Tensor, Tensor, Tensor]


def convolution(
    outputs: int, inputs: int, side: int, seed: int, stride: int = 1, padding: int = 0, dilation: int = 1
) -> nn.Conv2d:
    with torch.random.fork_rng(devices=[]):
        layer = nn.Conv2d(inputs, outputs, side, stride, padding, dilation)
    rng = generator(seed, "convolution")
    with torch.no_grad():
        for value in layer.parameters():
            value.copy_(torch.randn(value.shape, generator=rng))
    return layer


def weighted(layer: nn.Conv2d, other: nn.Conv2d, alpha: Tensor) -> float:
    gap = (layer.weight.double() - other.weight.double()).square().sum((0, 2, 3)).detach()
    return float((alpha * gap).sum())


def alpha(count: int, seed: int) -> Tensor:
    return torch.rand(count, generator=generator(seed, "alpha"), dtype=torch.float64) + 0.1


@pytest.mark.parametrize(("stride", "padding", "dilation"), [(1, 0, 1), (2, 1, 1), (1, 2, 2), (2, 0, 2)])
@pytest.mark.parametrize(("outputs", "side"), [(12, 3), (5, 3), (4, 2)])
def test_1_full_rank_changes_nothing(stride: int, padding: int, dilation: int, outputs: int, side: int) -> None:
    dense = convolution(outputs, 3, side, 1, stride, padding, dilation)
    kernels = lego(atoms(dense.weight, torch.ones(3)), 0.0)
    assert kernels == (min(outputs, side * side),) * 3
    x = torch.rand(2, 3, 9, 9, generator=generator(1))
    with torch.no_grad():
        assert torch.allclose(fit(dense, kernels)(x), dense(x), atol=1e-5)


def test_2_the_error_is_the_sum_of_what_is_dropped() -> None:
    dense, weights = convolution(6, 4, 3, 2).double(), alpha(4, 2)
    values = atoms(dense.weight, weights)
    for total in range(values.numel() + 1):
        kernels = mego(values, total)
        assert sum(kernels) == total
        assert weighted(dense, folded(fit(dense, kernels)), weights) == pytest.approx(error(values, kernels), abs=1e-9)


def test_3_both_solvers_are_optimal_by_enumeration() -> None:
    dense, weights = convolution(5, 3, 2, 3).double(), alpha(3, 3)
    values = atoms(dense.weight, weights)
    every = {g: error(values, g) for g in product(range(5), repeat=3)}
    for total in range(13):
        best = min(e for g, e in every.items() if sum(g) <= total)
        assert error(values, mego(values, total)) == pytest.approx(best, abs=1e-12)
    for beta in (0.0, 0.05, 0.3, 1.0, 3.0, 100.0):
        fewest = min(sum(g) for g, e in every.items() if e <= beta)
        assert sum(lego(values, beta)) == fewest
        assert error(values, lego(values, beta)) <= beta


def test_4_the_two_problems_are_dual() -> None:
    values = atoms(convolution(7, 3, 3, 4).weight, alpha(3, 4))
    for total in range(values.numel() + 1):
        # A hair more than the error, because the two sums round differently.
        assert sum(lego(values, error(values, mego(values, total)) * (1 + 1e-12) + 1e-300)) == total


def test_5_ranks_that_are_there_are_found_and_recovered() -> None:
    rng = generator(5)
    dense = convolution(6, 4, 3, 5).double()
    ranks = (1, 2, 0, 3)
    with torch.no_grad():
        for channel, rank in enumerate(ranks):
            left = torch.randn(6, rank, generator=rng, dtype=torch.float64)
            right = torch.randn(rank, 9, generator=rng, dtype=torch.float64)
            dense.weight[:, channel] = (left @ right).view(6, 3, 3)
    kernels = lego(atoms(dense.weight, torch.ones(4)), 0.0)
    assert kernels == ranks
    assert mego(atoms(dense.weight, torch.ones(4)), 36) == ranks
    assert torch.allclose(folded(fit(dense, kernels)).weight, dense.weight, atol=1e-12)


def test_6_fewer_outputs_than_kernel_entries_and_no_kernel_at_all() -> None:
    dense = convolution(5, 2, 3, 6)
    values = atoms(dense.weight, torch.ones(2))
    assert values.shape == (2, 5)
    assert lego(values, 1e9) == (0, 0)
    assert dense.bias is not None
    with torch.no_grad():
        y = fit(dense, (0, 0))(torch.rand(2, 2, 7, 7, generator=generator(6)))
    assert torch.equal(y, dense.bias.detach().view(1, 5, 1, 1).expand(2, 5, 5, 5))


def test_7_forms_folding_gauge_and_scaled_weights_agree(tmp_path: Path) -> None:
    dense = convolution(8, 3, 3, 7, 2, 1)
    values = atoms(dense.weight, torch.ones(3))
    kernels = mego(values, 7)
    x = torch.rand(2, 3, 8, 8, generator=generator(7))
    with torch.no_grad():
        expected = folded(fit(dense, kernels))(x)
        for form in ("gather", "sum", "concat"):
            net = nn.Sequential(fit(dense, kernels, form), nn.Flatten()).eval()
            assert torch.allclose(net(x), expected.flatten(1), atol=1e-5)
            to_onnx.export(net, (3, 8, 8), tmp_path / f"{form}.onnx")
            session = onnxruntime.InferenceSession(tmp_path / f"{form}.onnx", providers=["CPUExecutionProvider"])
            assert torch.allclose(torch.from_numpy(session.run(None, {"input": x.numpy()})[0]), net(x), atol=1e-5)
        layer = fit(dense, kernels)
        gauge = torch.rand(7, generator=generator(8)) + 0.5
        layer.depthwise.mul_(gauge.view(7, 1, 1, 1))
        layer.pointwise.div_(gauge.view(1, 7, 1, 1))
        assert torch.allclose(layer(x), expected, atol=1e-5)
    assert lego(values * 10, 3.0) == lego(values, 0.3)
    assert mego(values * 10, 7) == kernels


class Linear(nn.Module):
    """z = A vec(conv(x)), for which the gradient in the kernel has a closed form."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = convolution(2, 3, 2, 8)
        self.head = nn.Linear(2 * 9, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.head(self.conv(x).flatten(1))
        return z


@pytest.mark.parametrize("rivals", [3, 2])
def test_8_importance_matches_equation_8_on_a_linear_network(rivals: int) -> None:
    net = Linear().eval()
    rng = generator(9)
    with torch.no_grad():
        net.head.weight.copy_(torch.randn(4, 18, generator=rng))
    x = torch.rand(5, 3, 4, 4, generator=rng)
    y = torch.zeros(5, dtype=torch.int64)
    batches = [(x[:2], x[:2], y[:2]), (x[2:], x[2:], y[2:])]
    found = importance(net, {"conv": net.conv}, batches, rivals)["conv"]
    expected = torch.zeros(3, dtype=torch.float64)
    patches = x.unfold(2, 2, 1).unfold(3, 2, 1).double()  # [5, C, 3, 3, K, K]
    with torch.no_grad():
        z = net(x).double()
    for i in range(5):
        order = z[i].argsort(descending=True)
        for j in order[1 : rivals + 1]:
            row = (net.head.weight[order[0]] - net.head.weight[j]).detach().double().view(2, 3, 3)
            slope = torch.einsum("mhw,chwkl->mckl", row, patches[i])
            gap = max(float(z[i, order[0]] - z[i, j]), 1e-2)
            expected += slope.square().sum((0, 2, 3)) / (2 * gap**2) / (2 * 4) / 5
    assert torch.allclose(found, expected, rtol=1e-4)


def test_8_importance_is_that_of_single_examples_by_autograd_and_zero_for_an_unused_channel() -> None:
    rng = generator(10)
    first, second = convolution(4, 2, 3, 10, 1, 1), convolution(3, 4, 3, 11, 2, 1)
    second.padding_mode = "zeros"
    head = nn.Linear(3 * 9, 3)
    with torch.no_grad():
        second.weight[:, 1] = 0
        # Nothing of input channel 3 reaches the second layer.
        first.weight[3], first.bias[3] = 0, -1  # type: ignore[index]
    net = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Flatten(), head).eval()
    x = torch.rand(4, 2, 6, 6, generator=rng)
    found = importance(net, {"0": first, "2": second}, [(x, x, torch.zeros(4, dtype=torch.int64))], 9)
    for path, layer in (("0", first), ("2", second)):
        expected = torch.zeros(layer.in_channels, dtype=torch.float64)
        for i in range(4):
            z = net(x[i : i + 1])[0]
            best = int(z.argmax())
            for j in range(3):
                if j == best:
                    continue
                (slope,) = torch.autograd.grad(z[best] - z[j], layer.weight, retain_graph=True)
                gap = max(float((z[best] - z[j]).detach()), 1e-2)
                expected += slope.double().square().sum((0, 2, 3)) / (2 * gap**2)
        assert torch.allclose(found[path], expected / 4 / layer.weight[:, 0].numel(), rtol=1e-4)
    assert float(found["2"][3]) == 0


def test_9_more_error_allowed_never_takes_more_kernels_and_cost_is_counted() -> None:
    values = atoms(convolution(9, 5, 3, 12).weight, alpha(5, 12))
    counts = []
    for beta in (0.0, 0.01, 0.1, 0.5, 2.0, 10.0, 1e3):
        kernels = lego(values, beta)
        counts.append(sum(kernels))
        assert error(values, kernels) <= beta
    assert counts == sorted(counts, reverse=True)
    dense = convolution(9, 5, 3, 12, 1, 1)
    spent = cost(fit(dense, (2, 1, 0, 3, 1)), (5, 6, 6)).macs
    assert spent == 36 * 7 * (9 + 9)
    assert cost(dense, (5, 6, 6)).macs / spent == pytest.approx(9 * 5 * 9 / (7 * (9 + 9)))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mego(torch.ones(2, 2), -1), "at least 0 kernels"),
        (lambda: lego(torch.ones(2, 2), -1.0), "error budget"),
        (lambda: lego(torch.ones(2, 2), float("nan")), "error budget"),
        (lambda: atoms(torch.ones(2, 3, 2, 2), torch.ones(2)), "expected 3 finite weights"),
        (lambda: atoms(torch.ones(2, 3, 2, 2), -torch.ones(3)), "expected 3 finite weights"),
    ],
)
def test_impossible_questions_are_refused(call: object, message: str) -> None:
    assert callable(call)
    with pytest.raises(InputError, match=message):
        call()


def resnet() -> Model:
    with torch.random.fork_rng(devices=[]):
        torch.random.set_rng_state(generator(20).get_state())
        arch = Arch(builder="resnet", options={"width": 8, "blocks": (1, 1)}, input_shape=(3, 12, 12), classes=4)
        return Model(arch, arch.build())


def bench(notes: list[str] | None = None) -> Bench:
    def adversarial(net: nn.Module) -> Iterator[Batch]:
        del net
        rng = generator(21)
        for _ in range(2):
            x = torch.rand(6, 3, 12, 12, generator=rng)
            yield x, x.flip(3), torch.randint(0, 4, (6,), generator=rng)

    return Bench(tune=lambda model: model, adversarial=adversarial, note=(notes if notes is not None else []).append)


def test_joint_meets_its_budget_and_takes_the_cheapest_error_first() -> None:
    model = resnet()
    dense = cost(model.net, (3, 12, 12)).macs
    spent = []
    for ratio in (0.0, 0.1, 0.3, 0.5):
        small = GDWS(ratio=ratio).compress(model, bench(), generator(0))
        spent.append(cost(small.net, (3, 12, 12)).macs)
        assert spent[-1] <= (1 - ratio) * dense
        for rewrite in small.arch.rewrites:
            layer, old = small.net.get_submodule(rewrite.at), account(model.net, (3, 12, 12))[rewrite.at]
            assert account(small.net, (3, 12, 12))[rewrite.at].macs <= 0.9 * old.macs
            assert layer.get_buffer("channels").numel() >= 1
    assert spent[0] == dense
    assert spent == sorted(spent, reverse=True)


def test_joint_is_no_worse_than_any_allocation_of_the_same_cost_by_enumeration() -> None:
    rng = generator(22)
    tiny = {
        name: subject._Candidate(
            convolution(4, 1, 2, seed),
            torch.rand(1, 4, generator=rng, dtype=torch.float64).sort(descending=True).values,
            dense=10**6,
            unit=unit,
        )
        for name, seed, unit in (("a", 1, 5), ("b", 2, 7), ("c", 3, 11))
    }
    total = 3 * 10**6  # dense, so far above any separable form that only the kernels count
    for budget in (92, 70, 60, 45, 23):
        chosen = subject.joint(tiny, total, 1 - (budget + 0.5) / total, 1.0)
        spent = sum(sum(g) * tiny[name].unit for name, g in chosen.items())
        assert spent <= budget
        left = sum(error(tiny[name].values, g) for name, g in chosen.items())
        every = product(*(range(1, 5) for _ in tiny))
        for counts in every:
            price = sum(n * one.unit for n, one in zip(counts, tiny.values(), strict=True))
            loss = sum(error(one.values, (n,)) for n, one in zip(counts, tiny.values(), strict=True))
            # The greedy answers are the corners of the trade-off: nothing of the same price or less is better.
            assert price > spent or loss >= left - 1e-12


def test_what_stays_dense() -> None:
    model = resnet()
    found = subject.eligible(model.net, account(model.net, (3, 12, 12)))
    first = next(iter(account(model.net, (3, 12, 12))))
    assert first not in found
    assert all(layer.kernel_size == (3, 3) for layer in found.values())
    grouped = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3))
    assert list(subject.eligible(grouped, account(grouped, (3, 12, 12)))) == ["3"]
    notes: list[str] = []
    arch = Arch(builder="mlp", input_shape=(3, 12, 12), classes=4)
    with torch.random.fork_rng(devices=[]):
        perceptron = Model(arch, arch.build())
    assert GDWS().compress(perceptron, bench(notes), generator(0)) is perceptron
    assert "no convolution" in notes[0]


@pytest.mark.parametrize(
    "method",
    [GDWS(solver="lego", beta=0.0), GDWS(solver="mego", kernels=9), GDWS(ratio=0.0), GDWS(solver="lego", margin=1e-6)],
)
def test_nothing_is_replaced_where_it_does_not_pay(method: GDWS) -> None:
    model = resnet()
    assert method.compress(model, bench(), generator(0)) is model


@pytest.mark.parametrize("weights", ["adversarial", "none"])
@pytest.mark.parametrize(
    "settings", [{"solver": "lego", "beta": 0.3}, {"solver": "mego", "kernels": 2}, {"ratio": 0.4}]
)
def test_every_solver_leaves_a_model_that_rebuilds(settings: dict[str, object], weights: str) -> None:
    model = resnet()
    small = GDWS.load({**settings, "weights": weights, "form": "sum"}).compress(model, bench(), generator(0))
    assert cost(small.net, (3, 12, 12)).macs < cost(model.net, (3, 12, 12)).macs
    with torch.random.fork_rng(devices=[]):
        again = Arch.load(small.arch.dump()).build()
    again.load_state_dict(small.net.state_dict())
    x = torch.rand(2, 3, 12, 12, generator=generator(23))
    with torch.no_grad():
        assert torch.equal(again(x), small.net(x))


def test_a_ratio_out_of_reach_says_what_is_within() -> None:
    with pytest.raises(InputError, match=r"gdws\.ratio: expected at most 0\.\d+"):
        GDWS(ratio=0.99).compress(resnet(), bench(), generator(0))
