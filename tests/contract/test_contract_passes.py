"""Every file in targets/passes keeps the promises of targets/passes/base.py."""

from pathlib import Path

import numpy as np
import onnx
import pytest

from targets.lowering.apply import apply
from targets.lowering.parity import compare
from targets.passes.base import Kit, LoweringError, load, names
from tests.graphs import images, tiny

PASSES = names()
# What 8 bits may cost this graph, as a share of the largest logit; float16 keeps ten bits, an exact pass everything.
SHARE = {"qdq_int8_cpu": 0.1, "qdq_int8_trt": 0.1, "fp16": 2e-3}


@pytest.fixture
def kit(tmp_path: Path) -> Kit:
    return Kit(images(64), tmp_path)


def test_the_folder_holds_passes() -> None:
    assert {"fold_constants", "fp16", "qdq_int8_cpu", "qdq_int8_trt", "ort_format", "tensorrt_check"} <= set(PASSES)


@pytest.mark.parametrize("name", PASSES)
def test_a_pass_has_its_docstring_and_says_whether_it_is_exact(name: str) -> None:
    module = load(name)
    assert module.__doc__
    assert module.lower.__doc__
    assert isinstance(module.EXACT, bool)


@pytest.mark.parametrize("name", PASSES)
def test_before_and_after_agree_within_what_the_pass_may_cost(name: str, kit: Kit) -> None:
    lowered = apply(tiny(), ["fold_constants", name], kit)
    probe = images(128, seed=9)
    parity = compare(tiny(), lowered.model, probe)
    assert parity.gap <= SHARE.get(name, 1e-5) * parity.scale
    assert parity.top1 >= (0.95 if name in SHARE else 1.0)


@pytest.mark.parametrize("name", PASSES)
def test_equal_inputs_give_equal_bytes_and_leave_the_model_alone(name: str, tmp_path: Path) -> None:
    before = onnx.load_from_string(tiny())
    kept = before.SerializeToString(deterministic=True)
    made = []
    for i in range(2):
        work = tmp_path / str(i)
        work.mkdir()
        kit = Kit(images(64), work)
        made.append(load(name).lower(before, {}, kit).SerializeToString(deterministic=True))
    assert before.SerializeToString(deterministic=True) == kept
    assert made[0] == made[1]


@pytest.mark.parametrize("name", PASSES)
def test_an_unknown_option_is_refused_by_name(name: str, kit: Kit) -> None:
    with pytest.raises(LoweringError, match=f'pass "{name}": no option "nonsense"'):
        load(name).lower(onnx.load_from_string(tiny()), {"nonsense": 1}, kit)


@pytest.mark.parametrize("name", PASSES)
def test_names_inputs_and_symbolic_batch_survive(name: str, kit: Kit) -> None:
    graph = load(name).lower(onnx.load_from_string(tiny()), {}, kit).graph
    assert [i.name for i in graph.input] == ["input"]
    assert [o.name for o in graph.output] == ["logits"]
    tensor = graph.input[0].type.tensor_type
    assert tensor.elem_type == onnx.TensorProto.FLOAT
    assert graph.output[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    assert tensor.shape.dim[0].dim_param
    assert all(node.name for node in graph.node)
    assert len({node.name for node in graph.node}) == len(graph.node)


@pytest.mark.parametrize("name", PASSES)
@pytest.mark.parametrize("batch", [1, 2, 7, 64])
def test_the_lowered_graph_runs_at_any_batch(name: str, batch: int, kit: Kit) -> None:
    lowered = apply(tiny(), [name], kit)
    from targets.lowering.parity import logits_of

    logits = logits_of(lowered.model, images(batch))
    assert logits.shape == (batch, 4)
    assert np.isfinite(logits).all()
