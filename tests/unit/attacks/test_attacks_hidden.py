"""Hidden: closed forms on linear layers, layers seen through any wrapping, and nothing left behind."""

from pathlib import Path

import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn
from torch._C import _len_torch_function_stack

from stages.attacks._layers import spread, watched
from stages.attacks._losses import gradient
from stages.attacks.hidden import Hidden, _nearest
from stages.method import InputError
from stages.nn.imported import imported
from stages.oracle import Oracle
from stages.seeding import generator
from stages.threat import Threat

NORMS = [Threat(norm="linf", eps=0.05), Threat(norm="l2", eps=0.2)]
LINF = NORMS[0]


def filled(net: nn.Module, scale: float = 0.5) -> nn.Module:
    rng = generator(1, "hidden")
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=rng))
    return net.eval().requires_grad_(False)


def convolutional() -> nn.Module:
    return filled(
        nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(4, 6, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.Flatten(),
            nn.Linear(24, 8),
            nn.ReLU(),
            nn.Linear(8, 4),
        )
    )


def images(net: nn.Module, count: int = 12) -> tuple[Tensor, Tensor]:
    x = torch.rand(count, 1, 4, 4, generator=generator(2))
    return x, net(x).argmax(1)


@pytest.mark.parametrize("threat", NORMS, ids=lambda threat: threat.norm)
def test_disrupting_one_linear_unit_reaches_its_closed_form(threat: Threat) -> None:
    """h = w . x + b: the largest |h(x') - h(x)| is eps ||w||_dual."""
    net = filled(nn.Sequential(nn.Flatten(), nn.Linear(16, 1), nn.Linear(1, 2)))
    net[2].bias.copy_(torch.tensor([50.0, 0.0]))  # type: ignore[index]
    x = 0.3 + 0.4 * torch.rand(5, 1, 4, 4, generator=generator(0))
    y = torch.zeros(5, dtype=torch.int64)
    found = Hidden(goals=("disrupt",), steps=30, step=1.0, finish=0).perturb(net, x, y, threat, generator(0))
    moved = (net[:2](found) - net[:2](x)).abs().flatten()  # type: ignore[index]
    dual = 1 if threat.norm == "linf" else 2
    reach = threat.eps * float(torch.linalg.vector_norm(net[1].weight, ord=dual))  # type: ignore[index]
    assert torch.allclose(moved, torch.full((5,), reach), rtol=1e-4)


def test_the_same_layers_are_seen_in_modules_functions_and_oracles() -> None:
    net = convolutional()
    x, _ = images(net)
    z, hidden, latent = watched(net, x)
    assert [tuple(layer.shape[1:]) for layer in hidden] == [(4, 4, 4), (6, 2, 2), (8,)]
    assert torch.allclose(latent, net[:-1](x))  # type: ignore[index]
    assert torch.allclose(z, net(x))
    for other in (lambda x: net(x) + 0, Oracle.of(net, len(x))):
        z_other, hidden_other, latent_other = watched(other, x)
        for one, same in zip((z, latent, *hidden), (z_other, latent_other, *hidden_other), strict=True):
            assert torch.equal(one, same)


def test_the_layers_of_an_onnx_file_are_seen_though_its_twin_is_one_module(tmp_path: Path) -> None:
    rng = generator(5)
    weights = {"w1": torch.randn(16, 6, generator=rng), "w2": torch.randn(6, 3, generator=rng)}
    nodes = [
        helper.make_node("Flatten", ["input"], ["flat"]),
        helper.make_node("Gemm", ["flat", "w1"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("MatMul", ["r", "w2"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 1, 4, 4])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 3])],
        [numpy_helper.from_array(value.numpy(), name) for name, value in weights.items()],
    )
    path = tmp_path / "model.onnx"
    path.write_bytes(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]).SerializeToString())
    x = torch.rand(7, 1, 4, 4, generator=rng)
    _, hidden, latent = watched(imported(path), x)
    first = x.flatten(1) @ weights["w1"]
    assert len(hidden) == 1
    assert torch.allclose(hidden[0], first, atol=1e-6)
    assert torch.allclose(latent, first.relu(), atol=1e-6)


def test_a_product_of_weights_alone_is_no_layer() -> None:
    left, right = torch.rand(16, 5), torch.rand(5, 3)
    _, hidden, latent = watched(lambda x: x.flatten(1) @ (left @ right), torch.rand(4, 1, 4, 4))
    assert hidden == []
    assert latent.shape == (4, 16)


def test_nothing_is_left_behind_even_where_the_network_fails() -> None:
    net = convolutional()
    x, y = images(net)
    attack = Hidden(steps=2, finish=1)
    attack(net, x, y, LINF, generator(0))

    def failing(x: Tensor) -> Tensor:
        if x.requires_grad:
            raise ArithmeticError("lost")
        z: Tensor = net(x)
        return z

    with pytest.raises(ArithmeticError, match="lost"):
        attack(failing, x, y, LINF, generator(0))
    assert _len_torch_function_stack() == 0
    for module in net.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert not module._backward_hooks


