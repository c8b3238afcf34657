"""Generalised depthwise-separable convolution: several depthwise kernels per input channel, then a 1x1 convolution.

    Y = bias + sum_c sum_{k <= g_c} p_{c,k} (D_{c,k} * X_c)

with D_{c,k} a K x K kernel and p_{c,k} a column of length M. It equals the dense convolution whose input-channel slices
are Q_c = sum_k p_{c,k} vec(D_{c,k})^T, so g_c is a rank budget for slice c. Source: Dbouk and Shanbhag 2021.

Atoms (c, k) are kept as a list `channels` of length G = sum_c g_c that names the input channel of each. Three forms
compute the same function and differ in the graph that is exported:

    gather   Gather(channels) -> Conv(groups=G) -> Conv 1x1
    sum      one branch per level k, over the channels with g_c > k: depthwise, own 1x1; branches added
    concat   the same depthwise branches, concatenated before one 1x1

A gather over all channels in order is left out. A grouped convolution with a depth multiplier is never emitted: it
leaves the depthwise kernels of the runtimes, which want one channel in and one out per group.

Where a gradient is asked for, and G is not small, the layer computes the dense form from its atoms: depthwise
convolutions have slow backward passes, and G intermediate images to keep. The parameters, and their gradients, are
those of the atoms all the same. `stages/nn/_separable.py` has the rule.
"""

from collections.abc import Sequence
from math import prod
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stages.method import InputError
from stages.nn._separable import dense_is_quicker

Form = Literal["gather", "sum", "concat"]


