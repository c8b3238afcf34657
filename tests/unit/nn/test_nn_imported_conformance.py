"""Every operator of the table against the standard's own node tests, which ship with the onnx package."""

from functools import cache

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from onnx.backend.test.case.node import collect_testcases

from stages.method import InputError
from stages.nn._onnx_graph import readable, unobjectionable
from stages.nn._onnx_ops import OPERATORS
from stages.nn.imported import Twin

_TYPES = {"float32", "float64", "float16", "int64", "int32", "int8", "uint8", "bool"}
# What is refused with a reason, instead of being computed wrongly.
_REFUSED = (
    *("training_dropout", "training_mode", "blocked", "with_mask_default_old_training"),
    *(
        "scatternd_add",
        "scatternd_max",
        "scatternd_min",
        "scatternd_mul",
        "antialias",
        "tf_crop",
        "not_larger",
        "not_smaller",
        "half_pixel_symmetric",
    ),
)
# The size in the formula is the whole one, in onnxruntime and here, where the standard's data have a fraction.
_OTHERWISE = {f"test_resize_downsample_scales_{mode}_align_corners" for mode in ("linear", "cubic")}
_UNTYPED = {f"test_reduce_{which}_empty_set{kind}" for which in ("max", "min") for kind in ("", "_bool")}


@cache
def _cases() -> dict[str, list[tuple[onnx.ModelProto, list[np.ndarray], list[np.ndarray]]]]:
    """By operator: one-node models of current opsets on the types that classifiers use, with inputs and outputs."""
    found: dict[str, list[tuple[onnx.ModelProto, list[np.ndarray], list[np.ndarray]]]] = {}
    for case in collect_testcases(None):
        model = case.model
        if model is None or len(model.graph.node) != 1 or not case.data_sets or case.name in _UNTYPED | _OTHERWISE:
            continue
        node = model.graph.node[0]
        if node.op_type not in OPERATORS or node.domain or not model.graph.input or "castlike" in case.name:
            continue
        inputs, outputs = ([_array(value) for value in part] for part in case.data_sets[0])
        if {array.dtype.name for array in (*inputs, *outputs)} <= _TYPES:
            model.graph.name = case.name
            found.setdefault(node.op_type, []).append((model, inputs, outputs))
    return found


def _array(value: object) -> np.ndarray:
    return numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else np.asarray(value)


def _single(model: onnx.ModelProto, inputs: list[np.ndarray]) -> onnx.ModelProto:
    """All inputs but the first as constants, all outputs but the first dropped."""
    made = onnx.ModelProto.FromString(model.SerializeToString())
    for value, array in list(zip(made.graph.input, inputs, strict=True))[1:]:
        made.graph.initializer.append(numpy_helper.from_array(array, value.name))
    del made.graph.output[1:]
    for entry in made.opset_import:
        entry.version = max(entry.version, 8)
    return made


@pytest.mark.parametrize("operator", sorted(OPERATORS))
@pytest.mark.filterwarnings("ignore")
def test_operator_follows_the_standard(operator: str) -> None:
    passed = 0
    for model, inputs, outputs in _cases().get(operator, []):
        alone = _single(model, inputs)
        if any(word in model.graph.name for word in _REFUSED):
            with pytest.raises(InputError, match="has no torch twin"):
                unobjectionable(alone, "case")
            continue
        readable(alone, "case")
        unobjectionable(alone, "case")
        got = Twin(alone)(torch.from_numpy(np.array(inputs[0])))
        expected = torch.from_numpy(outputs[0].astype(np.float32))
        assert got.shape == expected.shape, model.graph.name
        assert torch.allclose(got, expected, rtol=1e-3, atol=1e-4, equal_nan=True), model.graph.name
        passed += 1
    assert passed > 0
