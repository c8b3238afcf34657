"""Kernels of the installed onnxruntime held to the bounds of the nodes they stand for; and the files that it spoils."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper
from torch import nn

from stages import engine_kernels
from stages.adapter import Form
from stages.bounds._interval import SINGLE, Interval, Rounding
from stages.bounds._norms import moments
from stages.bounds.base import Box
from stages.bounds.ibp import IBP
from stages.bounds.quantised import Quantised
from stages.engine_kernels import loses_variance, probe, spelled_out
from stages.nn.imported import imported
from stages.nn.to_onnx import export
from stages.subject import opened
from stages.threat import Threat
from stages.verdicts import Plan, judge
from targets.runtime.ort import OrtEngine

Held = dict[str, NDArray[Any]]


def refusal(file: bytes) -> str | None:
    return spelled_out(onnx.load_model_from_string(file))[1]


@pytest.mark.parametrize("kind", ["LayerNormalization", "InstanceNormalization"])
@pytest.mark.parametrize("offset", [1.0, 1e3, 1e6])
@pytest.mark.parametrize("spread", [1e-6, 1e-3, 1.0])
def test_the_installed_kernel_keeps_to_the_bounds(offset: float, spread: float, kind: str) -> None:
    x = torch.from_numpy((offset * (1 + spread * np.random.default_rng(1).normal(size=(64, 1, 64)))).astype(np.float32))
    found = moments(Interval(x, x), (64,), 1e-5, Rounding(SINGLE))
    answers = (torch.from_numpy(OrtEngine(probe(kind))(x.numpy())), torch.nn.functional.layer_norm(x, (64,), eps=1e-5))
    for answer in answers:
        assert bool((answer.double() >= found.ends[0] - found.loss - 1e-9).all())
        assert bool((answer.double() <= found.ends[1] + found.loss + 1e-9).all())
    assert not loses_variance(kind)


def test_a_kernel_of_squares_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def squares(_: bytes) -> object:
        def run(x: NDArray[np.float32]) -> NDArray[np.float32]:
            mean = x.mean(2, keepdims=True)
            variance = (x**2).mean(2, keepdims=True) - mean**2
            with np.errstate(invalid="ignore"):
                answer: NDArray[np.float32] = (x - mean) / np.sqrt(variance + np.float32(1e-5))
            return answer

        return run

    monkeypatch.setattr(engine_kernels, "OrtEngine", squares)
    loses_variance.cache_clear()
    assert loses_variance()
    loses_variance.cache_clear()


@pytest.mark.parametrize("opset", [13, 20])
def test_a_normalised_layer_is_found_in_a_file(
    opset: int, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_kernels, "loses_variance", lambda _: True)
    folder = tmp_path_factory.mktemp("files")
    for name, layer in (("with", nn.LayerNorm(4)), ("without", nn.ReLU())):
        path = folder / f"{name}.onnx"
        export(nn.Sequential(nn.Flatten(), layer, nn.Linear(4, 2)).eval(), (1, 2, 2), path, opset, "legacy")
        assert (refusal(path.read_bytes()) is not None) == (name == "with")


def test_group_normalisation_is_told_where_it_loses_the_variance() -> None:
    """A node that torch writes from opset 21 on; before, it is one of instance normalisation."""
    told = refusal(probe("GroupNormalization")) or ""
    assert loses_variance("GroupNormalization") == ("GroupNormalization loses the variance" in told)


def pair(source: str, result: str, scale: float, zero: int) -> tuple[list[NodeProto], Held]:
    codes = [f"{result}.scale", f"{result}.zero"]
    nodes = [
        helper.make_node("QuantizeLinear", [source, *codes], [f"{result}.codes"]),
        helper.make_node("DequantizeLinear", [f"{result}.codes", *codes], [result]),
    ]
    return nodes, dict(zip(codes, (np.array(scale, np.float32), np.array(zero, np.uint8)), strict=True))


def between(kind: str, held: Held | None = None, scale: float = 0.0217, zero: int = 77, **attributes: Any) -> bytes:
    """One node between two Q/DQ pairs, of images [N, 1, 3, 3]."""
    (before, one), (after, two) = pair("input", "x", 0.031, 100), pair("y", "z", scale, zero)
    nodes = [*before, helper.make_node(kind, ["x", *(held or {})], ["y"], **attributes), *after]
    return network([*nodes, helper.make_node("Flatten", ["z"], ["logits"])], one | two | (held or {}))


def network(nodes: list[NodeProto], held: Held) -> bytes:
    ends = [
        helper.make_tensor_value_info("input", TensorProto.FLOAT, ["N", 1, 3, 3]),
        helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", None]),
    ]
    fixed = [numpy_helper.from_array(value, name) for name, value in held.items()]
    graph = helper.make_graph(nodes, "kernels", ends[:1], ends[1:], fixed)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    return bytes(model.SerializeToString())


def twice(same: bool, kind: str = "Identity", **held: NDArray[Any]) -> bytes:
    (before, one), (after, two) = pair("input", "x", 0.031, 100), pair("y", "z", *((0.031, 100) if same else (0.02, 7)))
    nodes = [*before, helper.make_node(kind, ["x", *held], ["y"]), *after]
    return network([*nodes, helper.make_node("Flatten", ["z"], ["logits"])], one | two | held)


def softmax_behind(*nodes: NodeProto, **held: NDArray[Any]) -> bytes:
    """Codes, nodes from "x" to "y" that onnxruntime takes away or moves past codes, and a softmax that gives codes."""
    (before, one), (after, two) = pair("input", "x", 0.031, 100), pair("p", "z", 1 / 255, 0)
    middle = [*nodes, helper.make_node("Softmax", ["y" if nodes else "x"], ["p"], axis=3)]
    return network([*before, *middle, *after, helper.make_node("Flatten", ["z"], ["logits"])], one | two | held)


def weights_alone(product: str, *between: NodeProto) -> bytes:
    """A product with weights of codes that reads no codes itself: there is a node in between."""
    codes, one = pair("input", "x", 0.031, 100)
    weight = np.random.default_rng(0).integers(-63, 64, (9, 3)).astype(np.int8)
    two: Held = {"w.codes": weight, "w.scale": np.array(0.02, np.float32), "w.zero": np.array(0, np.int8)}
    nodes = [*codes, *between, helper.make_node("DequantizeLinear", [*two], ["w"])]
    nodes.append(helper.make_node("Flatten", ["y" if between else "x"], ["flat"]))
    return network([*nodes, helper.make_node(product, ["flat", "w"], ["logits"])], one | two)


def leaves_its_bounds(file: bytes, nodes: bytes | None = None) -> bool:
    """Whether onnxruntime answers single points with something outside of their bounds, by another file's nodes."""
    x = torch.rand(128, 1, 3, 3, generator=torch.Generator().manual_seed(0)) * 4 - 2
    answers = torch.from_numpy(OrtEngine(file)(x.numpy())).double()
    ways = torch.eye(answers.shape[1])
    rows = torch.cat([ways, -ways]).expand(len(x), -1, -1)
    with torch.no_grad():
        bounds = Quantised(inner=IBP()).lower(imported(nodes or file, (1, 3, 3)), Box(x, x), rows)
    return bool((torch.einsum("brk,bk->br", rows.double(), answers) < bounds.double()).any())


