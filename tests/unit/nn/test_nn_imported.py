"""The twin of what really ships: int8 in both recipes, half precision, and graphs that it must refuse."""

from pathlib import Path
from types import ModuleType
from typing import Any

import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch.nn import functional as F

from stages.method import InputError
from stages.nn import _fake_quant
from stages.nn.imported import imported
from stages.nn.to_onnx import export
from targets.passes import fp16, qdq_int8_cpu, qdq_int8_trt
from targets.passes.base import Kit
from tests.networks import arch, built, images, onnx_logits

_CASES = [("small_cnn", (1, 8, 8)), ("wrn", (3, 16, 16)), ("mobilenet", (3, 16, 16))]


def _lowered(builder: str, shape: Any, lowering: ModuleType, folder: Path) -> bytes:
    export(built(arch(builder, shape)), shape, folder / "float.onnx")
    kit = Kit(images(64, shape, seed=1).numpy(), folder)
    data: bytes = lowering.lower(onnx.load(folder / "float.onnx"), {}, kit).SerializeToString()
    return data


@pytest.mark.parametrize(("builder", "shape"), _CASES)
@pytest.mark.parametrize("recipe", [qdq_int8_cpu, qdq_int8_trt], ids=["cpu", "trt"])
def test_int8_twin_follows_the_nodes_and_has_gradients(
    builder: str, shape: Any, recipe: ModuleType, tmp_path: Path
) -> None:
    graph = _lowered(builder, shape, recipe, tmp_path)
    twin = imported(graph)
    x = images(200, shape).requires_grad_()
    logits = twin(x)
    # Node by node, onnxruntime sums in another order, so a code on a rounding tie may move by one; nothing else may.
    expected, values = onnx_logits(graph, x, optimised=False), logits.detach()
    spread = float(expected.max() - expected.min())
    assert float((values - expected).abs().max()) < 0.05 * spread
    assert float((values - expected).abs().mean()) < 0.005 * spread
    assert (logits.argmax(1) == expected.argmax(1)).float().mean() > 0.97
    (gradient,) = torch.autograd.grad(logits.square().sum(), x)
    assert torch.isfinite(gradient).all()
    assert (gradient != 0).float().mean() > 0.5


def test_gradients_through_int8_point_where_those_of_the_float_network_do(tmp_path: Path) -> None:
    shape = (1, 8, 8)
    twin = imported(_lowered("small_cnn", shape, qdq_int8_cpu, tmp_path))
    net, x = built(arch("small_cnn", shape)), images(50, shape).requires_grad_()
    y = net(x).argmax(1)
    plain, int8 = (torch.autograd.grad(F.cross_entropy(f(x), y), x)[0].flatten(1) for f in (net, twin))
    assert F.cosine_similarity(plain, int8).min() > 0.9


@pytest.mark.parametrize(("builder", "shape"), _CASES)
def test_half_precision_twin_agrees_and_its_gradients_do_not_vanish(builder: str, shape: Any, tmp_path: Path) -> None:
    graph = _lowered(builder, shape, fp16, tmp_path)
    x = images(20, shape).requires_grad_()
    logits = imported(graph)(x)
    torch.testing.assert_close(logits.detach(), onnx_logits(graph, x), rtol=1e-2, atol=5e-3)
    (gradient,) = torch.autograd.grad((1e-6 * logits).sum(), x)
    assert (gradient != 0).float().mean() > 0.9


@pytest.mark.parametrize(("zero", "low", "high"), [(3.0, 0, 255), (0.0, -128, 127), (-7.0, -128, 127)])
def test_quantisation_rounds_half_to_even_and_its_gradient_is_one_inside(zero: float, low: int, high: int) -> None:
    scale = torch.tensor(0.5)
    codes = torch.arange(low - 4, high + 5, dtype=torch.float32)
    x = ((codes - zero) * 0.5 + 0.25).requires_grad_()  # every point lies half-way between two codes
    q = _fake_quant.quantize(x, scale, torch.tensor(zero), low, high)
    expected = (torch.round(x.detach() / scale) + zero).clamp(low, high)
    assert torch.equal(q.detach(), expected)
    (gradient,) = torch.autograd.grad(_fake_quant.dequantize(q, scale, torch.tensor(zero)).sum(), x)
    code = torch.round(x.detach() / scale) + zero
    assert torch.equal(gradient, ((code >= low) & (code <= high)).float())


def test_pixels_less_than_half_a_step_outside_the_calibrated_range_keep_their_gradient() -> None:
    """As the least pixel value does wherever calibration rounds its zero point; without it attacks leave it alone."""
    x = torch.tensor([-0.6, -0.4, -0.001, 0.0, 254.999, 255.4, 255.6], requires_grad=True)
    q = _fake_quant.quantize(x, torch.tensor(1.0), torch.tensor(0.0), 0, 255)
    (gradient,) = torch.autograd.grad(q.sum(), x)
    assert gradient.tolist() == [0, 1, 1, 1, 1, 1, 0]


def test_nothing_in_a_twin_trains_and_it_travels_on_shapes_alone(tmp_path: Path) -> None:
    export(built(arch("wrn", (3, 16, 16))), (3, 16, 16), tmp_path / "m.onnx")
    twin = imported((tmp_path / "m.onnx").read_bytes())
    assert list(twin.parameters()) == []
    assert not any(buffer.requires_grad for buffer in twin.buffers())
    assert twin.to("meta")(torch.empty(5, 3, 16, 16, device="meta")).shape == (5, 10)


def _graph(*nodes: onnx.NodeProto, inputs: int = 1, opset: int = 20) -> bytes:
    values = [helper.make_tensor_value_info(f"x{i}", TensorProto.FLOAT, ["batch", 4]) for i in range(inputs)]
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 4])
    graph = helper.make_graph(list(nodes), "g", values, [out])
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", opset), helper.make_opsetid("my.ops", 1)], ir_version=9
    )
    data: bytes = model.SerializeToString()
    return data


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (b"not onnx at all", "expected an ONNX model"),
        (
            _graph(helper.make_node("HardMax", ["x0"], ["y"], name="n7", domain="my.ops")),
            'node "n7": operator my\\.ops\\.HardMax has no torch twin',
        ),
        (
            _graph(helper.make_node("Acosh", ["x0"], ["y"], name="wave")),
            'node "wave": operator Acosh has no torch twin.*add it to stages/nn/_onnx_ops.py',
        ),
        (_graph(helper.make_node("Add", ["x0", "x1"], ["y"]), inputs=2), "expected one input and one output .*, got 2"),
        (_graph(helper.make_node("Relu", ["x0"], ["y"]), opset=6), "expected opset 7 or newer, got 6"),
        (
            _graph(
                helper.make_node("Constant", [], ["four"], value_floats=[1.0] * 4),
                helper.make_node("Constant", [], ["three"], value_floats=[1.0] * 3),
                helper.make_node("Add", ["four", "three"], ["sum"]),
                helper.make_node("Add", ["x0", "sum"], ["y"]),
            ),
            "its torch twin does not run on .*size of tensor a",
        ),
    ],
    ids=["text", "foreign domain", "unknown operator", "two inputs", "old opset", "constants that do not fit"],
)
def test_what_has_no_twin_is_refused_with_a_reason(source: bytes, message: str) -> None:
    with pytest.raises(InputError, match=message):
        imported(source)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"gone\.onnx: cannot be read"):
        imported(tmp_path / "gone.onnx")
