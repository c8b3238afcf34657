"""Published sizes, block semantics and refusals of the builders."""

import pytest
import torch
from torch import nn

from stages.method import InputError
from stages.nn.arch import Arch
from stages.nn.builders.wrn import PRESETS, Block
from stages.nn.cost import Cost, cost
from tests.networks import arch, built, images, lived_in

_CIFAR = (3, 32, 32)


def _cost(builder: str, **options: object) -> Cost:
    with torch.device("meta"):
        return cost(Arch(builder=builder, options=options, input_shape=_CIFAR, classes=10).build(), _CIFAR)


@pytest.mark.parametrize(
    ("preset", "params", "gmacs"),
    [
        ("28-10", 36_479_194, 5.24),
        ("34-10", 46_160_474, 6.659),
        ("34-12", 66_457_818, 9.58),
        ("34-r", 68_116_698, 19.13),
        ("a1", 18_707_930, 5.08),
        ("a2", 38_323_482, 10.84),
        ("a4", 147_291_738, 40.38),
    ],
)
def test_wide_resnets_have_their_published_sizes(preset: str, params: int, gmacs: float) -> None:
    found = _cost("wrn", preset=preset)
    assert found.params == params
    assert found.macs == pytest.approx(gmacs * 1e9, rel=0.01)


@pytest.mark.parametrize(
    ("preset", "mparams", "gmacs"), [("s0", 0.872, 0.245), ("s1", 3.024, 0.884), ("s2", 6.736, 1.973)]
)
def test_edge_presets_have_the_sizes_of_the_rule(preset: str, mparams: float, gmacs: float) -> None:
    found = _cost("wrn", preset=preset)
    assert found.params == pytest.approx(mparams * 1e6, abs=500)
    assert found.macs == pytest.approx(gmacs * 1e9, rel=0.01)


@pytest.mark.parametrize("preset", PRESETS)
def test_wide_resnets_follow_the_formula_of_the_paper_notes(preset: str) -> None:
    depths, widths = PRESETS[preset]
    before, params, macs = 16, 27 * 16, 27 * 16 * 1024
    for depth, factor, base, area in zip(depths, widths, (16, 32, 64), (1024, 256, 64), strict=True):
        c = round(base * factor)
        kernels = 9 * before * c + 9 * c * c + (before * c if before != c else 0) + (depth - 1) * 18 * c * c
        params += kernels + 2 * before + 2 * c + (depth - 1) * 4 * c
        macs += area * kernels
        before = c
    found = _cost("wrn", preset=preset)
    assert found.params == params + 2 * before + 10 * before + 10
    assert found.macs == macs + 10 * before


def test_resnet_18_and_mobilenet_have_their_known_sizes() -> None:
    assert _cost("resnet").params == 11_173_962
    assert _cost("mobilenet").params == 2_236_682 == _cost("torchvision_zoo", name="mobilenet_v2").params


def test_small_cnn_counted_by_hand() -> None:
    net = built(arch("small_cnn", (1, 8, 8), width=2, hidden=5))
    found = cost(net, (1, 8, 8))
    # conv 1->2 and 2->4 with 4x4 kernels on 4x4 and 2x2 pixels, then 16 -> 5 -> 10.
    assert found.params == (2 * 16 + 2) + (4 * 2 * 16 + 4) + (16 * 5 + 5) + (5 * 10 + 10)
    assert found.macs == 16 * 2 * 16 + 4 * 4 * 2 * 16 + 16 * 5 + 5 * 10
    assert found.activations == 4 * (2 * 16 + 4 * 4 + 5 + 10)


def test_block_of_equal_shapes_adds_the_raw_input() -> None:
    block = lived_in(Block(8, 8, 1, nn.ReLU))
    nn.init.zeros_(block.conv2.weight)
    x = images(2, (8, 6, 6)) - 0.5
    assert torch.equal(block(x), x)


@pytest.mark.parametrize(("outputs", "stride"), [(12, 1), (12, 2), (8, 2)])
def test_block_of_other_shapes_projects_the_activated_input(outputs: int, stride: int) -> None:
    block = lived_in(Block(8, outputs, stride, nn.ReLU))
    nn.init.zeros_(block.conv2.weight)
    assert block.shortcut is not None
    x = images(2, (8, 6, 6)) - 0.5
    assert torch.equal(block(x), block.shortcut(torch.relu(block.bn1(x))))


def test_activation_is_an_option() -> None:
    kinds = {type(module) for module in built(arch("wrn", activation="silu")).modules()}
    assert nn.SiLU in kinds
    assert nn.ReLU not in kinds


@pytest.mark.parametrize(
    ("builder", "options", "message"),
    [
        ("small_cnn", {"width": 0}, "width: expected a whole number of at least 1, got 0"),
        ("small_cnn", {"width": "32"}, "width: expected a whole number of at least 1, got '32'"),
        ("mlp", {"hidden": [8, 2.5]}, r"hidden\[1\]: expected a whole number"),
        ("mlp", {"hidden": []}, "hidden: expected a list of numbers"),
        ("wrn", {"depths": [1, 1]}, "depths: expected 3 numbers, one per stage, got 2"),
        ("wrn", {"widths": [1, -1, 1]}, "widths: expected numbers above 0, got -1"),
        ("wrn", {"preset": "34-11"}, 'preset: expected one of 28-10, .*, got "34-11"'),
        ("wrn", {"preset": "s0", "depths": [2, 2, 2]}, "sets depths and widths"),
        ("wrn", {"activation": "gelu"}, 'activation: expected relu or silu, got "gelu"'),
        ("mobilenet", {"width": 0}, r"width: expected a factor within \(0, 8\], got 0"),
        ("torchvision_zoo", {"name": "resnet1"}, 'no classifier "resnet1"; did you mean "resnet18"'),
        ("torchvision_zoo", {"name": "alexnet"}, "alexnet cannot take images of 32x32"),
    ],
)
def test_bad_options_say_what_was_expected(builder: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Arch(builder=builder, options=options, input_shape=_CIFAR, classes=10).build()


def test_images_too_small_or_of_odd_channels_are_refused() -> None:
    with pytest.raises(InputError, match="sides of at least 4 pixels, got 3x8"):
        arch("small_cnn", (1, 3, 8)).build()
    with pytest.raises(InputError, match="images of 1 or 3 channels, got 4"):
        arch("torchvision_zoo", (4, 32, 32)).build()


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 9, 11), (3, 32, 32)])
def test_small_cnn_takes_any_small_image(shape: tuple[int, int, int]) -> None:
    assert built(arch("small_cnn", shape))(images(2, shape)).shape == (2, 10)