ONE, TURN = np.array(1, np.float32), np.array([0, 3, 1, 3])


@pytest.mark.parametrize(
    ("file", "told"),
    [
        (twice(same=False), "makes one Q/DQ pair of two in a row"),
        (twice(same=False, kind="Div", one=ONE), "makes one Q/DQ pair of two in a row"),
        (softmax_behind(), "softmax of codes"),
        (softmax_behind(helper.make_node("Reshape", ["x", "to"], ["y"]), to=TURN), "softmax of codes"),
        (softmax_behind(helper.make_node("Transpose", ["x"], ["y"], perm=[0, 1, 3, 2])), "softmax of codes"),
        (softmax_behind(helper.make_node("Mul", ["x", "one"], ["y"]), one=ONE), "softmax of codes"),
        (weights_alone("Gemm"), "makes codes of its own"),
        (weights_alone("MatMul", helper.make_node("Tanh", ["x"], ["y"])), "makes codes of its own"),
    ],
    ids=["twice", "over one", "softmax", "turned", "moved", "times one", "weights", "weights behind tanh"],
)
def test_a_file_that_onnxruntime_rewrites_is_told_and_does_leave_its_bounds(file: bytes, told: str) -> None:
    assert told in (refusal(file) or "")
    assert leaves_its_bounds(file)


