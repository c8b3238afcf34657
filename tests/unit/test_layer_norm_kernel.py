"""The kernel that the installed onnxruntime normalises layers with, held to the bounds; and files it may spoil."""

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from stages import layer_norm_kernel
from stages.bounds._interval import SINGLE, Interval, Rounding
from stages.bounds._norms import moments
from stages.layer_norm_kernel import loses_variance, normalises, probe
from stages.nn.to_onnx import export
from targets.runtime.ort import OrtEngine


@pytest.mark.parametrize("offset", [1.0, 1e3, 1e6])
@pytest.mark.parametrize("spread", [1e-6, 1e-3, 1.0])
def test_the_installed_kernel_keeps_to_the_bounds(offset: float, spread: float) -> None:
    x = torch.from_numpy((offset * (1 + spread * np.random.default_rng(1).normal(size=(64, 64)))).astype(np.float32))
    found = moments(Interval(x, x), (64,), 1e-5, Rounding(SINGLE))
    answers = (torch.from_numpy(OrtEngine(probe())(x.numpy())), torch.nn.functional.layer_norm(x, (64,), eps=1e-5))
    for answer in answers:
        assert bool((answer.double() >= found.ends[0] - found.loss - 1e-9).all())
        assert bool((answer.double() <= found.ends[1] + found.loss + 1e-9).all())
    assert not loses_variance()


def test_a_kernel_of_squares_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def squares(_: bytes) -> object:
        def run(x: NDArray[np.float32]) -> NDArray[np.float32]:
            mean = x.mean(1, keepdims=True)
            variance = (x**2).mean(1, keepdims=True) - mean**2
            with np.errstate(invalid="ignore"):
                answer: NDArray[np.float32] = (x - mean) / np.sqrt(variance + np.float32(1e-5))
            return answer

        return run

    monkeypatch.setattr(layer_norm_kernel, "OrtEngine", squares)
    loses_variance.cache_clear()
    assert loses_variance()
    loses_variance.cache_clear()


@pytest.mark.parametrize("opset", [13, 20])
def test_a_normalised_layer_is_found_in_a_file(opset: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("files")
    for name, layer in (("with", nn.LayerNorm(4)), ("without", nn.ReLU())):
        path = folder / f"{name}.onnx"
        export(nn.Sequential(nn.Flatten(), layer, nn.Linear(4, 2)).eval(), (1, 2, 2), path, opset, "legacy")
        assert normalises(path.read_bytes()) == (name == "with"), onnx.load(path)
