"""A detector around a network: the same logits to the last bit, two more outputs, and what does not fit."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from stages.detectors.base import Detector, guard
from stages.detectors.feature_squeezing import FeatureSqueezing
from targets.lowering.apply import apply, prove
from targets.lowering.attach import OUTPUTS, attach
from targets.lowering.parity import logits_of
from targets.passes.base import Kit, LoweringError
from targets.runtime.ort import OrtEngine
from tests.graphs import CLASSES, SHAPE, images, tiny

DETECTOR = FeatureSqueezing(squeezers=("bit_2", "median_2", "nlm_3_3_20"))
GUARD = guard(DETECTOR, 0.4, SHAPE, CLASSES)


@pytest.fixture
def kit(tmp_path: Path) -> Kit:
    return Kit(images(64), tmp_path)


def reference(network: bytes, x: np.ndarray, detector: Detector = DETECTOR) -> np.ndarray:
    """Scores in torch, from what onnxruntime says of the bare network."""
    return detector.scores(lambda p: torch.from_numpy(logits_of(network, p.numpy())), torch.from_numpy(x)).numpy()


@pytest.mark.parametrize(
    "passes", [[], ["fold_constants"], ["fold_constants", "qdq_int8_cpu"], ["fp16"], ["ort_format"]]
)
@pytest.mark.parametrize("batch", [1, 2, 7])
def test_logits_are_the_same_bits_and_score_and_flag_those_of_torch(kit: Kit, passes: list[str], batch: int) -> None:
    bare = apply(tiny(), passes, kit)
    seen: list[bytes] = []
    lowered = apply(tiny(), passes, kit, guard=lambda network: seen.append(network) or GUARD)  # type: ignore[func-returns-value]
    assert seen == [bare.model] == [lowered.network]
    x = images(batch, seed=3)
    for data in (lowered.model, *lowered.extras.values()):
        found = OrtEngine(data).outputs(x)
        assert tuple(found) == OUTPUTS
        score = reference(bare.model, x)
        assert found["score"].dtype == np.float32
        assert found["flag"].dtype == np.bool_
        assert np.array_equal(found["flag"], found["score"] > np.float32(0.4))
        if data is lowered.model:
            # In half precision onnxruntime moves its casts to where they are cheapest, which two networks change.
            gap = np.abs(found["logits"] - logits_of(bare.model, x)).max()
            assert gap == 0 or (passes == ["fp16"] and gap < 1e-5)
            assert np.abs(found["score"] - score).max() < 1e-5


def test_the_network_is_lowered_and_the_detector_stays_float(kit: Kit) -> None:
    graph = onnx.load_from_string(
        apply(tiny(), ["fold_constants", "qdq_int8_cpu"], kit, guard=lambda _: GUARD).model
    ).graph
    first = [n for n in graph.node if not n.name.startswith("detector/")]
    again = [n for n in graph.node if n.name.startswith("detector/network/")]
    own = [n for n in graph.node if n.name.startswith("detector/") and n not in again]
    assert [n.op_type for n in first] == [n.op_type for n in again]
    assert not {"QuantizeLinear", "DequantizeLinear"} & {n.op_type for n in own}
    assert {"QuantizeLinear", "DequantizeLinear"} <= {n.op_type for n in first}
    shared = {t.name for t in graph.initializer if not t.name.startswith("detector/")}
    assert {name for n in first for name in n.input if name in shared} == {
        name for n in again for name in n.input if name in shared
    }


def test_every_precision_is_asked_for_a_threshold_of_its_own(kit: Kit) -> None:
    asked: list[bytes] = []
    precisions = {"int8": ["fold_constants", "qdq_int8_cpu"], "fp32": ["fold_constants"]}
    made = prove(tiny(), precisions, kit, guard=lambda network: asked.append(network) or GUARD)  # type: ignore[func-returns-value]
    assert asked == [made["int8"].network, made["fp32"].network]
    assert asked[0] != asked[1]


def test_equal_inputs_give_equal_bytes_and_leave_the_network_alone() -> None:
    network, around = onnx.load_from_string(tiny()), onnx.load_from_string(GUARD)
    one, two = attach(network, around), attach(network, around)
    assert one.SerializeToString(deterministic=True) == two.SerializeToString(deterministic=True)
    assert network == onnx.load_from_string(tiny())
    assert guard(DETECTOR, 0.4, SHAPE, CLASSES) == GUARD
    assert [o.name for o in one.graph.output] == list(OUTPUTS)
    assert [o.type.tensor_type.shape.dim[0].dim_param for o in one.graph.output] == ["batch"] * 3


def test_a_pass_that_would_lower_a_detector_is_refused(kit: Kit) -> None:
    with pytest.raises(LoweringError, match='pass "fp16" comes after "ort_format", but a detector lies between them'):
        apply(tiny(), ["ort_format", "fp16"], kit, guard=lambda _: GUARD)


def test_what_does_not_fit_is_refused() -> None:
    network, around = onnx.load_from_string(tiny()), onnx.load_from_string(GUARD)
    with pytest.raises(LoweringError, match="the network: expected inputs and outputs"):
        attach(around, around)
    with pytest.raises(LoweringError, match="the detector: expected inputs and outputs"):
        attach(network, network)
    older = onnx.ModelProto()
    older.CopyFrom(around)
    older.opset_import[0].version = 18
    with pytest.raises(LoweringError, match="the network is written in opset 20, the detector in 18"):
        attach(network, older)
    branch = onnx.ModelProto()
    branch.CopyFrom(network)
    inner = helper.make_graph([], "inner", [], [helper.make_tensor_value_info("input", TensorProto.FLOAT, None)])
    branch.graph.node[0].attribute.append(helper.make_attribute("then_branch", inner))
    with pytest.raises(LoweringError, match=r'node "std" \(Mul\) holds a graph'):
        attach(branch, around)