def test_nodes_in_functions_of_the_file_count_too() -> None:
    model = onnx.load_model_from_string(twice(same=False))
    ends = (["input"], ["logits"])
    body = [*(helper.make_node("Constant", [], [t.name], value=t) for t in model.graph.initializer), *model.graph.node]
    model.functions.append(helper.make_function("own", "Net", *ends, body, list(model.opset_import)))
    del model.graph.node[:], model.graph.initializer[:]
    model.graph.node.append(helper.make_node("Net", *ends, domain="own"))
    model.opset_import.append(helper.make_opsetid("own", 1))
    file = bytes(model.SerializeToString())
    assert "makes one Q/DQ pair of two in a row" in (refusal(file) or "")
    assert leaves_its_bounds(file)


@pytest.mark.parametrize(
    "file",
    [
        twice(same=True),
        softmax_behind(helper.make_node("Mul", ["x", "one"], ["y"]), one=np.array(1.3, np.float32)),
        softmax_behind(helper.make_node("Identity", ["input"], ["y"])),
        *(between(kind) for kind in ("Relu", "Sigmoid", "Tanh", "HardSwish", "Flatten", "GlobalAveragePool")),
        between("LeakyRelu", alpha=0.13),
        between("Relu", zero=0),
        between("MaxPool", kernel_shape=[2, 2]),
        between("AveragePool", kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
        between("Transpose", perm=[0, 2, 3, 1]),
        between("Reshape", {"shape": np.array([0, -1])}),
        between("ReduceMean", {"axes": np.array([2, 3])}),
        between("Resize", {"none": np.zeros(0, np.float32), "by": np.array([1, 1, 2, 2], np.float32)}, mode="linear"),
        between("Add", {"one": np.array(1.37, np.float32)}),
        between("Mul", {"one": np.array(1.37, np.float32)}),
    ],
)
def test_other_nodes_between_pairs_stay_in_their_bounds(file: bytes) -> None:
    assert refusal(file) is None
    assert not leaves_its_bounds(file)


def test_a_scale_that_is_no_number_is_told() -> None:
    for scale in (np.inf, np.nan, 0.0):
        told = refusal(between("Relu", scale=scale))
        assert told is not None
        assert 'the scale of a QuantizeLinear giving "z.codes" is not finite and above 0' in told


def test_an_audit_proves_nothing_of_a_file_that_is_rewritten(tmp_path: Path) -> None:
    (path := tmp_path / "twice.onnx").write_bytes(twice(same=False))
    x = torch.rand(4, 1, 3, 3, generator=torch.Generator().manual_seed(1))
    subject = opened(path, x, Form(), 1)
    plan = Plan(Threat(norm="linf", eps=0.0), {}, {"quantised": Quantised()}, True, 0)
    labels = torch.from_numpy(OrtEngine(path)(x.numpy())).argmax(1)
    found = judge(subject, x, labels, torch.arange(4), plan, lambda attack: attack, lambda _: lambda *_: None)
    assert found.certified is not None
    assert not bool(found.certified.any())
    assert any("makes one Q/DQ pair of two" in finding.text for finding in found.proved.findings)
