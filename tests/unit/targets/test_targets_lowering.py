"""What the passes do to a graph, and what `apply` refuses."""

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, numpy_helper

from targets.lowering import apply as apply_module
from targets.lowering.apply import apply, passes_for, prove
from targets.lowering.parity import between, compare, logits_of
from targets.passes._graph import clean, normalised, weighted
from targets.passes.base import Kit, LoweringError
from tests.graphs import images, tiny


@pytest.fixture
def kit(tmp_path: Path) -> Kit:
    return Kit(images(64), tmp_path)


def operators(model: bytes) -> list[str]:
    return [node.op_type for node in onnx.load_from_string(model).graph.node]


def test_parity_by_hand() -> None:
    before = np.array([[1, 2], [5, 3]], np.float32)
    after = np.array([[1, 2.5], [2, 3]], np.float32)
    found = between(before, after)
    assert (found.gap, found.scale, found.top1, found.images) == (3.0, 5.0, 0.5, 2)
    assert np.isnan(between(before, after * np.float32(np.nan)).gap)
    with pytest.raises(ValueError, match="expected two equal shapes"):
        between(before, after[:1])
    assert compare(tiny(), tiny(), images(4)).gap == 0


def test_the_normalised_image_is_found_behind_constant_arithmetic_only(kit: Kit) -> None:
    assert normalised(onnx.load_from_string(tiny())) == "centred", "the divisor is still computed"
    assert normalised(onnx.load_from_string(apply(tiny(), ["fold_constants"], kit).model)) == "normal"


def test_folding_leaves_no_batch_normalisation_and_no_constant_arithmetic(kit: Kit) -> None:
    assert {"BatchNormalization", "Mul"} <= set(operators(tiny()))
    folded = operators(apply(tiny(), ["fold_constants"], kit).model)
    assert not {"BatchNormalization", "Mul"} & set(folded)
    assert len(folded) == 10


def test_int8_for_cpus_has_unsigned_activations_signed_weights_and_float_logits(kit: Kit) -> None:
    model = onnx.load_from_string(apply(tiny(), ["fold_constants", "qdq_int8_cpu"], kit).model)
    fixed = {t.name: t for t in model.graph.initializer}
    makers = {name: node for node in model.graph.node for name in node.output}
    assert makers["logits"].op_type == "Gemm"
    assert {fixed[n.input[2]].data_type for n in model.graph.node if n.op_type == "QuantizeLinear"} == {
        TensorProto.UINT8
    }
    for node in weighted_or_conv(model):
        weight = fixed[makers[node.input[1]].input[0]]
        assert weight.data_type == TensorProto.INT8
        assert len(numpy_helper.to_array(fixed[makers[node.input[1]].input[1]])) > 1, "one scale per channel"
        assert np.abs(numpy_helper.to_array(weight).astype(int)).max() <= 64, "7 bits: no 16-bit saturation"


