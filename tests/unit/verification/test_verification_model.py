"""Networks in the competition's shapes, seen as numbers in a row; and verdicts on them."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from stages.bounds.base import Box
from stages.bounds.crown import Crown
from stages.bounds.ibp import IBP
from stages.method import InputError
from stages.verification.clock import Clock
from stages.verification.model import Model
from stages.verification.verdict import decide
from tests.specs import layers, mlp, saved, spec

RNG = np.random.default_rng(0)


def conv_net(path: Path) -> Path:
    """NHWC in, normalised, a residual block, a sigmoid, a head."""

    def weight(*shape: int) -> Any:
        return RNG.normal(0, 0.4, shape).astype(np.float32)

    arrays = {
        "mean": np.full((1, 1, 1, 2), 0.3, np.float32),
        "std": np.full((1, 1, 1, 2), 0.2, np.float32),
        "w1": weight(4, 2, 3, 3),
        "b1": weight(4),
        "w2": weight(4, 4, 3, 3),
        "head": weight(36, 3),
    }
    nodes = [
        helper.make_node("Sub", ["input", "mean"], ["centred"]),
        helper.make_node("Div", ["centred", "std"], ["normal"]),
        helper.make_node("Transpose", ["normal"], ["nchw"], perm=[0, 3, 1, 2]),
        helper.make_node("Conv", ["nchw", "w1", "b1"], ["c1"], strides=[2, 2], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c1"], ["r1"]),
        helper.make_node("Conv", ["r1", "w2"], ["c2"], pads=[1, 1, 1, 1]),
        helper.make_node("Add", ["r1", "c2"], ["sum"]),
        helper.make_node("Sigmoid", ["sum"], ["s"]),
        helper.make_node("Flatten", ["s"], ["flat"]),
        helper.make_node("MatMul", ["flat", "head"], ["y"]),
    ]
    return saved(path, nodes, (1, 5, 5, 2), "y", (1, 3), arrays)


@pytest.mark.parametrize("kind", ["column", "acas", "conv"])
def test_a_row_of_numbers_is_what_onnxruntime_sees_and_bounds_hold(kind: str, tmp_path: Path) -> None:
    path, count = tmp_path / "net.onnx", {"column": 12, "acas": 5, "conv": 50}[kind]
    if kind == "conv":
        conv_net(path)
    else:
        shape = (1, 12, 1) if kind == "column" else (1, 1, 1, 5)
        mlp(path, layers([count, 8, 3], 1), shape, [("Sub", {}, np.full(shape, 0.1, np.float32))])
    model = Model(path, count)
    assert model.classes == 3
    rng = torch.Generator().manual_seed(0)
    low = torch.rand(2, count, generator=rng) * 2 - 1
    high = low + 0.1
    points = low + torch.rand(40, 2, count, generator=rng) * (high - low)
    assert model.disagreement(points.flatten(0, 1)) < 1e-5
    rows = torch.eye(3, dtype=torch.float64).expand(2, -1, -1)
    with torch.no_grad():
        bound = Crown().lower(model.net, Box(low, high), rows)
        reached = model.net(points.flatten(0, 1)).view(40, 2, 3).amin(0).double()
    assert (bound <= reached).all()


def test_shapes_that_the_graph_computes_become_constants_for_bounds(tmp_path: Path) -> None:
    """What exporters make of x.view(x.size(0), -1)."""
    arrays = {
        "zero": np.array(0, np.int64),
        "minus": np.array([-1]),
        "axes": np.array([0]),
        "w": np.eye(6, 2, dtype=np.float32),
    }
    nodes = [
        helper.make_node("Relu", ["input"], ["r"]),
        helper.make_node("Shape", ["r"], ["shape"]),
        helper.make_node("Gather", ["shape", "zero"], ["batch"]),
        helper.make_node("Unsqueeze", ["batch", "axes"], ["front"]),
        helper.make_node("Concat", ["front", "minus"], ["target"], axis=0),
        helper.make_node("Reshape", ["r", "target"], ["flat"]),
        helper.make_node("MatMul", ["flat", "w"], ["y"]),
    ]
    model = Model(saved(tmp_path / "net.onnx", nodes, ("n", 2, 3), "y", ("n", 2), arrays), 6)
    low = torch.full((4, 6), -1.0)
    bound = Crown().lower(model.net, Box(low, low + 0.5), torch.eye(2, dtype=torch.float64).expand(4, -1, -1))
    torch.testing.assert_close(bound, torch.zeros(4, 2, dtype=torch.float64), rtol=0, atol=1e-6)
    assert model.disagreement(torch.rand(3, 6)) < 1e-6


def test_the_specification_settles_one_open_size(tmp_path: Path) -> None:
    path = mlp(tmp_path / "net.onnx", layers([6, 4, 2], 1), ("batch", "length", 3))
    assert Model(path, 6).fed == (1, 2, 3)


@pytest.mark.parametrize("shape", [(6,), (6, 1), (1, 6)])
def test_a_graph_without_a_batch_takes_one_input_beside_the_other(shape: tuple[int, ...], tmp_path: Path) -> None:
    """A weight times a column, as in W x + b: the batch is in no dimension of its values."""
    arrays = {"w": RNG.normal(0, 1, (4, 6)).astype(np.float32), "v": RNG.normal(0, 1, (2, 4)).astype(np.float32)}
    turned = [helper.make_node("Transpose", ["input"], ["x"], perm=[1, 0])] if shape == (1, 6) else []
    nodes = [
        *turned,
        helper.make_node("MatMul", ["w", "x" if turned else "input"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("MatMul", ["v", "r"], ["y"]),
    ]
    model = Model(saved(tmp_path / "net.onnx", nodes, shape, "y", (2, 1) if len(shape) > 1 else (2,), arrays), 6)
    points = torch.rand(5, 6)
    assert model.disagreement(points) < 1e-6
    low = points - 0.05
    rows = torch.eye(2, dtype=torch.float64).expand(5, -1, -1)
    with torch.no_grad():
        bound = Crown().lower(model.net, Box(low, low + 0.1), rows)
        assert bool((bound <= model.net(points)).all())
        assert bool((bound > model.net(points) - 2).all())


@pytest.mark.parametrize(
    ("shape", "inputs", "message"),
    [
        ((1, 6), 5, r"shape \[1, 6\], the specification names 5 inputs X_0 to X_4"),
        (("n", "a", "b"), 6, "expected as many as one image has numbers"),
        ((), 1, "expected as many as one image has numbers"),
        ((3, 2), 2, r"shape \[3, 2\], the specification names 2 inputs"),
    ],
)
def test_what_does_not_fit_is_refused(shape: tuple[int | str, ...], inputs: int, message: str, tmp_path: Path) -> None:
    nodes = [helper.make_node("Identity", ["input"], ["y"])]
    with pytest.raises(InputError, match=message):
        Model(saved(tmp_path / "net.onnx", nodes, shape, "y", shape, {}), inputs)


def test_a_one_in_front_that_the_graph_takes_away_is_no_batch(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Squeeze", ["input", "front"], ["s"]),
        helper.make_node("MatMul", ["s", "w"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("ReduceMean", ["r"], ["y"], axes=[0], keepdims=0),
    ]
    arrays = {"front": np.array([0]), "w": RNG.normal(0, 1, (2, 2)).astype(np.float32)}
    model = Model(saved(tmp_path / "net.onnx", nodes, (1, 2, 2), "y", (2,), arrays), 4)
    points = torch.rand(5, 4)
    assert model.disagreement(points) < 1e-6
    rows = torch.eye(2, dtype=torch.float64).expand(5, -1, -1)
    with torch.no_grad():
        bound = Crown().lower(model.net, Box(points - 0.05, points + 0.05), rows)
        assert bool((bound <= model.net(points)).all())
        assert bool((bound > model.net(points) - 2).all())


@pytest.mark.parametrize("version", [11, 13])
def test_several_inputs_and_outputs_are_numbered_on(version: int, tmp_path: Path) -> None:
    """The second input is an image; the outputs are a sum and a matrix."""
    nodes = [
        helper.make_node("Flatten", ["image"], ["flat"]),
        helper.make_node("Concat", ["row", "flat"], ["both"], axis=1),
        helper.make_node("MatMul", ["both", "w"], ["h"]),
        helper.make_node("Relu", ["h"], ["first"]),
        helper.make_node("Reshape", ["both", "square"], ["second"]),
    ]
    shapes = {"row": ["batch", 2], "image": [1, 1, 2, 2]}
    w = RNG.normal(0, 1, (6, 3)).astype(np.float32)
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("first", "second")],
        [numpy_helper.from_array(w, "w"), numpy_helper.from_array(np.array([1, 2, 3]), "square")],
    )
    path = tmp_path / "net.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", version)], ir_version=6), path)
    model = Model(path, 6)
    assert (model.classes, Model(path, 6, 9).classes, Model(path, 6, 3).classes) == (9, 9, 3)
    points = torch.rand(4, 6) - 0.5
    torch.testing.assert_close(model.net(points), torch.cat([(points @ torch.from_numpy(w)).relu(), points], 1))
    assert model.disagreement(points) < 1e-6
    with torch.no_grad():
        bound = Crown().lower(model.net, Box(points, points + 0.1), torch.eye(9, dtype=torch.float64).expand(4, -1, -1))
    assert bool((bound[:, 3:] >= points - 1e-4).all())


def test_an_input_beside_others_has_a_size(tmp_path: Path) -> None:
    pair = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, "n"]) for name in ("a", "b")]
    nodes = [helper.make_node("Add", ["a", "b"], ["y"])]
    graph = helper.make_graph(nodes, "net", pair, [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, "n"])])
    path = tmp_path / "net.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), path)
    with pytest.raises(InputError, match=r'net.onnx: input "a" is float \[1, 0\]; expected float and fixed sizes'):
        Model(path, 4)


def test_entries_scattered_by_a_graph_for_one_input_have_bounds(tmp_path: Path) -> None:
    """y[:, 1:3] = 2 y[:, 3:5], as torch's older exporter writes it: the places name the input's own number."""
    arrays: dict[str, Any] = {
        "w": RNG.normal(0, 1, (4, 6)).astype(np.float32),
        "from": np.array([3]),
        "to": np.array([5]),
        "axis": np.array([1]),
        "two": np.float32(2),
        "places": np.array([[[0, 1], [0, 2]]]),
        "v": RNG.normal(0, 1, (6, 2)).astype(np.float32),
    }
    nodes = [
        helper.make_node("MatMul", ["input", "w"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("Slice", ["r", "from", "to", "axis"], ["s"]),
        helper.make_node("Mul", ["s", "two"], ["t"]),
        helper.make_node("ScatterND", ["r", "places", "t"], ["m"]),
        helper.make_node("MatMul", ["m", "v"], ["y"]),
    ]
    model = Model(saved(tmp_path / "net.onnx", nodes, (1, 4), "y", (1, 2), arrays), 4)
    points = torch.rand(5, 4)
    assert model.disagreement(points) < 1e-6
    rows = torch.eye(2, dtype=torch.float64).expand(5, -1, -1)
    with torch.no_grad():
        for certifier in (IBP(), Crown()):
            bound = certifier.lower(model.net, Box(points - 0.05, points + 0.05), rows)
            reached = torch.stack([model.net(points - 0.05 + 0.1 * torch.rand(5, 4)) for _ in range(200)]).amin(0)
            assert bool((bound <= reached).all())
            assert bool((bound > reached - 2).all())


def in_a_row() -> tuple[list[Any], dict[str, Any]]:
    """Codes of codes, of which onnxruntime makes one step, beside an output that makes the difference look small."""
    arrays = {"s1": np.float32(0.05), "s2": np.float32(0.07), "z": np.int8(0), "far": np.array([[1e4, 0]], np.float32)}
    nodes = [helper.make_node("QuantizeLinear", ["input", "s1", "z"], ["q1"])]
    nodes += [helper.make_node("DequantizeLinear", ["q1", "s1", "z"], ["d1"])]
    nodes += [helper.make_node("QuantizeLinear", ["d1", "s2", "z"], ["q2"])]
    nodes += [helper.make_node("DequantizeLinear", ["q2", "s2", "z"], ["d2"])]
    return [*nodes, helper.make_node("Add", ["d2", "far"], ["y"])], arrays


def no_numbers() -> tuple[list[Any], dict[str, Any]]:
    return [helper.make_node("Mul", ["input", "far"], ["y"])], {"far": np.array([[np.nan, 1]], np.float32)}


@pytest.mark.parametrize(
    ("net", "why"),
    [
        (
            in_a_row(),
            'nothing is proved, as onnxruntime makes one Q/DQ pair of two in a row (QuantizeLinear giving "q2")',
        ),
        (no_numbers(), "outputs on points of the box are infinite or no numbers, so nothing is proved"),
    ],
    ids=["codes of codes", "NaN"],
)
def test_of_what_onnxruntime_does_otherwise_nothing_is_proved(net: Any, why: str, tmp_path: Path) -> None:
    """By its nodes the second output is 0.07 at 0.027; onnxruntime says 0.05."""
    path = saved(tmp_path / "net.onnx", net[0], (1, 2), "y", (1, 2), net[1])
    text = tmp_path / "spec.vnnlib"
    text.write_text(spec([0, 0.0269], [0, 0.0271], 2, "(assert (>= Y_1 0.08))"))
    answer = decide(path, text, Clock(0.5), lambda _: None)
    assert answer.word == "unknown"
    assert why in answer.reason
