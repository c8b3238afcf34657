"""What every layer promises; the folder listing is the list, so a new file cannot escape."""

import importlib
import json
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import nn

from stages.method import InputError, names
from stages.nn import checkpoint
from stages.nn.arch import LAYERS, Arch, Model, Rewrite
from stages.nn.cost import cost
from stages.nn.fold import fold
from stages.nn.imported import imported
from stages.nn.to_onnx import export
from tests.networks import built, images, onnx_logits

_SHAPE = (3, 8, 8)
# layer: where it goes in a small CNN (width 4, so conv2 is 4 -> 8), its options, and its MACs there counted by hand.
# conv1: 4x4 pixels, 4 * 3 * 16; conv2: 2x2 pixels, 8 * 4 * 16; linear layers: 32 * 8 and 8 * 10.
_CONV1, _CONV2, _FC1, _FC2 = 16 * 4 * 3 * 16, 4 * 8 * 4 * 16, 32 * 8, 8 * 10
_KERNELS = [0, 0, 1, 2, 2, 2]
_CASES: dict[str, list[tuple[list[dict[str, Any]], int]]] = {
    "normalize": [([{"at": "normalize", "options": {"channels": 3}}], _CONV1 + _CONV2 + _FC1 + _FC2)],
    "resized": [
        (
            [{"at": "conv1", "options": {"outputs": 3}}, {"at": "conv2", "options": {"inputs": 3}}],
            16 * 3 * 3 * 16 + 4 * 8 * 3 * 16 + _FC1 + _FC2,
        ),
        ([{"at": "fc1", "options": {"outputs": 5}}, {"at": "fc2", "options": {"inputs": 5}}], _CONV1 + _CONV2 + 210),
    ],
    "gdws_conv": [
        # G = 6 atoms on 2x2 pixels: 16 multiplications each for the kernel, 8 for the column.
        ([{"at": "conv2", "options": {"channels": _KERNELS, "form": form}}], _CONV1 + 4 * 6 * (16 + 8) + _FC1 + _FC2)
        for form in ("gather", "sum", "concat")
    ],
}
ALL = pytest.mark.parametrize(
    ("layer", "rewrites", "macs"),
    [(layer, rewrites, macs) for layer, cases in _CASES.items() for rewrites, macs in cases],
)


def _arch(layer: str, rewrites: list[dict[str, Any]]) -> Arch:
    return Arch(
        builder="small_cnn",
        options={"width": 4, "hidden": 8},
        input_shape=_SHAPE,
        classes=10,
        mean=(0.1, 0.2, 0.3),
        std=(0.5, 0.5, 0.25),
        rewrites=tuple(Rewrite(layer=layer, **rewrite) for rewrite in rewrites),
    )


def test_every_layer_of_the_folder_has_a_case() -> None:
    assert set(names(LAYERS)) == set(_CASES)


@ALL
def test_rebuilds_exports_and_costs_what_was_counted(
    layer: str, rewrites: list[dict[str, Any]], macs: int, tmp_path: Path
) -> None:
    wanted = _arch(layer, rewrites)
    net = built(wanted)
    checkpoint.save(Model(wanted, net), tmp_path)
    again = checkpoint.load(tmp_path / "arch.json", tmp_path / "weights.safetensors")
    assert again.arch == Arch.load(json.loads(json.dumps(wanted.dump())))
    assert cost(net, _SHAPE).macs == macs
    path = tmp_path / "model.onnx"
    export(net, _SHAPE, path)
    graph = path.read_bytes()
    twin, folded = imported(graph), fold(net)
    for count in (1, 2, 5, 64):
        x = images(count, _SHAPE, seed=count)
        with torch.no_grad():
            expected = net(x)
            assert torch.equal(again.net(x), expected)
            torch.testing.assert_close(onnx_logits(graph, x), expected, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(twin(x), expected, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(folded(x), expected, rtol=1e-5, atol=1e-5)
    _no_depth_multiplier(onnx.load_from_string(graph))


@ALL
def test_trains(layer: str, rewrites: list[dict[str, Any]], macs: int) -> None:
    net = built(_arch(layer, rewrites)).train()
    net(images(4, _SHAPE)).square().sum().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name


@pytest.mark.parametrize("layer", names(LAYERS))
def test_the_wrong_kind_of_module_is_refused(layer: str) -> None:
    like = importlib.import_module(f"{LAYERS}.{layer}").like
    given: dict[str, dict[str, Any]] = {"gdws_conv": {"channels": [0]}, "normalize": {"channels": 1}}
    options = given.get(layer, {"outputs": 4})
    with pytest.raises(InputError, match="expected"):
        like(nn.Bilinear(2, 2, 2), **options)
    with pytest.raises(TypeError):
        like(nn.Conv2d(1, 1, 3), no_such_option=1)


def _no_depth_multiplier(model: onnx.ModelProto) -> None:
    """Every grouped convolution has one channel in and one out per group: the form that runtimes have kernels for."""
    weights = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    for node in model.graph.node:
        group = next((a.i for a in node.attribute if a.name == "group"), 1)
        if node.op_type == "Conv" and group > 1:
            assert weights[node.input[1]][:2] == (group, 1)