def weighted_or_conv(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    return [node for node in model.graph.node if node.op_type in ("Conv", "Gemm")]


@pytest.mark.parametrize("seed", range(3))
def test_int8_computes_the_same_with_and_without_fused_kernels(kit: Kit, seed: int) -> None:
    model = apply(tiny(seed), ["fold_constants", "qdq_int8_cpu"], kit).model
    x, found = images(64, seed=4), []
    for level in ("ORT_DISABLE_ALL", "ORT_ENABLE_ALL"):
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        found.append(session.run(None, {"input": x})[0])
    np.testing.assert_allclose(found[0], found[1], atol=1e-4)


def test_eight_bit_weights_do_so_in_the_runtimes_own_session(kit: Kit) -> None:
    wide = {"pass": "qdq_int8_cpu", "reduce_range": False}
    model = apply(tiny(), ["fold_constants", wide], kit).model
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    plain = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    x = images(64, seed=4)
    np.testing.assert_allclose(plain.run(None, {"input": x})[0], logits_of(model, x), atol=1e-4)


def test_int8_for_tensorrt_is_symmetric_with_float_biases(kit: Kit) -> None:
    model = onnx.load_from_string(apply(tiny(), ["fold_constants", "qdq_int8_trt"], kit).model)
    fixed = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            assert fixed[node.input[2]].dtype == np.int8
            assert not fixed[node.input[2]].any()
    assert "b2" in fixed
    assert fixed["b2"].dtype == np.float32
    makers = {name: node for node in model.graph.node for name in node.output}
    assert makers["logits"].op_type == "Gemm"


@pytest.mark.parametrize("name", ["qdq_int8_cpu", "qdq_int8_trt"])
def test_the_pixel_range_is_never_clipped_whatever_was_seen(tmp_path: Path, name: str) -> None:
    dim = Kit(images(32) * np.float32(0.25), tmp_path)
    model = onnx.load_from_string(apply(tiny(), ["fold_constants", name], dim).model)
    fixed = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    first = next(node for node in model.graph.node if node.op_type == "QuantizeLinear")
    assert first.input[0] == "normal"
    scale, zero = float(fixed[first.input[1]]), int(fixed[first.input[2]])
    low, high = (0 - 0.3) / 0.25, (1 - 0.3) / 0.25
    bottom, top = (0, 255) if name == "qdq_int8_cpu" else (-128, 127)
    assert scale * (bottom - zero) <= low + 0.51 * scale
    assert scale * (top - zero) >= high - 0.51 * scale


def test_no_pixel_moves_by_more_than_half_a_level_under_unsigned_activations(kit: Kit) -> None:
    model = onnx.load_from_string(apply(tiny(), ["fold_constants", "qdq_int8_cpu"], kit).model)
    tapped = onnx.ModelProto()
    tapped.CopyFrom(model)
    for name in ("normal", "normal_DequantizeLinear_Output"):
        tapped.graph.output.append(onnx.helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(tapped.SerializeToString(), options, providers=["CPUExecutionProvider"])
    ramp = (np.arange(256, dtype=np.float32) / 255).reshape(4, 1, 8, 8)
    before, after = session.run(["normal", "normal_DequantizeLinear_Output"], {"input": ramp})
    # The grid is that of the 256 levels, shifted by up to half a step, because zero itself must be a grid point.
    assert np.abs(before - after).max() <= 0.51 * 4 / 255


@pytest.mark.parametrize("name", ["qdq_int8_cpu", "qdq_int8_trt"])
def test_kept_nodes_stay_in_float(kit: Kit, name: str) -> None:
    model = onnx.load_from_string(
        apply(tiny(), ["fold_constants", {"pass": name, "keep": ["first", "last"]}], kit).model
    )
    makers = {out: node.op_type for node in model.graph.node for out in node.output}
    quantised = [node.name for node in weighted_or_conv(model) if makers.get(node.input[1]) == "DequantizeLinear"]
    assert quantised == ["conv2"]
    with pytest.raises(LoweringError, match='the graph has no node "conv9"'):
        apply(tiny(), [{"pass": name, "keep": ["conv9"]}], kit)
    with pytest.raises(LoweringError, match="is left to quantise"):
        apply(tiny(), [{"pass": name, "keep": ["conv1", "conv2", "head"]}], kit)


def test_half_precision_keeps_its_list_in_float(kit: Kit) -> None:
    def half(model: bytes) -> dict[str, int]:
        return {t.name: t.data_type for t in onnx.load_from_string(model).graph.initializer}

    passes: list[str | Mapping[str, Any]] = ["fold_constants", {"pass": "fp16", "keep_nodes": ["head"]}]
    kept, free = half(apply(tiny(), passes, kit).model), half(apply(tiny(), ["fp16"], kit).model)
    assert free["w3"] == free["w2"] == TensorProto.FLOAT16
    assert (kept["w3"], kept["w2"]) == (TensorProto.FLOAT, TensorProto.FLOAT16)
    with pytest.raises(LoweringError, match="keep_nodes: the graph has no node tail"):
        apply(tiny(), [{"pass": "fp16", "keep_nodes": ["tail"]}], kit)


def test_ort_format_is_the_same_function(kit: Kit) -> None:
    lowered = apply(tiny(), ["fold_constants", "qdq_int8_cpu", "ort_format"], kit)
    x = images(16, seed=6)
    np.testing.assert_allclose(logits_of(lowered.extras[".ort"], x), logits_of(lowered.model, x), atol=1e-4)


def test_steps_tell_what_each_pass_changed(kit: Kit) -> None:
    lowered = apply(tiny(), ["fold_constants", "qdq_int8_cpu"], kit, probe=images(20))
    assert [step.name for step in lowered.steps] == ["fold_constants", "qdq_int8_cpu"]
    assert lowered.steps[0].parity.gap < 1e-4 < lowered.steps[1].parity.gap
    assert all(step.parity.images == 20 for step in lowered.steps)
    assert lowered.steps[0].nodes < len(operators(tiny()))
    assert lowered.steps[1].bytes == len(lowered.model)


def test_no_pass_changes_nothing(kit: Kit) -> None:
    lowered = apply(tiny(), [], kit)
    assert (lowered.model, lowered.steps, lowered.parity.gap) == (tiny(), (), 0)


def test_a_pass_that_says_it_is_exact_and_is_not_is_refused(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    liar = SimpleNamespace(EXACT=True, lower=lambda *_: onnx.load_from_string(tiny(seed=1)))
    monkeypatch.setattr(apply_module, "load", lambda _: liar)
    with pytest.raises(LoweringError, match='pass "liar": changed a logit by'):
        apply(tiny(), ["liar"], kit)
    liar.EXACT = False
    apply(tiny(), ["liar"], kit)


def test_logits_that_stop_being_numbers_are_refused(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    model = onnx.load_from_string(tiny())
    for tensor in model.graph.initializer:
        if tensor.name == "b3":
            tensor.CopyFrom(numpy_helper.from_array(np.full(4, np.nan, np.float32), "b3"))
    monkeypatch.setattr(apply_module, "load", lambda _: SimpleNamespace(EXACT=False, lower=lambda *_: model))
    with pytest.raises(LoweringError, match="no longer finite numbers"):
        apply(tiny(), ["broken"], kit)


def test_wrong_names_get_the_nearest_right_one(kit: Kit) -> None:
    with pytest.raises(LoweringError, match=r'no pass "fold_constant"; did you mean "fold_constants"\?'):
        apply(tiny(), ["fold_constant"], kit)
    with pytest.raises(LoweringError, match=r'offers no precision "int4"; did you mean "int8"\?'):
        passes_for({"int8": [], "fp32": []}, "int4")
    with pytest.raises(LoweringError, match=r'no option "kept"; did you mean "keep"\?'):
        apply(tiny(), [{"pass": "qdq_int8_trt", "kept": []}], kit)
    with pytest.raises(LoweringError, match='option "keep": expected list, got 3'):
        apply(tiny(), [{"pass": "qdq_int8_trt", "keep": 3}], kit)
    with pytest.raises(LoweringError, match='expected the name of a pass or a table with "pass"'):
        apply(tiny(), [{"name": "fp16"}], kit)


def test_proving_names_the_precision_that_fails(kit: Kit) -> None:
    with pytest.raises(LoweringError, match='precision int8: no pass "nope"'):
        prove(tiny(), {"fp32": [], "int8": ["nope"]}, kit)


@pytest.mark.parametrize(
    ("given", "words"),
    [(b"nonsense", "not an ONNX model"), (b"", "not an ONNX model")],
)
def test_bytes_that_are_no_model_are_refused(kit: Kit, given: bytes, words: str) -> None:
    with pytest.raises(LoweringError, match=words):
        apply(given, ["fold_constants"], kit)


def test_other_names_of_input_and_output_are_refused(kit: Kit) -> None:
    model = onnx.load_from_string(tiny())
    model.graph.output[0].name = "scores"
    model.graph.node[-1].output[0] = "scores"
    with pytest.raises(LoweringError, match=r"got \['input'\] and \['scores'\]"):
        apply(model.SerializeToString(), ["fold_constants"], kit)


@pytest.mark.parametrize(
    ("calibration", "words"),
    [
        (np.zeros((0, 1, 8, 8), np.float32), "expected float32"),
        (np.zeros((2, 1, 8, 8), np.float64), "expected float32"),
        (np.zeros((2, 8, 8), np.float32), "expected float32"),
        (np.full((2, 1, 8, 8), 2, np.float32), r"expected values in \[0, 1\]"),
        (np.full((2, 1, 8, 8), np.nan, np.float32), r"expected values in \[0, 1\]"),
    ],
)
def test_calibration_must_be_images(calibration: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(LoweringError, match=words):
        Kit(calibration, tmp_path)


def test_calibration_reports_its_progress(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    kit = Kit(images(70), tmp_path, on_step=lambda done, total: seen.append((done, total)))
    apply(tiny(), ["qdq_int8_cpu"], kit)
    assert seen[0] == (0, 70)
    assert seen[-1] == (70, 70)


def test_cleaning_refuses_other_vendors_nodes_and_names_every_node() -> None:
    model = onnx.load_from_string(tiny())
    for node in model.graph.node:
        node.name = ""
    names = [node.name for node in clean(model, "test").graph.node]
    assert len(set(names)) == len(names)
    assert [node.name for node in weighted(clean(model, "test"))] == ["Conv_3", "Conv_6", "Gemm_11"]
    model.graph.node[-1].domain = "com.microsoft"
    with pytest.raises(LoweringError, match=r"nodes outside standard ONNX: com\.microsoft::Gemm"):
        clean(model, "test")
