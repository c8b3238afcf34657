"""Files that look robust for a reason of their own, and files of common makers: found out, or simply understood."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, quantize_static
from torch import Tensor, nn

from stages import validity
from stages.adapter import Form
from stages.attacks.fab import FAB
from stages.attacks.pgd import PGD
from stages.data.digits import Digits
from stages.evaluate import under_attack
from stages.subject import opened
from stages.threat import Threat
from tests.audited import file
from tests.trained import digits, digits_model

THREAT = Threat(norm="linf", eps=0.1)


class Blind(nn.Module):
    """sqrt(x)^2 = x in front: the same function, and a gradient of 0 * inf = NaN at every black pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.net = digits_model().net

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.net(x.sqrt().square())
        return z


def shown(count: int = 40) -> tuple[Tensor, Tensor]:
    test = digits().test
    return test.floats(slice(0, count)), test.labels[:count]


@pytest.mark.parametrize("attack", [PGD(steps=10, loss="margin"), FAB(steps=10, targets=9)], ids=lambda a: a.kind)
def test_a_pixel_whose_gradient_is_nan_does_not_end_the_climb(attack: PGD | FAB) -> None:
    x, y = shown()
    plain, _ = under_attack(digits_model().net.eval(), attack, x, y, THREAT, 0)
    blind, _ = under_attack(Blind().eval(), attack, x, y, THREAT, 0)
    assert int(blind.sum()) <= int(plain.sum()) + 12  # black pixels stay; before, nearly all images stood
    found = validity.gradients_present(Blind().eval(), x, y)
    assert not found.ok
    assert "(40 of them) one with NaN or infinite entries" in found.text


def test_a_sigmoid_on_the_logits_is_called_out(tmp_path: Path) -> None:
    model = onnx.load(file(tmp_path / "m.onnx"))
    graph = model.graph
    old, new = graph.output[0].name, "squashed"
    graph.node.extend(
        [helper.make_node("Mul", [old, "five"], ["scaled"]), helper.make_node("Sigmoid", ["scaled"], [new])]
    )
    graph.initializer.append(numpy_helper.from_array(np.float32(5), "five"))
    graph.output[0].name = new
    onnx.save(model, tmp_path / "sigmoid.onnx")
    x = Digits().read(Path()).test.floats(slice(0, 40))
    given = opened(tmp_path / "sigmoid.onnx", x, Form(), 1)
    found = validity.not_probabilities(given.file, x)
    assert not found.ok
    assert "all lie in [0, 1], as after a sigmoid" in found.text


class Batches(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, images: Tensor) -> None:
        self.left = [images[at : at + 16] for at in range(0, len(images), 16)]

    def get_next(self) -> dict[str, object] | None:
        return {"input": self.left.pop().numpy()} if self.left else None


def test_an_int8_file_of_opset_13_has_a_twin(tmp_path: Path) -> None:
    """As onnxruntime's own quantiser makes them; onnx's evaluator knows Q/DQ of newer opsets alone."""
    source = onnx.load(file(tmp_path / "float.onnx"))
    source.graph.input[0].name = source.graph.node[0].input[0] = "input"
    del source.opset_import[:]
    source.opset_import.append(helper.make_opsetid("", 13))
    onnx.save(source, tmp_path / "source.onnx")
    x = Digits().read(Path()).test.floats(slice(0, 48))
    quantize_static(tmp_path / "source.onnx", tmp_path / "int8.onnx", Batches(x))
    assert onnx.load(tmp_path / "int8.onnx").opset_import[0].version == 13
    given = opened(tmp_path / "int8.onnx", x, Form(), 1)
    assert given.why == ""
    assert given.twin is not None
    assert given.twin.twin.rounds
    survived, _ = under_attack(
        given.attacked, PGD(steps=10), x, torch.from_numpy(given.file(x).numpy().argmax(1)), THREAT, 0
    )
    assert int(survived.sum()) < 24
