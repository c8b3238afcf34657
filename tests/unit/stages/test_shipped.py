"""The exported file under attack, on a linear graph whose worst point is known in closed form."""

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from stages.attacks.base import Attack
from stages.attacks.pgd import PGD
from stages.attacks.square import Square
from stages.nn.imported import imported
from stages.shipped import Shipped, survivors
from targets.runtime.ort import OrtEngine
from tests.linear_nets import NORMS, Norm, TwoClass, problem, with_leads


def graph(net: TwoClass) -> bytes:
    """The same function as an ONNX file: Flatten, Gemm."""
    w = net.w.detach().flatten().numpy()
    lead = float(net.b) - 0.5 * float(w.sum())
    tensors = {"w": np.stack([w / 2, -w / 2]).astype(np.float32), "b": np.array([lead / 2, -lead / 2], np.float32)}
    made = helper.make_graph(
        [
            helper.make_node("Flatten", ["input"], ["flat"]),
            helper.make_node("Gemm", ["flat", "w", "b"], ["logits"], transB=1),
        ],
        "linear",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", *net.w.shape])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 2])],
        [numpy_helper.from_array(array, name) for name, array in tensors.items()],
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model)
    data: bytes = model.SerializeToString(deterministic=True)
    return data


class Untouchable(nn.Module):
    """A twin that nobody may ask."""

    def forward(self, x: Tensor) -> Tensor:
        raise AssertionError(f"the twin was asked about {len(x)} images")


def shipped(net: TwoClass, twin: nn.Module | None = None) -> Shipped:
    data = graph(net)
    return Shipped(OrtEngine(data), imported(data) if twin is None else twin)


@pytest.mark.parametrize("norm", NORMS)
def test_the_value_is_the_engines_and_the_gradient_the_twins(norm: Norm) -> None:
    net, x, _ = problem(norm)
    other = TwoClass(torch.flip(net.w.detach(), (1, 2)) * 3, 7.0)  # nothing like the engine
    both = shipped(net, imported(graph(other)))
    x = x.clone().requires_grad_(True)
    logits = both(x)
    torch.testing.assert_close(logits, net(x).detach(), rtol=0, atol=1e-5)
    (slope,) = torch.autograd.grad(logits[:, 0].sum(), x)
    torch.testing.assert_close(slope, (other.w.detach() / 2).expand_as(x))


def test_without_a_gradient_to_take_the_twin_is_not_asked_and_the_values_are_the_engines_to_the_bit() -> None:
    net, x, _ = problem("linf")
    alone = shipped(net, Untouchable())
    expected = OrtEngine(graph(net))(x.numpy())
    assert np.array_equal(alone(x).numpy(), expected)
    with torch.no_grad():
        assert np.array_equal(alone(x.requires_grad_(True)).numpy(), expected)
    with pytest.raises(AssertionError, match="the twin was asked"):
        alone(x)


def test_images_in_any_memory_layout_are_the_same_images() -> None:
    net, x, _ = problem("linf")
    both = shipped(net)
    turned = x.transpose(2, 3).contiguous().transpose(2, 3)
    assert not turned.is_contiguous()
    assert torch.equal(both(turned), both(x))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(("share", "survives"), [(0.9, False), (1.1, True)])
def test_gradients_through_the_twin_find_the_closed_form_worst_point(norm: Norm, share: float, survives: bool) -> None:
    """A lead of 0.9 of what the threat can take is broken, one of 1.1 of it cannot be."""
    net, x, y, threat = with_leads(norm, share)
    attack = PGD(steps=40, loss="margin")
    clean, alive, _ = survivors(shipped(net), (attack,), x, y, x, threat, seed=0)
    assert clean.tolist() == [True] * len(x)
    assert alive.tolist() == [survives] * len(x)


def test_a_black_box_attack_sees_the_engine_alone() -> None:
    net, x, y, threat = with_leads("linf", 0.3)
    square = Square(queries=200)
    _, alive, _ = survivors(shipped(net, Untouchable()), (square,), x, y, x, threat, seed=0)
    assert int(alive.sum()) < len(x) / 2
    with pytest.raises(AssertionError, match="the twin was asked"):
        survivors(shipped(net, Untouchable()), (PGD(steps=2),), x, y, x, threat, seed=0)


def test_a_replayed_example_that_is_misread_breaks_its_image_without_any_attack() -> None:
    net, x, y, threat = with_leads("linf", 0.5)
    replay = x.clone()
    replay[::2] = x[::2] - threat.eps * net.w.detach().sign()  # the worst point; the others are replayed unchanged
    clean, alive, _ = survivors(shipped(net), (), x, y, replay, threat, seed=0)
    assert clean.all()
    assert alive.tolist() == [i % 2 == 1 for i in range(len(x))]


def test_a_replayed_example_outside_of_the_threat_is_brought_back_into_it() -> None:
    net, x, y, threat = with_leads("linf", 1.1)  # no point of the threat breaks these
    far = x - 5 * threat.eps * net.w.detach().sign()
    assert (net(far).argmax(1) != y).all()
    _, alive, _ = survivors(shipped(net), (), x, y, far, threat, seed=0)
    assert alive.all()


def test_an_image_that_is_wrong_without_attack_is_neither_clean_nor_alive() -> None:
    net, x, y, threat = with_leads("linf", 1.1)
    y = y.clone()
    y[:5] = 1
    clean, alive, _ = survivors(shipped(net), (PGD(steps=3),), x, y, x, threat, seed=0)
    assert clean.tolist() == alive.tolist() == [False] * 5 + [True] * (len(x) - 5)


def test_stored_bytes_and_floats_are_the_same_images() -> None:
    net, x, y, threat = with_leads("linf", 0.5)
    stored = (x * 255).round().to(torch.uint8)
    floats = stored.to(torch.float32) / 255
    ours = shipped(net)
    struck: tuple[tuple[Attack, ...], ...] = ((), (PGD(steps=2),))
    for attacks in struck:
        one = survivors(ours, attacks, stored, y, floats, threat, seed=0)
        other = survivors(ours, attacks, floats, y, floats, threat, seed=0)
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[1], other[1])


def test_every_attack_strikes_what_is_left_and_tells_how_far_it_is() -> None:
    told: list[tuple[int, int]] = []
    net, x, y, threat = with_leads("linf", 1.1)
    attacks: tuple[Attack, ...] = (PGD(steps=2), Square(queries=5), PGD(steps=3))
    survivors(shipped(net), attacks, x, y, x, threat, 0, lambda done, total: told.append((done, total)))
    assert told == [(1, 3), (2, 3), (3, 3)]
    told.clear()
    net, x, y, threat = with_leads("linf", 0.5)
    strong = (PGD(steps=10, loss="margin"), *attacks)
    _, alive, _ = survivors(shipped(net), strong, x, y, x, threat, 0, lambda done, total: told.append((done, total)))
    assert not alive.any()
    assert told == [(1, 4)]  # nothing is left for the others


def test_equal_seeds_give_equal_survivors_and_the_order_of_a_batch_hurts_nobody() -> None:
    net, x, y, threat = with_leads("linf", 0.6)
    weak = (Square(queries=8),)
    one, other = (survivors(shipped(net), weak, x, y, x, threat, seed=3)[1] for _ in range(2))
    assert torch.equal(one, other)
    assert 0 < int(one.sum()) < len(x)  # luck decides some of them, so that equality says something
