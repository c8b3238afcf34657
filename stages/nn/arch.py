"""A network as data: a builder with options, then rewrites of single layers. Rebuilt from JSON, without pickle."""

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from inspect import Parameter, signature
from typing import Any

from torch import nn

from stages.method import InputError, Value, module_of, unknown

BUILDERS = "stages.nn.builders"
LAYERS = "stages.nn.layers"


class Rewrite(Value):
    """Replace the module at a dotted path by a layer of `stages/nn/layers`; options are enough to rebuild its shape."""

    at: str
    layer: str
    options: dict[str, Any] = {}


class Arch(Value):
    """`arch.json` + `weights.safetensors` is a model.

    A builder file has `build(input_shape, classes, mean, std, **options) -> nn.Module` with normalisation inside; a
    layer file has `like(old: nn.Module, **options) -> nn.Module`, shapes only, weights to be loaded later.
    """

    builder: str
    options: dict[str, Any] = {}
    input_shape: tuple[int, int, int]
    classes: int
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    rewrites: tuple[Rewrite, ...] = ()

    def build(self) -> nn.Module:
        """A freshly initialised network in eval mode, rewrites applied in order.

        Raises `InputError` for an unknown builder or layer, options that do not fit, or a path that is not there.
        """
        check_options(self.builder, self.options)
        make = _function(BUILDERS, self.builder, "build")
        try:
            net: nn.Module = make(self.input_shape, self.classes, self.mean, self.std, **self.options)
        except TypeError as error:
            raise InputError(f'builder "{self.builder}": options do not fit: {error}') from error
        for rewrite in self.rewrites:
            apply(net, rewrite)
        return net.eval()

    def rewritten(self, *rewrites: Rewrite) -> "Arch":
        """The same architecture with more rewrites at the end."""
        return self.model_copy(update={"rewrites": (*self.rewrites, *rewrites)})


@dataclass(frozen=True, slots=True)
class Model:
    """An architecture and a network built from it, with weights."""

    arch: Arch
    net: nn.Module


def check_options(builder: str, options: Iterable[str]) -> None:
    """Raises `InputError` for an unknown builder, and for an option that it does not have; values are not looked at."""
    known = signature(_function(BUILDERS, builder, "build")).parameters.values()
    if any(parameter.kind is Parameter.VAR_KEYWORD for parameter in known):
        return
    own = [parameter.name for parameter in known if parameter.kind is Parameter.KEYWORD_ONLY]
    for key in options:
        if key not in own:
            raise InputError(f'builder "{builder}": {key}: {unknown(key, own)}')


def apply(net: nn.Module, rewrite: Rewrite) -> None:
    """Replace one module of `net` in place."""
    try:
        old = net.get_submodule(rewrite.at)
    except AttributeError:
        raise InputError(f'rewrite: the network has no module at "{rewrite.at}"') from None
    try:
        new = _function(LAYERS, rewrite.layer, "like")(old, **rewrite.options)
    except TypeError as error:
        raise InputError(f'layer "{rewrite.layer}" at "{rewrite.at}": options do not fit: {error}') from error
    net.set_submodule(rewrite.at, new)


def _function(folder: str, kind: str, verb: str) -> Callable[..., nn.Module]:
    found: Callable[..., nn.Module] = getattr(importlib.import_module(module_of(folder, kind)), verb)
    return found
