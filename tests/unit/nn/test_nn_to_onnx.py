"""An exported file is repeatable to the byte, says nothing of where it was made, and holds only the network."""

import getpass
import hashlib
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Literal

import onnx
import pytest
import torch
from torch import Tensor, nn

from stages.method import InputError
from stages.nn.imported import imported
from stages.nn.to_onnx import export
from tests.networks import Shape, arch, built, images, onnx_logits

_ROOT = Path(__file__).resolve().parents[3]
_SHAPE: Shape = (3, 16, 16)
_SCRIPT = """
import sys
from pathlib import Path
from stages.nn.to_onnx import export
from tests.networks import arch, built
export(built(arch("resnet", (3, 16, 16), blocks=(1, 1))), (3, 16, 16), Path(sys.argv[1]), exporter=sys.argv[2])
"""
Exporter = Literal["dynamo", "legacy"]


@pytest.mark.parametrize("exporter", ["dynamo", "legacy"])
def test_two_processes_write_the_same_bytes_without_names_of_places(exporter: Exporter, tmp_path: Path) -> None:
    digests = set()
    for seed in ("1", "2"):
        folder = tmp_path / f"somewhere_{seed}"
        folder.mkdir()
        path = folder / f"model_{seed}.onnx"
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(_ROOT), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, "-c", _SCRIPT, str(path), exporter],
            cwd=folder, env=environment, capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert done.stdout == done.stderr == ""
        data = path.read_bytes()
        digests.add(hashlib.sha256(data).hexdigest())
        for text in (str(_ROOT), str(tmp_path), "/site-packages/", ".py", getpass.getuser() + "/", torch.__version__):
            assert text.encode() not in data, text
        assert [child.name for child in folder.iterdir()] == [path.name]
    assert len(digests) == 1


@pytest.mark.parametrize("builder", ["small_cnn", "wrn", "mobilenet"])
def test_the_older_exporter_is_a_fallback_that_agrees(builder: str, tmp_path: Path) -> None:
    net = built(arch(builder))
    export(net, (3, 32, 32), tmp_path / "m.onnx", exporter="legacy")
    for count in (1, 3):
        x = images(count, (3, 32, 32))
        with torch.no_grad():
            logits = onnx_logits((tmp_path / "m.onnx").read_bytes(), x)
            torch.testing.assert_close(logits, net(x), rtol=1e-4, atol=1e-5)


def test_the_file_is_one_clean_graph_of_the_asked_opset(tmp_path: Path) -> None:
    export(built(arch("resnet", _SHAPE, blocks=(1, 1))), _SHAPE, tmp_path / "m.onnx", opset=18)
    model = onnx.load(tmp_path / "m.onnx")
    assert [entry.version for entry in model.opset_import] == [18]
    assert [value.name for value in (*model.graph.input, *model.graph.output)] == ["input", "logits"]
    kinds = {node.op_type for node in model.graph.node}
    assert not kinds & {"BatchNormalization", "Constant", "Identity", "Dropout"}
    assert not any(node.metadata_props or node.doc_string for node in model.graph.node)
    assert not model.metadata_props
    assert not model.graph.metadata_props
    assert all(tensor.data_location == onnx.TensorProto.DEFAULT for tensor in model.graph.initializer)


class _Arranged(nn.Module):
    """A layer that arranges large weights in its forward pass, which exporters leave to the device."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(700, 768))
        self.register_buffer("order", torch.arange(699, -1, -1))

    def forward(self, x: Tensor) -> Tensor:
        order = self.get_buffer("order")
        return nn.functional.linear(x.flatten(1), torch.cat([self.weight.index_select(0, order), self.weight]) * 2)


@pytest.mark.parametrize("exporter", ["dynamo", "legacy"])
def test_what_depends_on_weights_alone_is_computed_before_it_ships(exporter: Exporter, tmp_path: Path) -> None:
    net = _Arranged()
    export(net, _SHAPE, tmp_path / "m.onnx", exporter=exporter)
    model = onnx.load(tmp_path / "m.onnx")
    assert {node.op_type for node in model.graph.node} <= {"Flatten", "Reshape", "MatMul", "Gemm"}
    x = images(3, _SHAPE)
    torch.testing.assert_close(onnx_logits(model.SerializeToString(), x), net(x).detach(), rtol=1e-4, atol=1e-3)


class _Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x.flatten(1)
        return y if bool((y.sum() > 0).item()) else -y


def test_a_network_that_cannot_be_exported_says_why_and_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match='_Branching cannot be exported to ONNX by the dynamo exporter; try exporter="le'
    ):
        export(_Branching(), _SHAPE, tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


def test_channels_last_weights_and_train_mode_change_nothing(tmp_path: Path) -> None:
    net = built(arch("small_cnn", _SHAPE))
    export(net, _SHAPE, tmp_path / "one.onnx")
    net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    net.train()
    export(net, _SHAPE, tmp_path / "two.onnx")
    assert (tmp_path / "one.onnx").read_bytes() == (tmp_path / "two.onnx").read_bytes()
    assert net.training


def test_warnings_of_ours_are_not_lost_after_an_export(tmp_path: Path) -> None:
    export(built(arch("mlp", _SHAPE)), _SHAPE, tmp_path / "m.onnx")
    with pytest.warns(UserWarning, match="still heard"):
        warnings.warn("still heard", UserWarning, stacklevel=1)
    assert imported(tmp_path / "m.onnx")(images(1, _SHAPE)).shape == (1, 10)
