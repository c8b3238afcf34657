"""The same kind of layer with other channel counts: what channel pruning leaves behind."""

from typing import Any

from torch import nn

from stages.method import InputError
from stages.nn.arch import Rewrite

_KINDS = (nn.Conv2d, nn.Linear, nn.BatchNorm1d, nn.BatchNorm2d, nn.LayerNorm)


def like(old: nn.Module, inputs: int | None = None, outputs: int | None = None, groups: int | None = None) -> nn.Module:
    """A convolution, linear layer or normalisation as `old`, with `inputs` and `outputs` channels (None: as before).

    A depthwise convolution stays depthwise; other grouped ones keep their groups unless `groups` says otherwise.
    Normalisations have one channel count, `outputs`. Weights are loaded later.
    """
    if isinstance(old, nn.Conv2d):
        return _conv(old, inputs or old.in_channels, outputs or old.out_channels, groups)
    if groups is not None:
        raise InputError(f"resized: {type(old).__name__} has no groups")
    if isinstance(old, nn.Linear):
        return nn.Linear(inputs or old.in_features, outputs or old.out_features, old.bias is not None)
    if inputs is not None:
        raise InputError(f"resized: {type(old).__name__} takes outputs only")
    if isinstance(old, nn.BatchNorm1d | nn.BatchNorm2d):
        channels = outputs or old.num_features
        return type(old)(channels, old.eps, old.momentum, old.affine, old.track_running_stats)
    if isinstance(old, nn.LayerNorm) and len(old.normalized_shape) == 1:
        return nn.LayerNorm(outputs or old.normalized_shape[0], old.eps, old.elementwise_affine, old.bias is not None)
    raise InputError(f"resized: expected one of {', '.join(k.__name__ for k in _KINDS)}, got {type(old).__name__}")


def changes(before: nn.Module, after: nn.Module) -> tuple[Rewrite, ...]:
    """The rewrites that turn the shapes of `before` into those of `after`; module names are the same in both.

    Raises `InputError` where a module vanished or changed its kind, or a parameter outside these layers its shape.
    """
    found = []
    for path, old in before.named_modules():
        try:
            new = after.get_submodule(path)
        except AttributeError:
            raise InputError(f'resized: the changed network has no module at "{path}"') from None
        if type(old) is not type(new):
            raise InputError(f'resized: "{path}" was {type(old).__name__} and is now {type(new).__name__}')
        sizes = {name: (p.shape, new.get_parameter(name).shape) for name, p in old.named_parameters(recurse=False)}
        if all(was == now for was, now in sizes.values()):
            continue
        if not isinstance(old, _KINDS):
            raise InputError(f'resized: "{path}" ({type(old).__name__}) changed its shape and cannot be rebuilt')
        found.append(Rewrite(at=path, layer="resized", options=_options(new)))
    return tuple(found)


def _options(layer: nn.Module) -> dict[str, Any]:
    if isinstance(layer, nn.Conv2d):
        sizes = {"inputs": layer.in_channels, "outputs": layer.out_channels}
        return sizes if layer.groups == 1 else sizes | {"groups": layer.groups}
    if isinstance(layer, nn.Linear):
        return {"inputs": layer.in_features, "outputs": layer.out_features}
    # The count is read off the weight: pruning libraries do not always update the attribute.
    return {"outputs": layer.get_parameter("weight").shape[0]}


def _conv(old: nn.Conv2d, inputs: int, outputs: int, groups: int | None) -> nn.Conv2d:
    if groups is None:
        groups = inputs if old.groups == old.in_channels > 1 else old.groups
    if inputs % groups or outputs % groups:
        raise InputError(f"resized: {groups} groups divide neither or only one of {inputs} inputs, {outputs} outputs")
    return nn.Conv2d(
        inputs,
        outputs,
        old.kernel_size,  # type: ignore[arg-type]  # torch types its own attribute as a tuple of any length
        old.stride,  # type: ignore[arg-type]
        old.padding,  # type: ignore[arg-type]
        old.dilation,  # type: ignore[arg-type]
        groups,
        old.bias is not None,
        old.padding_mode,
    )
