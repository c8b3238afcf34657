"""Fewer operations, the same function: batch normalisation into the layer before it, GDWS into dense convolutions.

For attacks, evaluation and bounds, and before export. What trains and what is stored stays as it is.
"""

import copy
from typing import cast

import torch
from torch import Tensor, fx, nn

from stages.nn.layers.gdws_conv import GDWSConv, folded

_Affine = nn.Conv2d | nn.Linear | GDWSConv
_Norm = nn.BatchNorm1d | nn.BatchNorm2d


def fold(net: nn.Module) -> nn.Module:
    """A copy of `net` in eval mode, equal to it to rounding, whose foldable batch normalisations are identities.

        W' = W gamma / sqrt(var + eps),   b' = (b - mean) gamma / sqrt(var + eps) + beta     (in float64)

    Foldable is one whose only input is a convolution, linear or GDWS layer that feeds nothing else; the normalisations
    before the convolutions of a pre-activation network therefore stay. Module names are unchanged. A network whose
    forward cannot be traced symbolically (it branches on values, say) comes back unfolded.
    """
    twin = copy.deepcopy(net).eval()
    for before, norm in _pairs(twin):
        _absorb(cast(_Affine, twin.get_submodule(before)), cast(_Norm, twin.get_submodule(norm)))
        twin.set_submodule(norm, nn.Identity())
    return twin


def dense(net: nn.Module) -> nn.Module:
    """A copy of `net` whose GDWS layers are dense convolutions of the same function where gradients are quicker so."""
    twin = copy.deepcopy(net)
    if isinstance(twin, GDWSConv):
        return folded(twin) if twin.dense_is_quicker else twin
    for path, module in list(twin.named_modules()):
        if isinstance(module, GDWSConv) and module.dense_is_quicker:
            twin.set_submodule(path, folded(module))
    return twin


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, GDWSConv) or super().is_leaf_module(m, module_qualified_name)


def _pairs(net: nn.Module) -> list[tuple[str, str]]:
    """Paths of an affine layer and of the normalisation that alone consumes it, each of them called once."""
    try:
        graph = _Tracer().trace(net)
    except (fx.proxy.TraceError, TypeError, ValueError, RuntimeError, AttributeError):
        return []
    calls = [node for node in graph.nodes if node.op == "call_module"]
    once = {node.target for node in calls if sum(other.target == node.target for other in calls) == 1}
    pairs = []
    for node in calls:
        before = node.args[0] if len(node.args) == 1 else None
        if not isinstance(before, fx.Node) or before.op != "call_module" or len(before.users) != 1:
            continue
        affine, norm = net.get_submodule(str(before.target)), net.get_submodule(str(node.target))
        if {before.target, node.target} <= once and _fits(affine, norm):
            pairs.append((str(before.target), str(node.target)))
    return pairs


def _fits(affine: nn.Module, norm: nn.Module) -> bool:
    if not isinstance(norm, _Norm) or norm.running_mean is None:
        return False
    return isinstance(affine, nn.Linear if isinstance(norm, nn.BatchNorm1d) else nn.Conv2d | GDWSConv)


def _absorb(affine: _Affine, norm: _Norm) -> None:
    mean, var = cast(Tensor, norm.running_mean).double(), cast(Tensor, norm.running_var).double()
    gamma = torch.ones_like(mean) if norm.weight is None else norm.weight.detach().double()
    beta = torch.zeros_like(mean) if norm.bias is None else norm.bias.detach().double()
    scale = gamma / torch.sqrt(var + norm.eps)
    bias = torch.zeros_like(mean) if affine.bias is None else affine.bias.detach().double()
    name = "pointwise" if isinstance(affine, GDWSConv) else "weight"
    weight = affine.get_parameter(name)
    scaled = weight.detach().double() * scale.view(-1, *[1] * (weight.dim() - 1))
    setattr(affine, name, nn.Parameter(scaled.to(weight.dtype), weight.requires_grad))
    affine.bias = nn.Parameter(((bias - mean) * scale + beta).to(weight.dtype), weight.requires_grad)
