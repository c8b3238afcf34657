"""Depthwise and 1x1 convolutions merged in the torch twin: the same function and gradients, in fewer operators."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from stages.nn._onnx_separable import merge
from stages.nn._onnx_tidy import fold_constants
from stages.nn._separable import dense_is_quicker
from stages.nn.fold import dense
from stages.nn.imported import Twin, imported
from stages.nn.layers.gdws_conv import Form, GDWSConv, fit
from stages.nn.to_onnx import export
from stages.seeding import generator
from targets.passes import fp16, qdq_int8_cpu
from targets.passes.base import Kit
from tests.networks import arch, built, images, onnx_logits

_SHAPE = (3, 16, 16)
_FORMS: tuple[Form, ...] = ("gather", "sum", "concat")


def _separable(form: Form) -> nn.Module:
    net = built(arch("wrn", _SHAPE))
    for path, layer in list(net.named_modules())[5:]:
        if isinstance(layer, nn.Conv2d) and layer.kernel_size == (3, 3):
            net.set_submodule(path, fit(layer, [2 + c % 2 for c in range(layer.in_channels)], form))
    return net.eval()


def _exported(net: nn.Module, folder: Path) -> bytes:
    export(net, _SHAPE, folder / "m.onnx")
    return (folder / "m.onnx").read_bytes()


def _literal(graph: bytes) -> Twin:
    """The twin of every node as it stands."""
    model = onnx.load_model_from_string(graph)
    fold_constants(model)
    return Twin(model).eval()


def _gradient(net: nn.Module, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    (found,) = torch.autograd.grad(net(x).square().sum(), x)
    return found


def _convolutions(graph: onnx.GraphProto) -> int:
    return sum(node.op_type == "Conv" for node in graph.node)


@pytest.mark.parametrize("form", _FORMS)
def test_a_twin_without_depthwise_steps_is_the_same_function(form: Form, tmp_path: Path) -> None:
    net = _separable(form)
    graph = _exported(net, tmp_path)
    twin, literal, x = imported(graph), _literal(graph), images(6, _SHAPE)
    model = onnx.load_model_from_string(graph)
    fold_constants(model)
    merge(model)
    kinds = Counter(node.op_type for node in model.graph.node)
    assert kinds["Conv"] == sum(isinstance(layer, nn.Conv2d | GDWSConv) for layer in net.modules())
    assert (kinds["Gather"], kinds["Concat"], kinds["Add"]) == (0, 0, 3)  # a WRN-10 has three residual additions
    read = {name for node in model.graph.node for name in node.input}
    assert all(tensor.name in read for tensor in model.graph.initializer)
    for other in (literal(x), net(x), onnx_logits(graph, x)):
        torch.testing.assert_close(twin(x), other.detach(), rtol=1e-4, atol=1e-4)
    for whole in (literal, net, dense(net)):
        torch.testing.assert_close(_gradient(twin, x), _gradient(whole, x), rtol=1e-3, atol=1e-4)


def test_what_lies_between_two_convolutions_keeps_them_apart(tmp_path: Path) -> None:
    """Q/DQ in an int8 graph; batch normalisation's ReLU6 in a MobileNet."""
    quantised = qdq_int8_cpu.lower(
        onnx.load_model_from_string(_exported(_separable("gather"), tmp_path)),
        {},
        Kit(images(64, _SHAPE, seed=1).numpy(), tmp_path),
    )
    mobile = onnx.load_model_from_string(_exported(built(arch("mobilenet", _SHAPE)), tmp_path))
    for model in (quantised, mobile):
        fold_constants(model)
        before = _convolutions(model.graph)
        merge(model)
        assert _convolutions(model.graph) == before


def test_half_precision_pairs_merge_in_single_precision(tmp_path: Path) -> None:
    kit = Kit(images(8, _SHAPE, seed=1).numpy(), tmp_path)
    graph = fp16.lower(onnx.load_model_from_string(_exported(_separable("sum"), tmp_path)), {}, kit).SerializeToString()
    twin, literal, x = imported(graph), _literal(graph), images(6, _SHAPE)
    assert len(twin._steps) < len(literal._steps)
    torch.testing.assert_close(twin(x), literal(x), rtol=1e-3, atol=1e-3)


def _pair(**given: Any) -> tuple[onnx.ModelProto, Tensor]:
    """A depthwise convolution with bias, stride, dilation and uneven pads, and a 1x1 one, with or without more."""
    rng = np.random.default_rng(0)
    point = {"strides": [1, 1], **given.get("pointwise", {})}
    tensors = {
        "d": rng.standard_normal((6, 1, 3, 3)),
        "db": rng.standard_normal(6),
        "p": rng.standard_normal((5, 6, 1, 1)),
        "pb": rng.standard_normal(5),
    }
    nodes = [
        helper.make_node("Conv", ["x", "d", "db"], ["m"], group=6, strides=[2, 1], dilations=[1, 2], pads=[1, 0, 2, 3]),
        helper.make_node("Conv", ["m", "p", "pb"], ["y"], **point),
    ]
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in given.get("outputs", ["y"])]
    image = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 6, 9, 9])
    constants = [numpy_helper.from_array(value.astype(np.float32), name) for name, value in tensors.items()]
    graph = helper.make_graph(nodes, "g", [image], outputs, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    return model, torch.rand(3, 6, 9, 9, generator=generator(0, "pair"))


def test_biases_strides_dilations_and_uneven_pads_survive() -> None:
    model, x = _pair()
    expected = Twin(model)(x)
    merge(model)
    assert _convolutions(model.graph) == 1
    torch.testing.assert_close(Twin(model)(x), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(onnx_logits(model.SerializeToString(), x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "given",
    [{"pointwise": {"strides": [2, 2]}}, {"pointwise": {"pads": [1, 1, 1, 1]}}, {"outputs": ["y", "m"]}],
    ids=["stride", "pads", "read elsewhere"],
)
def test_pairs_that_are_no_matrix_per_pixel_or_are_read_elsewhere_stay(given: dict[str, Any]) -> None:
    model, _ = _pair(**given)
    merge(model)
    assert _convolutions(model.graph) == 2


def test_one_kernel_per_channel_of_a_wide_layer_stays_separable() -> None:
    """There the dense form has nine times the work: `benchmarks/separable.py`."""
    assert not dense_is_quicker(256, 256, 256, 9)
    assert dense_is_quicker(16, 16, 32, 9)
    wide = fit(nn.Conv2d(64, 64, 3, padding=1), [1] * 64)
    assert isinstance(dense(wide), GDWSConv)
    assert isinstance(dense(fit(nn.Conv2d(64, 64, 3, padding=1), [3] * 64)), nn.Conv2d)


def test_a_layer_without_kernels_stays_a_constant() -> None:
    assert isinstance(dense(fit(nn.Conv2d(4, 6, 3), [0] * 4)), GDWSConv)
