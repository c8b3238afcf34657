"""What a network costs for one image: parameters, multiply-accumulates and activation bytes; nothing is computed."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from stages.method import Value

_BYTES = 4
_aten = torch.ops.aten


class Cost(Value):
    """Of one image, batch normalisation not folded.

    params: scalars in parameters (buffers such as running statistics are not counted).
    macs: multiply-accumulates of convolutions and matrix products; element-wise work and bias additions are free.
    activations: bytes, as float32, of the outputs of those same operations (Radosavovic et al. 2020, section 3.1,
    who find that they predict run time better than operations do).
    """

    params: int
    macs: int
    activations: int


def cost(net: nn.Module, input_shape: tuple[int, int, int]) -> Cost:
    """Run a copy of `net` on shapes alone. Counts what is executed, whichever module or function executes it."""
    shadow = copy.deepcopy(net).to("meta").eval()
    counter = _Counter()
    with torch.no_grad(), counter:
        shadow(torch.empty((1, *input_shape), device="meta"))
    params = sum(parameter.numel() for parameter in net.parameters())
    return Cost(params=params, macs=counter.macs, activations=counter.outputs * _BYTES)


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own __init_subclass__ is untyped
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.macs = 0
        self.outputs = 0

    def __torch_dispatch__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        del types
        out = func(*args, **(kwargs or {}))
        rule = _MACS.get(func.overloadpacket)
        if rule is not None:
            first = out if isinstance(out, Tensor) else out[0]
            self.macs += rule(args, first)
            self.outputs += first.numel()
        return out


def _convolution(args: tuple[Any, ...], out: Tensor) -> int:
    # Weights are [M, C / groups, K, K] and every output element sees one row of them; transposed convolutions are
    # [C, M / groups, K, K] and every input element is spread over one row.
    weight, spread = args[1], args[0] if args[6] else out
    return int(spread.numel() * weight[0].numel())


def _product(left: int) -> Callable[[tuple[Any, ...], Tensor], int]:
    return lambda args, out: int(out.numel() * args[left].shape[-1])


def _attention(args: tuple[Any, ...], out: Tensor) -> int:
    query, key = args[0], args[1]
    return int(query.numel() * key.shape[-2] + out.numel() * key.shape[-2])


_MACS: dict[Any, Callable[[tuple[Any, ...], Tensor], int]] = {
    _aten.convolution: _convolution,
    _aten.mm: _product(0),
    _aten.bmm: _product(0),
    _aten.addmm: _product(1),
    _aten.baddbmm: _product(1),
    _aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    _aten._scaled_dot_product_flash_attention: _attention,
    _aten._scaled_dot_product_efficient_attention: _attention,
    _aten._scaled_dot_product_fused_attention_overrideable: _attention,
}
