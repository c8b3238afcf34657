"""Small vision transformers in int8, masked and not: onnxruntime runs what the file says, and stays in its bounds."""

from functools import cache
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor

from stages.bounds.base import Box, Certifier, lead_rows
from stages.bounds.crown import Crown
from stages.bounds.crown_ibp import CrownIBP
from stages.bounds.ibp import IBP
from stages.bounds.quantised import Quantised
from stages.nn.imported import Twin, imported
from stages.nn.to_onnx import export
from stages.seeding import generator
from targets.passes import _qdq, fold_constants, qdq_int8_cpu
from targets.passes.base import Kit
from targets.runtime.ort import OrtEngine
from tests.property.test_attention_sound import SHAPE, Mask, transformer
from tests.unit.test_engine_kernels import refusal

NETS: list[tuple[bool, Mask]] = [(True, "none"), (True, "added"), (False, "far")]


def images(seed: str) -> Tensor:
    return torch.rand(32, *SHAPE, generator=generator(0, seed))


def lowered(fused: bool, mask: Mask, folder: Path) -> bytes:
    export(transformer(fused, mask, True), SHAPE, folder / "plain.onnx", 18, "legacy")
    kit = Kit(images("calibration").numpy(), folder)
    made = qdq_int8_cpu.lower(fold_constants.lower(onnx.load(folder / "plain.onnx"), {}, kit), {}, kit)
    return bytes(made.SerializeToString(deterministic=True))


@cache
def ready(fused: bool, mask: Mask, folder: Path) -> tuple[bytes, Twin, OrtEngine]:
    file = lowered(fused, mask, folder)
    return file, imported(file, SHAPE).eval(), OrtEngine(file)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("transformers")


@pytest.mark.parametrize(("fused", "mask"), NETS)
def test_no_answer_of_the_file_escapes(fused: bool, mask: Mask, folder: Path) -> None:
    file, twin, engine = ready(fused, mask, folder)
    assert refusal(file) is None
    x = images("test")[:2]
    rows = lead_rows(twin, x, torch.from_numpy(engine(x.numpy())).argmax(1))
    rng = generator(1, "points")
    asked: list[list[Certifier]] = [[IBP(), CrownIBP(), *([Crown()] if mask == "added" else [])], [IBP()]]
    for eps, inners in zip((0.002, 0.1), asked, strict=True):
        box = Box((x - eps).clamp(min=0), (x + eps).clamp(max=1))
        least, point = torch.full(rows.shape[:2], torch.inf), x
        for turn in range(12):
            least = torch.minimum(least, torch.einsum("brk,bk->br", rows, torch.from_numpy(engine(point.numpy()))))
            z = point.clone().requires_grad_()
            (grad,) = torch.autograd.grad(torch.einsum("brk,bk->br", rows, twin(z))[:, turn % rows.shape[1]].sum(), z)
            share = torch.rand(x.shape, generator=rng)
            within = box.low + (share.round() if turn % 2 else share) * (box.high - box.low)
            point = (within, torch.where(grad > 0, box.low, box.high))[turn % 3 > 0]
        with torch.no_grad():
            bounds = [Quantised(inner=inner).lower(twin, box, rows) for inner in inners]
        assert all(bool((bound <= least).all()) for bound in bounds)
        if eps == 0.002:
            assert min(int((bound.amin(1) > 0).sum()) for bound in bounds) > 0  # it proves something


@pytest.mark.parametrize(("fused", "mask"), NETS)
def test_codes_cost_little_and_equal_inputs_give_equal_bytes(
    fused: bool, mask: Mask, folder: Path, tmp_path: Path
) -> None:
    file, _, engine = ready(fused, mask, folder)
    x = images("test")
    with torch.no_grad():
        plain = transformer(fused, mask, True)(x)
    assert float((torch.from_numpy(engine(x.numpy())) - plain).abs().max()) < 0.1 * float(plain.std())
    assert lowered(fused, mask, tmp_path) == file


def test_scores_among_codes_are_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(_qdq, "_scores", lambda _: set())
    assert "softmax of codes" in (refusal(lowered(True, "none", tmp_path)) or "")
