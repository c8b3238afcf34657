"""Which channels must be removed together, by torch-pruning's dependency graph (Fang et al. 2023)."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stages.method import InputError

_PRUNABLE = (nn.Conv2d, nn.Linear, nn.BatchNorm1d, nn.BatchNorm2d)
_OWN = "torch_pruning"


@dataclass(frozen=True, slots=True)
class Slice:
    """Where channel i of a group lies in one parameter: rows `places[i]` of dimension `dim`."""

    parameter: str
    dim: int
    places: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class Group:
    """Channels that a set of layers shares. `root` is the path of the layer whose outputs they are.

    `writes` and `reads` are the layers that have them as outputs and as inputs.
    """

    root: str
    width: int
    slices: tuple[Slice, ...]
    writes: tuple[str, ...]
    reads: tuple[str, ...]


class Graph:
    """The dependency graph of one network, which removal changes in place."""

    def __init__(self, net: nn.Module, image: Tensor) -> None:
        import torch_pruning as tp

        _check(net)
        self.net = net
        self._paths = {module: path for path, module in net.named_modules()}
        with torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # Only an operation after the last layer makes torch-pruning see where the network's output is.
            self._graph: Any = tp.DependencyGraph().build_dependency(
                net, image, output_transform=lambda logits: logits * 1, verbose=False
            )
        self._out = {
            nn.Conv2d: tp.prune_conv_out_channels,
            nn.Linear: tp.prune_linear_out_channels,
        }

    def groups(self) -> tuple[Group, ...]:
        """Every group whose channels may go: none that is the network's output or holds a grouped convolution."""
        found = []
        for group in self._graph.get_all_groups(root_module_types=[nn.Conv2d, nn.Linear]):
            made = self._group(group)
            if made is not None:
                found.append(made)
        return tuple(found)

    def remove(self, root: str, channels: Sequence[int]) -> None:
        """Remove channels of the group of `root` from every layer that shares them."""
        module = self.net.get_submodule(root)
        group = self._graph.get_pruning_group(module, self._out[type(module)], list(channels))
        if not self._graph.check_pruning_group(group):
            raise InputError(f'prune: removing {len(channels)} channels of "{root}" would leave a layer without any')
        group.prune()

    def _group(self, group: Any) -> Group | None:
        slices: list[Slice] = []
        writes: list[str] = []
        reads: list[str] = []
        width = len(group[0].idxs)
        for item in group:
            module, handler = item.dep.target.module, item.dep.handler
            if type(module).__module__.startswith(_OWN):
                if type(module).__name__ == "_OutputOp":
                    return None
                continue
            if not isinstance(module, _PRUNABLE) or _grouped(module):
                return None
            path = self._paths[module]
            outputs = bool(self._graph.is_out_channel_pruning_fn(handler))
            (writes if outputs else reads).append(path)
            places = _places(item.idxs, item.root_idxs, width)
            slices += [s for s in _slices(module, path, outputs, places) if s not in slices]
        return Group(self._paths[group[0].dep.target.module], width, tuple(slices), tuple(writes), tuple(reads))


def _check(net: nn.Module) -> None:
    for path, module in net.named_modules():
        if not isinstance(module, _PRUNABLE) and next(module.parameters(recurse=False), None) is not None:
            raise InputError(
                f'prune: expected parameters in convolutions, linear layers and batch normalisation only, got "{path}" '
                f"({type(module).__name__}); prune before layers are replaced, or choose another compressor"
            )


def _grouped(module: nn.Module) -> bool:
    """A grouped convolution that is not depthwise: its channels cannot go one by one."""
    return isinstance(module, nn.Conv2d) and module.groups > 1 and not _depthwise(module)


def _depthwise(module: nn.Conv2d) -> bool:
    return module.groups == module.in_channels == module.out_channels > 1


def _places(here: Sequence[int], roots: Sequence[int], width: int) -> tuple[tuple[int, ...], ...]:
    places: list[list[int]] = [[] for _ in range(width)]
    for place, root in zip(here, roots, strict=True):
        places[root].append(place)
    return tuple(tuple(p) for p in places)


def _slices(module: nn.Module, path: str, outputs: bool, places: tuple[tuple[int, ...], ...]) -> list[Slice]:
    along = outputs or not isinstance(module, nn.Conv2d | nn.Linear)
    if isinstance(module, nn.Conv2d) and _depthwise(module):
        along = True
    names = [name for name, _ in module.named_parameters(recurse=False) if along or name == "weight"]
    return [Slice(f"{path}.{name}" if path else name, 0 if along else 1, places) for name in names]
