"""Bounds of int8 files against what onnxruntime answers for the very file, and where codes flip."""

from functools import cache
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from stages.bounds.base import Box, Certifier, lead_rows
from stages.bounds.crown import Crown
from stages.bounds.crown_ibp import CrownIBP
from stages.bounds.ibp import IBP
from stages.bounds.quantised import Quantised
from stages.method import InputError
from stages.nn.imported import imported
from stages.nn.to_onnx import export
from stages.seeding import generator
from targets.passes import fp16, qdq_int8_cpu, qdq_int8_trt
from targets.passes.base import Kit
from targets.runtime.ort import OrtEngine
from tests.trained import digits, digits_model

RECIPES = {"cpu": qdq_int8_cpu, "trt": qdq_int8_trt}


@cache
def lowered(folder: Path, recipe: str) -> Path:
    plain, path = folder / "plain.onnx", folder / f"{recipe}.onnx"
    export(digits_model(recipe="at").net, (1, 8, 8), plain)
    images = digits().train.floats(slice(0, 64)).numpy()
    lower = fp16.lower if recipe == "fp16" else RECIPES[recipe].lower
    onnx.save(lower(onnx.load(plain), {}, Kit(calibration=images, work=folder)), path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("quantised")


def images() -> tuple[Tensor, Tensor]:
    test = digits().test
    return test.floats(slice(0, 24)), test.labels[:24]


@pytest.mark.parametrize("inner", [IBP(), CrownIBP(), Crown()], ids=lambda inner: inner.kind)
@pytest.mark.parametrize("eps", [0.0, 0.004, 0.03])
@pytest.mark.parametrize("recipe", RECIPES)
def test_no_point_of_the_box_gives_the_file_a_margin_below_the_bound(
    recipe: str, eps: float, inner: Certifier, folder: Path
) -> None:
    """Random points and corners, and the climb against the twin's gradient, all answered by onnxruntime itself."""
    path = lowered(folder, recipe)
    twin, engine = imported(path).eval(), OrtEngine(path)
    x, y = images()
    box, rows = Box((x - eps).clamp(min=0), (x + eps).clamp(max=1)), lead_rows(twin, x, y)
    bound = Quantised(inner=inner).lower(twin, box, rows).detach()
    rng, point = generator(0, recipe), x.clone()
    for turn in range(12):
        leads = torch.einsum("brk,bk->br", rows, torch.from_numpy(engine(point.numpy())))
        assert bool((leads >= bound).all())
        z = point.clone().requires_grad_()
        (grad,) = torch.autograd.grad(torch.einsum("brk,bk->br", rows, twin(z)).amin(1).sum(), z)
        corner = torch.where(torch.rand(x.shape, generator=rng) < 0.5, box.low, box.high)
        within = box.low + torch.rand(x.shape, generator=rng) * (box.high - box.low)
        point = (corner, within, torch.where(grad > 0, box.low, box.high))[turn % 3]
    if eps == 0.004:
        assert int((bound.amin(1) > 0).sum()) > 0  # it proves something


def test_at_a_point_it_gives_up_no_more_than_codes_at_ties(folder: Path) -> None:
    x, y = images()
    path = lowered(folder, "cpu")
    twin = imported(path).eval()
    rows = lead_rows(twin, x, y)
    answers = torch.einsum("brk,bk->br", rows, torch.from_numpy(OrtEngine(path)(x.numpy()))).amin(1)
    given_up = answers - Quantised().lower(twin, Box(x, x), rows).detach().amin(1)
    assert float(given_up.min()) >= 0
    assert float(given_up.mean()) < 0.1 * float(answers.abs().mean())


class Code(nn.Module):
    """round(255 x - 127.5 + nothing): a pixel whose code is a tie at x = 0.5."""

    def forward(self, x: Tensor) -> Tensor:
        code = (x.flatten(1) * 255 - 127.0).clamp(-128, 127).round()
        return torch.cat([code, 0.0 * code], 1)


def test_a_code_at_a_tie_may_fall_either_way_and_one_far_from_it_may_not() -> None:
    rows = torch.tensor([[[1.0, 0.0], [-1.0, 0.0]]])
    for pixel, low, high in ((0.5, 0.0, 1.0), (127.3 / 255, 0.0, 0.0), (128.7 / 255, 2.0, 2.0)):
        x = torch.full((1, 1, 1, 1), pixel)
        down, up = Quantised().lower(Code(), Box(x, x), rows)[0].tolist()
        assert down <= low <= high <= -up
        assert low - down < 1e-3
        assert -up - high < 1e-3


def test_what_it_does_not_cover_is_refused(folder: Path) -> None:
    x, y = images()
    twin = imported(lowered(folder, "cpu")).eval()
    rows = lead_rows(twin, x, y)
    with pytest.raises(InputError, match="codes flip by rounding"):
        Quantised(inner=IBP(arithmetic="real")).lower(twin, Box(x, x), rows)
    half = imported(lowered(folder, "fp16")).eval()
    with pytest.raises(InputError, match="half precision"):
        Quantised().lower(half, Box(x, x), rows)


def test_a_float_network_is_bounded_as_by_the_inner_one() -> None:
    x, y = images()
    net = digits_model(recipe="at").net.eval()
    box, rows = Box(x, x), lead_rows(net, x, y)
    assert np.array_equal(Quantised().lower(net, box, rows).detach(), CrownIBP().lower(net, box, rows).detach())