def test_joint_gives_both_gradients_the_same_norm_at_the_first_step() -> None:
    net = convolutional()
    x, y = images(net)
    attack, start = Hidden(goals=("joint",)), LINF.random(x, generator(3))
    home = watched(net, x)[1]

    scales = [spread(layer) for layer in home]
    ones = torch.ones(len(x))
    oracle = Oracle.of(net, len(x))
    _, both, weight = attack._slope(oracle, start, y, "joint", home, scales, ones, True)
    apart = attack._slope(net, start, y, "disrupt", home, scales, ones, False)[1]
    own = gradient(net, start, y, "ce")[2]
    sized = weight.view(-1, 1, 1, 1) * apart
    assert torch.allclose(sized.flatten(1).norm(dim=1), own.flatten(1).norm(dim=1), rtol=1e-4)
    assert torch.allclose(both, own + sized, atol=1e-6)
    assert oracle.spent.gradients.tolist() == [2] * len(x)


def test_joint_moves_where_cross_entropy_is_saturated() -> None:
    net = convolutional()
    x, y = images(net)
    x = x[(net(x).topk(2).values.diff().abs() > 0.5).flatten()]
    y = net(x).argmax(1)

    def sure(x: Tensor) -> Tensor:
        z: Tensor = net(x)
        return 1e4 * z

    assert not bool(gradient(sure, x, y, "ce")[2].any())
    start = LINF.random(x, generator(0))
    found = Hidden(goals=("joint",), steps=3, finish=0).perturb(sure, x, y, LINF, generator(0))
    assert bool((found != start).flatten(1).any(1).all())


def test_a_guide_is_the_nearest_example_of_another_label() -> None:
    hidden = torch.tensor([[0.0], [1.0], [3.0], [3.5]])
    guide = _nearest(hidden, torch.tensor([0, 0, 1, 1]))
    assert guide is not None
    assert guide.tolist() == [2, 2, 1, 1]
    assert _nearest(hidden, torch.zeros(4, dtype=torch.int64)) is None


def test_imitation_draws_the_representation_towards_the_guide() -> None:
    net = convolutional()
    x, y = images(net, 40)
    home = watched(net, x)[1]
    guide = _nearest(home[-1], y)
    assert guide is not None
    small = Threat(norm="linf", eps=0.03)
    start = small.random(x, generator(0))
    found = Hidden(goals=("imitate",), layers=(-1,), steps=8, finish=0).perturb(net, x, y, small, generator(0))
    target = home[-1][guide]
    before, after = ((watched(net, point)[1][-1] - target).norm(dim=1) for point in (start, found))
    right = net(found).argmax(1) == y
    assert int(right.sum()) > 10
    assert bool((after < before)[right].all())


def test_a_batch_of_one_label_and_a_batch_of_one_are_attacked_all_the_same() -> None:
    net = convolutional()
    x, y = images(net, 40)
    for rows in ((y == y[0]).nonzero().flatten(), torch.tensor([0])):
        found = Hidden(steps=2, finish=2)(net, x[rows], y[rows], LINF, generator(0))
        assert found.shape == x[rows].shape
        assert bool((LINF.distance(found, x[rows]) <= LINF.eps * (1 + 1e-6)).all())


def test_every_pass_is_charged() -> None:
    """One query for the start; per goal, steps + finish gradients and a last look; one more gradient for joint."""
    net = convolutional()
    x, y = images(net)
    oracle, tiny = Oracle.of(net, len(x)), Threat(norm="linf", eps=1e-6)
    found = Hidden(steps=3, finish=2).perturb(oracle, x, y, tiny, generator(0))
    assert bool((net(found).argmax(1) == y).all())
    assert oracle.spent.queries.tolist() == [1 + 3 * (5 + 1)] * len(x)
    assert oracle.spent.gradients.tolist() == [3 * 5 + 1] * len(x)


def test_layers_beyond_those_seen_are_refused_with_what_there_is() -> None:
    net = convolutional()
    x, y = images(net)
    with pytest.raises(InputError, match=r"layers: expected places within -3\.\.2, since 3 hidden layers .*got 3"):
        Hidden(layers=(0, 3))(net, x, y, LINF, generator(0))


def test_an_engine_is_refused_by_name() -> None:
    net = convolutional()
    x, y = images(net)

    def engine(x: Tensor) -> Tensor:
        return torch.from_numpy(net(x.detach()).numpy()).clone()

    def opaque(x: Tensor) -> Tensor:
        return torch.cat([engine(x.detach()[i : i + 1]) for i in range(len(x))])

    with pytest.raises(InputError, match=r'expected a network in torch .*got opaque.*there is "square" for engines'):
        Hidden()(opaque, x, y, LINF, generator(0))
