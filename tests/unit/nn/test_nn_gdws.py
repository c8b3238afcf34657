"""The closed forms of GDWS layers (papers: Dbouk and Shanbhag 2021)."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stages import seeding
from stages.method import InputError
from stages.nn.cost import cost
from stages.nn.fold import dense
from stages.nn.layers.gdws_conv import Form, GDWSConv, assemble, fit, folded, like

_FORMS: tuple[Form, ...] = ("gather", "sum", "concat")
# C, M, K and how the kernel moves: M above, below and far below K^2.
_LAYERS = [
    (5, 16, 3, {"stride": 2, "padding": 1}),
    (4, 3, 3, {"padding": 2, "dilation": 2}),
    (3, 20, 4, {"padding": "same", "padding_mode": "reflect"}),
    (6, 5, 3, {"padding": (1, 0), "bias": False, "padding_mode": "circular"}),
    (2, 7, (3, 1), {"padding": (1, 0)}),
]


def _conv(c: int, m: int, k: object, options: dict[str, object]) -> nn.Conv2d:
    with torch.random.fork_rng(devices=[]):
        seeding.deterministic(0)
        return nn.Conv2d(c, m, k, **options)  # type: ignore[arg-type]


def _x(channels: int) -> Tensor:
    return torch.rand(2, channels, 11, 12, generator=seeding.generator(0, "x"))


def _outputs(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """With the separable form, which answers without gradients, and with the one that answers where there are some."""
    with torch.no_grad():
        separable = layer(x)
    return separable, layer(x)


@pytest.mark.parametrize(("c", "m", "k", "options"), _LAYERS)
@pytest.mark.parametrize("form", _FORMS)
def test_full_rank_is_the_dense_layer(c: int, m: int, k: object, options: dict[str, object], form: Form) -> None:
    conv = _conv(c, m, k, options)
    full = fit(conv, [min(m, conv.weight[0, 0].numel())] * c, form)
    for y in _outputs(full, _x(c)):
        torch.testing.assert_close(y, conv(_x(c)), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(folded(full).weight, conv.weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("c", "m", "k", "options"), _LAYERS)
def test_the_three_forms_and_the_folded_one_agree(c: int, m: int, k: object, options: dict[str, object]) -> None:
    conv = _conv(c, m, k, options)
    most = min(m, conv.weight[0, 0].numel())
    for kernels in ([i % (most + 1) for i in range(c)], [1] * c, [0] * c, [0] * (c - 1) + [most]):
        layers = [fit(conv, kernels, form) for form in _FORMS]
        expected = folded(layers[0])(_x(c))
        for layer in layers:
            for y in _outputs(layer, _x(c)):
                torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("c", "m", "k", "options"), _LAYERS)
@pytest.mark.parametrize("form", _FORMS)
def test_gradients_are_those_of_the_atoms(c: int, m: int, k: object, options: dict[str, object], form: Form) -> None:
    conv = _conv(c, m, k, options).double()
    layer = fit(conv, [i % 3 for i in range(c)], form)
    inputs = [_x(c).double().requires_grad_(), *layer.parameters()]
    found = torch.autograd.grad(layer(inputs[0]).square().sum(), inputs)
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = F.pad(inputs[0], conv._reversed_padding_repeated_twice, mode)
    # The definition, atom by atom.
    y = sum(
        p.view(1, -1, 1, 1) * F.conv2d(x[:, i : i + 1], d.unsqueeze(0), None, conv.stride, 0, conv.dilation)
        for i, d, p in zip(layer.channels.tolist(), layer.depthwise, layer.pointwise[:, :, 0, 0].T, strict=True)
    )
    assert isinstance(y, Tensor)
    y = y if layer.bias is None else y + layer.bias.view(1, -1, 1, 1)
    torch.testing.assert_close(layer(inputs[0]), y, rtol=1e-9, atol=1e-9)
    expected = torch.autograd.grad(y.square().sum(), inputs)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_error_is_the_sum_of_the_dropped_squared_singular_values() -> None:
    conv = _conv(5, 16, 3, {"padding": 1}).double()
    kernels = [0, 3, 1, 9, 5]
    sigma = torch.linalg.svdvals(conv.weight.detach().flatten(2).transpose(0, 1))
    dropped = sum(float(sigma[c, g:].square().sum()) for c, g in enumerate(kernels))
    difference = folded(fit(conv, kernels)).weight - conv.weight
    assert float(difference.detach().square().sum()) == pytest.approx(dropped, rel=1e-9)


def test_kernels_have_unit_norm_and_a_fixed_sign() -> None:
    layer = fit(_conv(5, 16, 3, {}), [2] * 5)
    kernels = layer.depthwise.detach().flatten(1)
    torch.testing.assert_close(kernels.norm(dim=1), torch.ones(10), rtol=1e-5, atol=1e-6)
    assert (kernels.gather(1, kernels.abs().argmax(1, keepdim=True)) > 0).all()


def test_a_slice_of_known_rank_is_recovered_with_as_many_kernels() -> None:
    conv = _conv(3, 8, 3, {"padding": 1, "bias": False})
    rng = seeding.generator(0, "ranks")
    with torch.no_grad():
        for c, rank in enumerate((1, 2, 0)):
            left, right = torch.randn(8, rank, generator=rng), torch.randn(rank, 9, generator=rng)
            conv.weight[:, c] = (left @ right).view(8, 3, 3)
    torch.testing.assert_close(fit(conv, [1, 2, 0])(_x(3)), conv(_x(3)), rtol=1e-4, atol=1e-5)


def test_without_kernels_the_layer_is_its_bias_and_keeps_its_gradient() -> None:
    conv = _conv(4, 6, 3, {"stride": 2})
    x = _x(4).requires_grad_()
    y = fit(conv, [0] * 4)(x)
    assert conv.bias is not None
    assert torch.equal(y, conv.bias.detach().view(1, -1, 1, 1).expand(conv(x).shape))
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert not gradient.any()
    plain = _conv(4, 6, 3, {"bias": False})
    assert torch.equal(fit(plain, [0] * 4)(x), torch.zeros_like(plain(x)))


def test_the_gauge_between_kernel_and_column_is_free() -> None:
    layer = fit(_conv(5, 16, 3, {"padding": 1}), [2] * 5)
    gauge = torch.rand(10, generator=seeding.generator(0, "gauge")) + 0.5
    other = assemble(
        _conv(5, 16, 3, {"padding": 1}),
        layer.channels,
        layer.depthwise * gauge.view(-1, 1, 1, 1),
        layer.pointwise / gauge.view(1, -1, 1, 1),
    )
    torch.testing.assert_close(other(_x(5)), layer(_x(5)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", _FORMS)
def test_costs_are_those_of_the_formula(form: Form) -> None:
    conv = _conv(5, 16, 3, {"padding": 1})
    kernels = [1, 2, 3, 0, 2]
    layer, pixels, g = fit(conv, kernels, form), 11 * 12, 8
    assert cost(layer, (5, 11, 12)).macs == pixels * g * (9 + 16)
    assert cost(layer, (5, 11, 12)).params == g * (9 + 16) + 16
    assert cost(dense(layer), (5, 11, 12)).macs == pixels * 5 * 9 * 16


def test_one_kernel_each_needs_no_gather() -> None:
    indices = [dict(like(_conv(5, 16, 3, {}), atoms).named_buffers()) for atoms in (range(5), [0, 1, 3])]
    assert ["inputs0" in found for found in indices] == [False, True]


def test_fitting_and_folding_leave_the_global_generator_alone() -> None:
    conv = _conv(5, 16, 3, {})
    before = torch.random.get_rng_state()
    folded(fit(conv, [2] * 5))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(InputError, match="expected a convolution with 1 group, got 2"):
        like(nn.Conv2d(4, 4, 3, groups=2), [0])
    with pytest.raises(InputError, match=r"expected channels within 0\.\.4, got 0\.\.5"):
        like(_conv(5, 16, 3, {}), [0, 5])
    with pytest.raises(InputError, match=r"expected 5 counts within 0\.\.9"):
        fit(_conv(5, 16, 3, {}), [10] * 5)
    with pytest.raises(InputError, match="expected a form of gather, sum, concat"):
        GDWSConv(_conv(5, 16, 3, {}), [0], "multiplier")  # type: ignore[arg-type]
