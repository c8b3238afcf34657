"""Float biases and weights beside codes: what onnxruntime makes of them, and bounds that know it."""

from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from stages.engine_graph import alike, as_run
from stages.engine_kernels import spelled_out
from stages.nn.imported import imported
from targets.runtime.ort import OrtEngine
from tests.unit.test_engine_kernels import Held, leaves_its_bounds, network, pair, refusal

SHAPES = {"Conv": (3, 1, 1, 1), "ConvTranspose": (1, 3, 1, 1), "Gemm": (9, 3), "MatMul": (9, 3)}
AXES = {"Conv": 0, "ConvTranspose": 1, "Gemm": 1, "MatMul": 1}
SCALE = np.float32(0.1)
BIAS = np.array([0.0049, 0.5113, -0.0148], np.float32)


def layer(
    kind: str, scales: Any = SCALE, then: str = "Identity", weights: str = "codes", **held: NDArray[Any]
) -> bytes:
    """A product with a bias of floats, of codes where `held` has no "b"; codes before it and behind."""
    (before, one), (after, two) = pair("in", "x", 0.1, 128), pair("y", "z", 0.0021, 128)
    fixed: Held = {**one, **two, **held}
    nodes = [helper.make_node("Identity" if "Conv" in kind else "Flatten", ["input"], ["in"]), *before]
    codes = np.random.default_rng(0).integers(-3, 4, SHAPES[kind]).astype(np.int8)
    if weights == "codes":
        fixed |= {"w.codes": codes, "w.scale": np.asarray(scales, np.float32)}
        axis = {"axis": AXES[kind]} if np.ndim(scales) else {}
        nodes.append(helper.make_node("DequantizeLinear", ["w.codes", "w.scale"], ["w"], **axis))
    else:
        fixed["w"] = np.random.default_rng(0).normal(size=SHAPES[kind]).astype(np.float32) / 3
    if kind == "MatMul":
        nodes += [helper.make_node("MatMul", ["x", "w"], ["p"]), helper.make_node("Add", ["b", "p"], ["s"])]
    else:
        nodes.append(helper.make_node(kind, ["x", "w", "b"], ["s"]))
    nodes += [helper.make_node(then, ["s"], ["y"]), *after, helper.make_node("Flatten", ["z"], ["logits"])]
    return network(nodes, fixed)


def spelled(file: bytes) -> bytes:
    made, strange = spelled_out(onnx.load_model_from_string(file))
    assert strange is None
    return bytes(made.SerializeToString())


def moved(made: bytes) -> bytes:
    """The codes of a bias moved by half of the half step that rounding may move them."""
    model = onnx.load_model_from_string(made)
    for held in model.graph.initializer:
        values = numpy_helper.to_array(held)
        if held.name.endswith(".bias.codes"):
            held.CopyFrom(numpy_helper.from_array(4 * values + np.int32(1), held.name))
        elif held.name.endswith(".bias.scale"):
            held.CopyFrom(numpy_helper.from_array(np.asarray(values / np.float32(4)), held.name))
    return bytes(model.SerializeToString())


@pytest.mark.parametrize("scales", [SCALE, np.array([0.1, 0.2, 0.05], np.float32)], ids=["tensor", "channel"])
@pytest.mark.parametrize("then", ["Identity", "Relu"])
@pytest.mark.parametrize("kind", SHAPES)
def test_bounds_are_about_the_codes_that_onnxruntime_makes_of_a_bias(kind: str, then: str, scales: Any) -> None:
    """The very same graph runs for the file with codes; its bounds hold, and those of the nodes as given do not."""
    file = layer(kind, scales, then, b=BIAS)
    made = spelled(file)
    assert made != file
    assert alike(*(as_run(onnx.load_model_from_string(one)) for one in (file, made)))
    assert not leaves_its_bounds(file, made)
    assert leaves_its_bounds(file, file)
    assert leaves_its_bounds(file, moved(made))
    x = torch.rand(64, 1, 3, 3, generator=torch.Generator().manual_seed(0)) * 4 - 2
    assert torch.equal(imported(made, (1, 3, 3))(x), torch.from_numpy(OrtEngine(file)(x.numpy())))


@pytest.mark.parametrize("kind", SHAPES)
def test_what_stays_float_is_left_alone(kind: str) -> None:
    for file in (layer(kind, then="Sigmoid", b=BIAS), layer(kind, b=np.zeros(3, np.float32))):
        model = onnx.load_model_from_string(file)
        assert spelled_out(model) == (model, None)
        assert not leaves_its_bounds(file)


@pytest.mark.parametrize("then", ["Identity", "Relu"])
@pytest.mark.parametrize("kind", SHAPES)
def test_float_weights_that_become_codes_are_told_and_do_leave_their_bounds(kind: str, then: str) -> None:
    file = layer(kind, then=then, weights="floats", b=BIAS)
    assert "makes its float weights codes of one scale" in (refusal(file) or "")
    assert leaves_its_bounds(file)
    assert refusal(layer(kind, then="Sigmoid", weights="floats", b=BIAS)) is None


def test_a_bias_that_is_rounded_for_one_of_two_layers_is_told() -> None:
    model = onnx.load_model_from_string(layer("Gemm", b=BIAS))
    nodes = [helper.make_node("Gemm", ["x", "w", "b"], ["other"]), helper.make_node("Add", ["other", "z"], ["both"])]
    model.graph.node[-1].input[0] = "both"
    model.graph.node.extend(nodes)
    model.graph.node.append(last := model.graph.node[-3])
    del model.graph.node[-4]
    assert last.op_type == "Flatten"
    assert "rounds the float bias to codes" in (refusal(bytes(model.SerializeToString())) or "")
