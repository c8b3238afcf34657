"""ONNX files of one small network on the digits, each wanting its images in another form, some of them not well."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

from tests.digits_net import digits_net

DIGITS = ("--data", "digits", "--threads", "1", "--threat", "linf:0.03")
Audit = Callable[..., tuple[int, str, str]]
MEAN, STD = 0.3, 0.25
NORMAL = ("--mean", str(MEAN), "--std", str(STD))
Node = tuple[str, Sequence[str], Mapping[str, Any]]

# What turns the input back into pixels [B, 1, 8, 8], in nodes that each take the result of the one before.
FORMS: dict[str, tuple[tuple[Any, ...], tuple[Node, ...], tuple[str, ...]]] = {
    "pixels": (("b", 1, 8, 8), (), ()),
    "normal": (("b", 1, 8, 8), (("Mul", ["std"], {}), ("Add", ["mean"], {})), NORMAL),
    "bytes": (("b", 1, 8, 8), (("Div", ["full"], {}),), ("--pixels", "0:255")),
    "centred": (("b", 1, 8, 8), (("Add", ["one"], {}), ("Div", ["two"], {})), ("--pixels=-1:1",)),
    "nhwc": (("b", 8, 8, 1), (("Transpose", [], {"perm": [0, 3, 1, 2]}),), ("--layout", "nhwc")),
    "column": (("b", 64, 1), (("Reshape", ["image"], {}),), ()),
    "rounded": (("b", 1, 8, 8), (("Mul", ["three"], {}), ("Round", [], {}), ("Div", ["three"], {})), ()),
    "single": ((1, 1, 8, 8), (), ()),
    "triple": ((3, 1, 8, 8), (), ()),
}

# What becomes of the logits [B, 10].
ENDS: dict[str, tuple[Node, ...]] = {
    "logits": (),
    "softmax": (("Softmax", [], {"axis": 1}),),
    "log_softmax": (("LogSoftmax", [], {"axis": 1}),),
    "nan": (("Log", [], {}),),
    "foreign": (("Shrink", [], {"lambd": 0.0, "bias": 0.0}),),
    "modulo": (("Mod", ["three"], {"fmod": 1}),),
    "noise": (("RandomNormalLike*", [], {"scale": 3.0}),),
    "position": (("CumSum", ["zero"], {}),),
    "neighbours": (("ReduceMean-", ["first"], {"keepdims": 1}),),
    "pictures": (("Gemm", ["wide"], {}), ("Reshape", ["image"], {})),
    "score": (("ReduceMax", ["last"], {"keepdims": 1}),),
}


def file(path: Path, form: str = "pixels", end: str = "logits") -> Path:
    """Writes the file and returns its path."""
    shape, front, _ = FORMS[form]
    first, second = (layer for layer in digits_net()[0] if hasattr(layer, "weight"))  # type: ignore[attr-defined]
    made = _chain(
        [
            *front,
            ("Flatten", [], {}),
            ("Gemm", ["w1", "b1"], {"transB": 1}),
            ("Relu", [], {}),
            ("Gemm", ["w2", "b2"], {"transB": 1}),
            *ENDS[end],
        ]
    )
    tensors: dict[str, npt.NDArray[Any]] = {
        "w1": first.weight.numpy(),
        "b1": first.bias.numpy(),
        "w2": second.weight.numpy(),
        "b2": second.bias.numpy(),
        "wide": np.ones((10, 64), np.float32),
        "mean": np.array([MEAN], np.float32),
        "std": np.array([STD], np.float32),
        "full": np.array([255], np.float32),
        "one": np.array([1], np.float32),
        "three": np.array([3], np.float32),
        "two": np.array([2], np.float32),
        "image": np.array([-1, 1, 8, 8]),
        "zero": np.array(0),
        "first": np.array([0]),
        "last": np.array([1]),
    }
    read = {name for node in made for name in node.input}
    graph = helper.make_graph(
        made,
        "digits",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [
            helper.make_tensor_value_info(
                made[-1].output[0], TensorProto.FLOAT, ["r", 1, 8, 8] if end == "pictures" else ["r", "k"]
            )
        ],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in tensors.items() if name in read],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    path.write_bytes(model.SerializeToString())
    onnx.checker.check_model(str(path))
    return path


def _chain(nodes: Sequence[Node]) -> list[NodeProto]:
    """`*` at the end of an operator multiplies what it read with what it gave, `-` takes one from the other."""
    made, last = [], "x"
    for number, (kind, others, attributes) in enumerate(nodes):
        name = f"v{number}"
        made.append(helper.make_node(kind.rstrip("*-"), [last, *others], [name], f"{kind}{number}", **attributes))
        if kind[-1] in "*-":
            made.append(helper.make_node({"*": "Mul", "-": "Sub"}[kind[-1]], [last, name], [f"{name}joined"]))
            name = f"{name}joined"
        last = name
    return made
