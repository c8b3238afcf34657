"""Images made larger and smaller, as onnxruntime does it, in every opset that has a way of saying so."""

from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from stages.nn.imported import imported
from targets.runtime.ort import OrtEngine

X = np.random.default_rng(0).normal(0, 1, (1, 2, 4, 5)).astype(np.float32)
SCALES = {"larger": [1.0, 1.0, 2.0, 3.0], "odd": [1.0, 1.0, 1.5, 2.6], "smaller": [1.0, 1.0, 0.6, 0.5]}
NEAREST = ("floor", "ceil", "round_prefer_floor", "round_prefer_ceil")
COORDINATES = ("asymmetric", "half_pixel", "pytorch_half_pixel", "align_corners")


def same(path: Path, opset: int, node: onnx.NodeProto, **arrays: Any) -> None:
    graph = helper.make_graph(
        [node],
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, X.shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * 4)],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in arrays.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8), path)
    [expected] = OrtEngine(path).session.run(None, {"x": X})
    torch.testing.assert_close(imported(path)(torch.from_numpy(X)), torch.from_numpy(expected), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("size", "mode"), list(product(SCALES, ("nearest", "linear"))))
def test_older_opsets(size: str, mode: str, tmp_path: Path) -> None:
    scales = np.array(SCALES[size], np.float32)
    if size != "smaller":
        same(tmp_path / "7.onnx", 7, helper.make_node("Upsample", ["x"], ["y"], mode=mode, scales=SCALES[size]))
        same(tmp_path / "9.onnx", 9, helper.make_node("Upsample", ["x", "s"], ["y"], mode=mode), s=scales)
    same(tmp_path / "10.onnx", 10, helper.make_node("Resize", ["x", "s"], ["y"], mode=mode), s=scales)


@pytest.mark.parametrize("where", COORDINATES)
@pytest.mark.parametrize("size", SCALES)
def test_newer_opsets(size: str, where: str, tmp_path: Path) -> None:
    arrays = {"roi": np.zeros(0, np.float32), "s": np.array(SCALES[size], np.float32)}
    attributes = {"coordinate_transformation_mode": where}
    for rounding in NEAREST:
        node = helper.make_node("Resize", ["x", "roi", "s"], ["y"], mode="nearest", nearest_mode=rounding, **attributes)
        same(tmp_path / "11.onnx", 11, node, **arrays)
    same(
        tmp_path / "13.onnx",
        13,
        helper.make_node("Resize", ["x", "", "s"], ["y"], mode="linear", **attributes),
        **arrays,
    )
    for more in ({}, {"cubic_coeff_a": -0.5}, {"exclude_outside": 1}):
        node = helper.make_node("Resize", ["x", "roi", "s"], ["y"], mode="cubic", **more, **attributes)
        same(tmp_path / "cubic.onnx", 13, node, **arrays)
    whole = {"n": np.array([1, 2, 7, 3])}
    same(tmp_path / "18.onnx", 18, helper.make_node("Resize", ["x", "", "", "n"], ["y"], **attributes), **whole)