class GDWSConv(nn.Module):
    """depthwise [G, 1, K, K], pointwise [M, G, 1, 1], bias [M] or None; images [B, C, H, W] -> [B, M, H', W'].

    Stride, padding, padding mode and dilation are those of `dense` and act in the depthwise part. G = 0 is legal: the
    layer is then its bias. Weights start at zero; `like` initialises, `assemble` and `fit` fill them.
    """

    depthwise: nn.Parameter
    pointwise: nn.Parameter
    bias: nn.Parameter | None
    channels: Tensor
    nothing: Tensor

    def __init__(self, dense: nn.Conv2d, channels: Sequence[int] | Tensor, form: Form = "gather") -> None:
        super().__init__()
        _separable(dense)
        if form not in get_args(Form):
            raise InputError(f'gdws_conv: expected a form of {", ".join(get_args(Form))}, got "{form}"')
        atoms = torch.as_tensor(channels, dtype=torch.int64).flatten()
        if atoms.numel() and not 0 <= int(atoms.min()) <= int(atoms.max()) < dense.in_channels:
            raise InputError(
                f"gdws_conv: expected channels within 0..{dense.in_channels - 1}, "
                f"got {int(atoms.min())}..{int(atoms.max())}"
            )
        self.form = form
        self._atoms = atoms.numel()
        self.in_channels, self.out_channels = dense.in_channels, dense.out_channels
        self.kernel_size, self.stride, self.dilation = dense.kernel_size, dense.stride, dense.dilation
        self.padding, self.padding_mode = dense.padding, dense.padding_mode
        self._pads = tuple(dense._reversed_padding_repeated_twice)
        zeros = dense.weight.new_zeros
        self.depthwise = nn.Parameter(zeros(atoms.numel(), 1, *dense.kernel_size))
        self.pointwise = nn.Parameter(zeros(dense.out_channels, atoms.numel(), 1, 1))
        self.bias = None if dense.bias is None else nn.Parameter(torch.zeros_like(dense.bias))
        # Indices are not persistent: the rewrite that rebuilds this layer carries the list.
        self.register_buffer("channels", atoms.to(dense.weight.device), persistent=False)
        if not atoms.numel():
            self.register_buffer("nothing", zeros(dense.out_channels, 1, *dense.kernel_size), persistent=False)
        self._branches = _levels(atoms.tolist()) if form != "gather" else [list(range(atoms.numel()))]
        for k, branch in enumerate(self._branches):
            self._index(f"atoms{k}", branch, atoms.numel())
            self._index(f"inputs{k}", atoms[branch].tolist(), dense.in_channels)

    def _index(self, name: str, positions: list[int], size: int) -> None:
        """A buffer of positions, or None where they are all of them in order and selecting would be a copy."""
        whole = positions == list(range(size))
        self.register_buffer(name, None if whole else self.channels.new_tensor(positions), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        pads: str | int | tuple[int, ...] = self.padding
        if self.padding_mode != "zeros":
            x, pads = F.pad(x, self._pads, mode=self.padding_mode), 0
        if not self._atoms:
            return self._constant(x, pads)
        if (
            self.dense_is_quicker
            and torch.is_grad_enabled()
            and any(t.requires_grad for t in (x, self.depthwise, self.pointwise))
        ):
            return F.conv2d(x, self._dense(self.depthwise.dtype), self.bias, self.stride, pads, self.dilation)
        return self._separably(x, pads)

    @property
    def dense_is_quicker(self) -> bool:
        """Under gradients; without any, the separable form is."""
        return dense_is_quicker(self.in_channels, self.out_channels, self._atoms, prod(self.kernel_size))

    def _dense(self, dtype: torch.dtype) -> Tensor:
        """Q [M, C, K, K], Q_c = sum_k p_{c,k} vec(D_{c,k})^T, computed in `dtype`."""
        atoms = self.pointwise.to(dtype) * self.depthwise.to(dtype).transpose(0, 1)
        weight = atoms.new_zeros(self.out_channels, self.in_channels, *self.kernel_size)
        return weight.index_add(1, self.channels, atoms)

    def _separably(self, x: Tensor, pads: str | int | tuple[int, ...]) -> Tensor:
        branches, columns = [], []
        for k in range(len(self._branches)):
            kernels = _select(self.depthwise, 0, getattr(self, f"atoms{k}"))
            inputs = _select(x, 1, getattr(self, f"inputs{k}"))
            branches.append(F.conv2d(inputs, kernels, None, self.stride, pads, self.dilation, groups=kernels.shape[0]))
            columns.append(_select(self.pointwise, 1, getattr(self, f"atoms{k}")))
        if self.form == "concat" and len(branches) > 1:
            branches, columns = [torch.cat(branches, 1)], [torch.cat(columns, 1)]
        y = F.conv2d(branches[0], columns[0], self.bias)
        for branch, column in zip(branches[1:], columns[1:], strict=True):
            y = y + F.conv2d(branch, column)
        return y

    def _constant(self, x: Tensor, pads: str | int | tuple[int, ...]) -> Tensor:
        # A zero kernel on one channel gives the output's height and width, and keeps the gradient defined.
        nothing = F.conv2d(x[:, :1], self.nothing[:1], None, self.stride, pads, self.dilation)
        bias = self.nothing[:, :1, :1, :1] if self.bias is None else self.bias.view(-1, 1, 1, 1)
        return nothing + bias.transpose(0, 1)

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, kernels={self._atoms}, form={self.form}"


def like(old: nn.Module, channels: Sequence[int], form: Form = "gather") -> GDWSConv:
    """The layer that replaces `old` with one atom per entry of `channels`, initialised as torch's convolutions are."""
    layer = GDWSConv(_separable(old), channels, form)
    for weight in (layer.depthwise, layer.pointwise):
        if weight.numel():
            nn.init.kaiming_uniform_(weight, a=5**0.5)
    return layer


def assemble(
    old: nn.Module, channels: Sequence[int] | Tensor, depthwise: Tensor, pointwise: Tensor, form: Form = "gather"
) -> GDWSConv:
    """The layer with given atoms: depthwise [G, 1, K, K], pointwise [M, G, 1, 1]; the bias is that of `old`."""
    dense = _separable(old)
    layer = GDWSConv(dense, channels, form)
    with torch.no_grad():
        layer.depthwise.copy_(depthwise.view_as(layer.depthwise))
        layer.pointwise.copy_(pointwise.view_as(layer.pointwise))
        if layer.bias is not None and dense.bias is not None:
            layer.bias.copy_(dense.bias)
    return layer


def fit(old: nn.Module, kernels: Sequence[int], form: Form = "gather") -> GDWSConv:
    """The nearest layer, in Frobenius norm, with kernels[c] depthwise kernels for input channel c.

    Truncated singular value decomposition of each slice W_c [M, K^2] in float64: D_{c,k} = v_k (unit norm) and
    p_{c,k} = sigma_k u_k, the gauge of the authors' code; signs are fixed by making the largest entry of v_k positive.
    Raises `InputError` unless 0 <= kernels[c] <= min(M, K^2).
    """
    dense = _separable(old)
    most = min(dense.out_channels, dense.weight[0, 0].numel())
    if len(kernels) != dense.in_channels or not all(0 <= g <= most for g in kernels):
        raise InputError(
            f"gdws_conv: expected {dense.in_channels} counts within 0..{most}, got {len(kernels)}: {list(kernels)[:8]}"
        )
    slices = dense.weight.detach().double().flatten(2).transpose(0, 1)
    u, sigma, v = torch.linalg.svd(slices, full_matrices=False)
    lead = v.gather(2, v.abs().argmax(2, keepdim=True)).sign()
    columns, rows = u * sigma.unsqueeze(1) * lead.transpose(1, 2), v * lead
    atoms = [(c, k) for c, g in enumerate(kernels) for k in range(g)]
    channels = [c for c, _ in atoms]
    ranks = [k for _, k in atoms]
    return assemble(dense, channels, rows[channels, ranks], columns[channels, :, ranks].T, form)


def folded(layer: GDWSConv) -> nn.Conv2d:
    """The dense convolution of the same function; faster where gradients or bounds are wanted."""
    with torch.no_grad():
        weight = layer._dense(torch.float64)
        # Built without storage, because initialising weights would move torch's global generator.
        dense = nn.Conv2d(
            layer.in_channels,
            layer.out_channels,
            layer.kernel_size,  # type: ignore[arg-type]  # torch types its own attributes as tuples of any length
            stride=layer.stride,  # type: ignore[arg-type]
            padding=layer.padding,  # type: ignore[arg-type]
            dilation=layer.dilation,  # type: ignore[arg-type]
            bias=layer.bias is not None,
            padding_mode=layer.padding_mode,
            device="meta",
        )
        dense.weight = nn.Parameter(weight.to(layer.depthwise.dtype))
        dense.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().clone())
    return dense.train(layer.training)


def _separable(old: nn.Module) -> nn.Conv2d:
    if not isinstance(old, nn.Conv2d):
        raise InputError(f"gdws_conv: expected a Conv2d to replace, got {type(old).__name__}")
    if old.groups != 1:
        raise InputError(f"gdws_conv: expected a convolution with 1 group, got {old.groups}; leave it as it is")
    return old


def _select(values: Tensor, dim: int, positions: Tensor | None) -> Tensor:
    return values if positions is None else values.index_select(dim, positions)


def _levels(channels: Sequence[int]) -> list[list[int]]:
    """Positions of the first atom of every channel, of the second, and so on, each ordered by channel."""
    seen: dict[int, int] = {}
    levels: list[list[int]] = []
    for position in sorted(range(len(channels)), key=lambda i: channels[i]):
        k = seen.get(channels[position], 0)
        seen[channels[position]] = k + 1
        if k == len(levels):
            levels.append([])
        levels[k].append(position)
    return levels
