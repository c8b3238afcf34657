"""Quantiles with honest intervals; memory and time of a real model in a process of its own."""

import math
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from targets.runtime.errors import BundleError
from targets.runtime.latency import measure, quantile, time_calls
from tests.graphs import SHAPE, tiny


def below(n: int, q: float, rank: int) -> float:
    """P(Binomial(n, q) < rank), summed term by term."""
    return sum(math.comb(n, k) * q**k * (1 - q) ** (n - k) for k in range(rank))


@pytest.mark.parametrize("q", [0.5, 0.95])
@pytest.mark.parametrize("n", [20, 73, 100, 200])
def test_the_interval_is_the_narrowest_pair_of_ranks_that_covers(n: int, q: float) -> None:
    figure = quantile(list(range(1, n + 1)), q)
    low, high = int(figure.low), int(figure.high)
    assert below(n, q, low) <= 0.025 < below(n, q, low + 1)
    if below(n, q, n) >= 0.975:
        assert below(n, q, high - 1) < 0.975 <= below(n, q, high)
    else:
        assert high == n
    assert figure.value == math.ceil(q * n)


def test_the_interval_covers_the_true_quantile_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    true = -math.log(0.05)  # the 0.95-quantile of the standard exponential
    figures = [quantile(rng.exponential(size=200).tolist(), 0.95) for _ in range(400)]
    covered = sum(f.low <= true <= f.high for f in figures)
    assert covered >= 0.925 * 400
    assert all(f.low <= f.value <= f.high for f in figures)


def test_order_of_samples_does_not_matter_and_none_is_an_error() -> None:
    assert quantile([3.0, 1.0, 2.0], 0.5) == quantile([1.0, 2.0, 3.0], 0.5)
    with pytest.raises(BundleError, match="expected samples"):
        quantile([], 0.5)


def test_warm_up_calls_are_made_and_not_counted() -> None:
    calls: list[int] = []
    samples = time_calls(lambda: calls.append(1), runs=7, warmup=3)
    assert (len(samples), len(calls)) == (7, 10)
    assert min(samples) >= 0


def test_a_model_is_measured_in_a_fresh_process(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(tiny())
    found = measure(tmp_path / "m.onnx", SHAPE, batch=2, runs=100, warmup=5)
    assert 0 < found.p50.low <= found.p50.value <= found.p95.value <= found.p95.high
    assert 0 <= found.peak_bytes < found.process_bytes
    assert (found.runs, found.batch) == (100, 2)


def test_peak_memory_sees_the_weights(tmp_path: Path) -> None:
    (tmp_path / "small.onnx").write_bytes(tiny())
    (tmp_path / "large.onnx").write_bytes(heavy(32 << 20))
    small = measure(tmp_path / "small.onnx", SHAPE, runs=20)
    large = measure(tmp_path / "large.onnx", SHAPE, runs=20)
    assert large.peak_bytes - small.peak_bytes > 28 << 20


def heavy(size: int) -> bytes:
    """A linear classifier whose one inner layer has `size` bytes of weights."""
    width = size // 4 // 64
    first = np.full((64, width), 1e-3, np.float32)
    nodes = [
        helper.make_node("Flatten", ["input"], ["flat"]),
        helper.make_node("MatMul", ["flat", "first"], ["hidden"]),
        helper.make_node("ReduceMean", ["hidden"], ["mean"], keepdims=1),
        helper.make_node("Concat", ["mean", "mean"], ["logits"], axis=1),
    ]
    graph = helper.make_graph(
        nodes,
        "heavy",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", *SHAPE])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(first, "first")],
    )
    # Reduces over every axis, so a batch of one only; enough to be held in memory.
    model: onnx.ModelProto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    data: bytes = model.SerializeToString()
    return data


@pytest.mark.parametrize(
    ("arguments", "words"), [({"runs": 3}, "runs >= 20"), ({"batch": 0}, "batch >= 1"), ({"warmup": -1}, "warmup >= 0")]
)
def test_numbers_without_sense_are_refused(tmp_path: Path, arguments: dict[str, int], words: str) -> None:
    with pytest.raises(BundleError, match=words):
        measure(tmp_path / "m.onnx", SHAPE, **arguments)  # type: ignore[arg-type]


def test_a_model_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="cannot load the model"):
        measure(tmp_path / "absent.onnx", SHAPE)
    (tmp_path / "m.onnx").write_bytes(tiny())
    with pytest.raises(BundleError, match="ended with status"):
        measure(tmp_path / "m.onnx", (3, 8, 8))
    with pytest.raises(BundleError, match=r"no answer within 0\.01 s"):
        measure(tmp_path / "m.onnx", SHAPE, timeout=0.01)
