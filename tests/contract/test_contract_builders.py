"""What every builder promises; the folder listing is the list, so a new file cannot escape."""

import json
from pathlib import Path

import onnx
import pytest
import torch

from stages import seeding
from stages.method import InputError, names
from stages.nn import checkpoint
from stages.nn.arch import BUILDERS, Arch, Model
from stages.nn.cost import cost
from stages.nn.fold import fold
from stages.nn.imported import imported
from stages.nn.to_onnx import export
from tests.networks import arch, built, every_builder, images, onnx_logits

ALL = pytest.mark.parametrize("wanted", every_builder(), ids=lambda wanted: wanted.builder)


def test_the_listing_is_not_empty() -> None:
    assert {"mlp", "small_cnn", "resnet", "wrn", "mobilenet", "torchvision_zoo"} <= set(names(BUILDERS))


@ALL
def test_rebuilds_from_json_and_weights_to_the_same_bits(wanted: Arch, tmp_path: Path) -> None:
    net = built(wanted)
    checkpoint.save(Model(wanted, net), tmp_path)
    again = checkpoint.load(tmp_path / "arch.json", tmp_path / "weights.safetensors")
    assert again.arch == wanted == Arch.load(json.loads(json.dumps(wanted.dump())))
    x = images(3, wanted.input_shape)
    assert torch.equal(again.net(x), net(x))
    assert net(x).shape == (3, wanted.classes)
    assert torch.isfinite(net(x)).all()


@ALL
def test_the_same_seed_builds_the_same_weights_under_the_same_names(wanted: Arch) -> None:
    one, two, other = built(wanted).state_dict(), built(wanted).state_dict(), built(wanted, seed=1).state_dict()
    assert list(one) == list(two)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


@ALL
def test_normalisation_lies_inside(wanted: Arch) -> None:
    net = built(wanted)
    plain = built(wanted.model_copy(update={"mean": (0.0,), "std": (1.0,)}))
    x = images(2, wanted.input_shape)
    torch.testing.assert_close(net(x), plain((x - 0.4) / 0.2), rtol=1e-4, atol=1e-5)


@ALL
def test_gradients_reach_the_pixels(wanted: Arch) -> None:
    x = images(2, wanted.input_shape).requires_grad_()
    (gradient,) = torch.autograd.grad(built(wanted)(x).square().sum(), x)
    assert torch.isfinite(gradient).all()
    assert (gradient != 0).float().mean() > 0.5


@ALL
def test_costs_are_counted(wanted: Arch) -> None:
    net = built(wanted)
    found = cost(net, wanted.input_shape)
    assert found.params == sum(parameter.numel() for parameter in net.parameters())
    assert found.macs > 0
    assert found.activations >= 4 * wanted.classes


@ALL
def test_export_fold_and_twin_agree_with_torch(wanted: Arch, tmp_path: Path) -> None:
    net = built(wanted)
    path = tmp_path / "model.onnx"
    export(net, wanted.input_shape, path)
    graph = path.read_bytes()
    twin, folded = imported(path), fold(net)
    for count in (1, 2, 7, 64):
        x = images(count, wanted.input_shape, seed=count)
        with torch.no_grad():
            expected = net(x)
            torch.testing.assert_close(onnx_logits(graph, x), expected, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(twin(x), expected, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(folded(x), expected, rtol=1e-5, atol=1e-5)
    dims = onnx.load(path).graph.input[0].type.tensor_type.shape.dim
    assert dims[0].dim_param == "batch"
    assert [dim.dim_value for dim in dims][1:] == list(wanted.input_shape)


@ALL
def test_options_that_do_not_fit_are_refused(wanted: Arch) -> None:
    with pytest.raises(InputError, match="no_such_option: unknown key; there is"):
        wanted.model_copy(update={"options": {"no_such_option": 1}}).build()
    with pytest.raises(InputError, match="mean: expected"):
        wanted.model_copy(update={"mean": (0.1, 0.2)}).build()
    with pytest.raises(InputError, match="classes: expected at least 2"):
        wanted.model_copy(update={"classes": 1}).build()


def test_digits_fit_where_the_builder_says_so() -> None:
    for name in ("mlp", "small_cnn", "resnet", "wrn", "mobilenet", "torchvision_zoo"):
        wanted = arch(name, (1, 8, 8))
        with torch.random.fork_rng(devices=[]):
            seeding.deterministic(0)
            assert wanted.build()(images(2, (1, 8, 8))).shape == (2, 10)
