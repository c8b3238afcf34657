"""Whole networks of others' making, old opsets and fixed batches among them, against onnxruntime image by image."""

import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from stages.bounds.ibp import IBP
from stages.method import InputError
from stages.nn._onnx_batch import freed
from stages.nn.imported import imported
from stages.nn.to_onnx import export
from stages.threat import Threat
from tests.networks import arch, built, images, onnx_logits


def _exported(net: nn.Module, example: Tensor, opset: int, free: bool) -> bytes:
    buffer = io.BytesIO()
    axes = {"i": {0: "batch"}, "o": {0: "batch"}} if free else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            net,
            (example,),
            buffer,  # type: ignore[arg-type]
            dynamo=False,
            opset_version=opset,
            input_names=["i"],
            output_names=["o"],
            dynamic_axes=axes,
        )
    return buffer.getvalue()


def _one_by_one(graph: bytes, x: Tensor, batch: int = 1) -> Tensor:
    parts = [onnx_logits(graph, part) for part in torch.split(x, batch)]
    return torch.cat([part.reshape(batch, -1) for part in parts])


def _close(twin: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(twin, expected, rtol=0, atol=1e-5 * max(1.0, float(expected.abs().max())))


class _Attention(nn.Module):
    """Patches, a class token, one block of attention with LayerNorm and GELU: shapes are computed all over."""

    def __init__(self) -> None:
        super().__init__()
        self.cut = nn.Conv2d(1, 16, 4, 4)
        self.token, self.place = nn.Parameter(torch.randn(1, 1, 16)), nn.Parameter(torch.randn(1, 5, 16))
        self.first, self.second = nn.LayerNorm(16), nn.LayerNorm(16)
        self.mix, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.wide = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        t = self.cut(x).flatten(2).transpose(1, 2)
        t = torch.cat([self.token.expand(t.shape[0], -1, -1), t], 1) + self.place
        batch, count, width = t.shape
        q, k, v = self.mix(self.first(t)).reshape(batch, count, 3, 2, width // 2).permute(2, 0, 3, 1, 4)
        looks = (q @ k.transpose(-2, -1) * 0.35).softmax(-1)
        t = t + self.out((looks @ v).transpose(1, 2).reshape(batch, count, width))
        logits: Tensor = self.head((t + self.wide(self.second(t)))[:, 0])
        return logits


class _Odd(nn.Module):
    """What small networks of others hold: ceil_mode, pads that count and do not, PReLU, grouped and transposed
    convolutions, HardSwish, SiLU, Softplus, global maxima."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 8, 5, stride=2, padding=2, padding_mode="reflect"),
            nn.PReLU(8),
            nn.MaxPool2d(3, 2, 1, ceil_mode=True),
            nn.ConvTranspose2d(8, 8, 3, stride=2, padding=1, output_padding=1, groups=2),
            nn.InstanceNorm2d(8, affine=True),
            nn.Hardswish(),
            nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False),
            nn.Conv2d(8, 8, 3, dilation=2, padding=2, groups=8, bias=False),
            nn.BatchNorm2d(8),
            nn.SiLU(),
            nn.AvgPool2d(2, 1, 1),
            nn.GroupNorm(2, 8),
            nn.Hardsigmoid(),
            nn.AdaptiveMaxPool2d(1),
            nn.Flatten(),
            nn.Linear(8, 10),
            nn.LogSoftmax(1),
        )

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body((x - 0.4) / 0.2)
        return y


@pytest.mark.parametrize("opset", [8, 11, 13, 17, 20])
@pytest.mark.parametrize("batch", [0, 1, 3], ids=["free", "one", "three"])
def test_our_own_networks_at_every_opset(opset: int, batch: int) -> None:
    for builder, shape in (("mobilenet", (3, 16, 16)), ("wrn", (3, 16, 16)), ("small_cnn", (1, 8, 8))):
        graph = _exported(built(arch(builder, shape)), torch.zeros(batch or 2, *shape), opset, free=batch == 0)
        twin, x = imported(graph), images(6, shape)
        assert twin.piece is None
        _close(twin(x), _one_by_one(graph, x, batch or 1))


@pytest.mark.parametrize("opset", [13, 17, 20])
@pytest.mark.parametrize("batch", [0, 1, 2], ids=["free", "one", "two"])
def test_attention_works_in_batches_whatever_it_was_exported_for(opset: int, batch: int) -> None:
    with torch.random.fork_rng(devices=[]):
        net = _Attention().eval()
    graph = _exported(net, torch.rand(batch or 2, 1, 8, 8), opset, free=batch == 0)
    twin, x = imported(graph), images(6, (1, 8, 8))
    _close(twin(x), _one_by_one(graph, x, batch or 1))
    assert batch == 2 or twin.piece is None
    _close(twin(x[:5]), net(x[:5]).detach())


@pytest.mark.parametrize("opset", [14, 17, 20])
def test_rare_layers(opset: int) -> None:
    with torch.random.fork_rng(devices=[]):
        net = _Odd().eval()
    graph = _exported(net, torch.rand(1, 1, 9, 9), opset, free=False)
    x = images(5, (1, 9, 9))
    _close(imported(graph)(x), _one_by_one(graph, x))


def _made(nodes: list[onnx.NodeProto], tensors: dict[str, Any], shape: list[Any], opset: int, out: Any = None) -> bytes:
    graph = helper.make_graph(
        nodes,
        "made",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, out or [None] * len(shape))],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in tensors.items()],
    )
    data: bytes = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8
    ).SerializeToString()
    return data


def _rand(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).normal(0, 0.3, shape).astype(np.float32)


def _old(opset: int) -> bytes:
    """Attributes where later opsets have inputs, automatic pads, softmax over all axes from one on."""
    node = helper.make_node
    tensors: dict[str, Any] = {
        "w": _rand(4, 1, 3, 3),
        "b": _rand(4),
        "v": _rand(6, 4, 2, 2),
        "flat": np.array([1, -1], np.int64),
        "head": _rand(54, 10),
    }
    nodes = [
        node("Pad", ["x"], ["p"], pads=[0, 0, 1, 0, 0, 0, 0, 1], value=0.5),
        node("Slice", ["p"], ["s"], starts=[0, 0], ends=[9, 9], axes=[2, 3]),
        node("Conv", ["s", "w", "b"], ["c"], auto_pad="SAME_UPPER", strides=[2, 2]),
        node("Clip", ["c"], ["k"], min=-0.2, max=0.6),
        node("Split", ["k"], ["k1", "k2"], axis=1, split=[1, 3]),
        node("Concat", ["k2", "k1"], ["k3"], axis=1),
        node("MaxPool", ["k3"], ["m"], kernel_shape=[2, 2], auto_pad="SAME_LOWER"),
        node("Dropout", ["m"], ["d"], ratio=0.5),
        node("Conv", ["d", "v"], ["c2"], auto_pad="SAME_LOWER"),
        node("AveragePool", ["c2"], ["a"], kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1]),
        node("Unsqueeze", ["a"], ["u"], axes=[0]),
        node("Squeeze", ["u"], ["q"], axes=[0]),
        node("Reshape", ["q", "flat"], ["f"]),
        node("MatMul", ["f", "head"], ["z"]),
        node("LogSoftmax", ["z"], ["y"]),
    ]
    return _made(nodes, tensors, [1, 1, 9, 9], opset, [1, 10])


@pytest.mark.parametrize("opset", [8, 9])
def test_attributes_of_old_opsets_in_batches(opset: int) -> None:
    graph, x = _old(opset), images(7, (1, 9, 9))
    twin = imported(graph)
    assert twin.piece is None
    _close(twin(x), _one_by_one(graph, x))


@pytest.mark.parametrize(("opset", "axis"), [(11, 1), (11, 2), (11, -1), (13, 1)])
def test_softmax_before_opset_13_is_over_all_axes_from_its_own_on(opset: int, axis: int) -> None:
    graph = _made([helper.make_node("Softmax", ["x"], ["y"], axis=axis)], {}, ["batch", 2, 3, 4], opset)
    x = images(3, (2, 3, 4))
    torch.testing.assert_close(imported(graph)(x), onnx_logits(graph, x))


@pytest.mark.parametrize("ceil", [0, 1])
@pytest.mark.parametrize("counted", [0, 1])
@pytest.mark.parametrize(
    ("pads", "height"),  # the last window of [1, 1, 0, 0] hangs over by as much as there is in front
    [([0, 0, 0, 0], 8), ([1, 1, 1, 1], 8), ([0, 1, 2, 0], 8), ([2, 2, 1, 1], 8), ([1, 1, 0, 0], 9)],
)
@pytest.mark.parametrize("dilations", [[1, 1], [2, 1]])
def test_average_pooling_in_every_combination(
    ceil: int, counted: int, pads: list[int], height: int, dilations: list[int]
) -> None:
    settings = {"kernel_shape": [3, 3], "strides": [2, 2], "pads": pads, "dilations": dilations}
    node = helper.make_node("AveragePool", ["x"], ["y"], ceil_mode=ceil, count_include_pad=counted, **settings)
    graph, x = _made([node], {}, ["batch", 2, height, 7], 19), images(2, (2, height, 7))
    torch.testing.assert_close(imported(graph)(x), onnx_logits(graph, x))
    peak = helper.make_node("MaxPool", ["x"], ["y"], ceil_mode=ceil, **settings)
    graph = _made([peak], {}, ["batch", 2, height, 7], 19)
    torch.testing.assert_close(imported(graph)(x), onnx_logits(graph, x))


def test_a_column_of_pixels_and_channels_last_are_inputs_too() -> None:
    node, w = helper.make_node, _rand(1, 1, 3, 3)
    column = [
        node("Reshape", ["x", "image"], ["i"]),
        node("Sub", ["i", "mean"], ["c"]),
        node("Div", ["c", "std"], ["n"]),
        node("Conv", ["n", "w"], ["r"]),
        node("Reshape", ["r", "flat"], ["f"]),
        node("MatMul", ["head", "f"], ["y"]),
    ]
    tensors: dict[str, Any] = {
        "image": np.array([1, 1, 28, 28], np.int64),
        "flat": np.array([1, 676, 1], np.int64),
        "mean": np.float32(0.13),
        "std": np.float32(0.31),
        "w": w,
        "head": _rand(10, 676),
    }
    graph, x = _made(column, tensors, [1, 784, 1], 9, [1, 10, 1]), images(4, (1, 784, 1)).flatten(0, 1).view(4, 784, 1)
    twin = imported(graph)
    assert twin.piece is None
    assert twin(x).shape == (4, 10, 1)
    _close(twin(x).flatten(1), _one_by_one(graph, x))
    last = [node("Transpose", ["x"], ["t"], perm=[0, 3, 1, 2]), node("Conv", ["t", "w"], ["y"])]
    graph, x = _made(last, {"w": _rand(2, 3, 5, 5)}, [1, 5, 5, 3], 11), images(4, (5, 5, 3))
    _close(imported(graph)(x).flatten(1), _one_by_one(graph, x))


def test_a_graph_that_cannot_be_freed_runs_in_pieces_with_gradients() -> None:
    # The squeeze takes the batch away: two images at once would be another function, so they go one by one.
    nodes = [
        helper.make_node("Squeeze", ["x"], ["s"], axes=[0]),
        helper.make_node("Reshape", ["s", "flat"], ["f"]),
        helper.make_node("MatMul", ["head", "f"], ["y"]),
    ]
    graph = _made(nodes, {"flat": np.array([16], np.int64), "head": _rand(10, 16)}, [1, 1, 4, 4], 11, [10])
    twin, x = imported(graph), images(5, (1, 4, 4)).requires_grad_()
    assert twin.piece == 1
    _close(twin(x).detach(), _one_by_one(graph, x))
    (slope,) = torch.autograd.grad(twin(x)[:, 0].sum(), x)
    _close(slope.flatten(1), torch.from_numpy(_rand(10, 16)[0]).expand(5, 16))


def test_of_several_outputs_the_logits_are_taken_and_the_rest_is_not_needed() -> None:
    node = helper.make_node
    graph = helper.make_graph(
        [node("Relu", ["x"], ["logits"]), node("TopK", ["x", "two"], ["score", "which"])],
        "detector",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b", 4])],
        [
            helper.make_tensor_value_info("score", TensorProto.FLOAT, ["b", 2]),
            helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["b", 4]),
        ],
        [numpy_helper.from_array(np.array([2], np.int64), "two")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    x = images(3, (1, 2, 2)).flatten(1) - 0.5
    assert torch.equal(imported(model.SerializeToString())(x), x.relu())


def test_random_numbers_are_not_constants() -> None:
    nodes = [
        helper.make_node("RandomNormal", [], ["r"], name="dice", shape=[1, 4]),
        helper.make_node("Add", ["x", "r"], ["y"]),
    ]
    with pytest.raises(InputError, match='node "dice": operator RandomNormal has no torch twin'):
        imported(_made(nodes, {}, ["b", 4], 17, ["b", 4]))


def test_bounds_follow_a_freed_graph() -> None:
    """What was made for one image is proved in batches, with the bounds of the network it came from."""
    shape = (1, 8, 8)
    net = built(arch("small_cnn", shape))
    twin, x = imported(_exported(net, torch.zeros(1, *shape), 11, free=False)), images(4, shape)
    threat, y = Threat(norm="linf", eps=0.001), net(x).argmax(1)
    ours, theirs = (IBP().margins(module, x, y, threat).detach() for module in (twin, net))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("target", "small", "large", "shaped", "batch", "expected"),
    [
        ([1, 784], (1, 1, 28, 28), (2, 1, 28, 28), (1, 784), 1, [-1, 784]),
        ([1, 1, 28, 28], (1, 784, 1), (2, 784, 1), (1, 1, 28, 28), 1, [-1, 1, 28, 28]),
        ([3, 784], (3, 1, 28, 28), (6, 1, 28, 28), (3, 784), 3, [-1, 784]),
        ([6, 5, 8], (3, 2, 5, 8), (6, 2, 5, 8), (6, 5, 8), 3, [-1, 5, 8]),
        ([3, 2, 5, 8], (6, 5, 8), (12, 5, 8), (3, 2, 5, 8), 3, [-1, 2, 5, 8]),
        ([4, 9], (4, 3, 3), (4, 3, 3), (4, 9), 1, [4, 9]),
        ([5, 4], (2, 10), (4, 10), (5, 4), 2, None),
        ([3, 8], (3, 2, 4), (3, 4, 4), (3, 8), 2, [3, -1]),
    ],
)
def test_reshape_targets(
    target: list[int], small: tuple[int], large: tuple[int], shaped: tuple[int], batch: int, expected: list[int] | None
) -> None:
    assert freed(target, small, large, shaped, batch) == expected


class _Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(6, 2, batch_first=True), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        y: Tensor = self.head(self.attention(tokens, tokens, tokens, need_weights=False)[0].mean(1))
        return y


def test_a_file_that_takes_any_batch_is_left_as_it_is(tmp_path: Path) -> None:
    """Its targets of Reshape say -1 for the heads of all images, which a rewrite for one image would spoil."""
    export(_Heads().eval(), (6, 2, 3), tmp_path / "heads.onnx", 20, "dynamo")
    assert imported(tmp_path / "heads.onnx").piece is None
