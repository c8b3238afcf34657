"""Channel pruning by how much the loss under attack depends on a channel, with fine-tuning between the steps."""

import copy
from collections.abc import Iterable, Mapping
from itertools import pairwise

import torch
from pydantic import Field
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from stages.compressors._account import account
from stages.compressors._groups import Graph, Group
from stages.compressors.base import Bench, Compressor
from stages.evaluate import frozen
from stages.nn.arch import Model
from stages.nn.layers.resized import changes


class Prune(Compressor):
    """Removes whole channels, everywhere they appear, and rebuilds smaller plain layers.

    Saliency of channel i of a group: sum over all its parameters w, in every layer that writes or reads the channel
    (batch normalisation included), of mean over batches of |w dL/dw|, L the cross-entropy on adversarial examples;
    divided by the group's mean, so that groups compare (Molchanov et al. 2019 for the Taylor term, Fang et al. 2023
    for the grouping; torch-pruning's own Taylor score leaves batch normalisation out).

    `ratio` is the share of all removable channels that goes, over `steps` equal steps, each scored anew on the network
    as it then is and followed by fine-tuning. Within a step the block of channels with the lowest mean saliency goes
    first, whichever group it is from; a block takes a group down to its next width that is a multiple of its grain.

    The grain is `round_to`, halved until the group's first width holds two of it (32 channels: 16; 24 or 16: 8; 3: 1),
    so that narrow networks can shrink too. No group goes under `floor` of its first width; the group that the first
    layer writes and the one that the classifier reads keep `end_floor`. Grouped convolutions that are not depthwise
    keep their channels. Where floors or grains stop short of `ratio`, a note says so. At ratio 0 the model comes back.

    Departures from the notes' recipe: ranked by saliency alone, not per microsecond; no distillation.
    """

    ratio: float = Field(default=0.5, ge=0, lt=1)
    round_to: int = Field(default=16, ge=1)
    steps: int = Field(default=3, ge=1)
    floor: float = Field(default=0.25, gt=0, le=1)
    end_floor: float = Field(default=0.5, gt=0, le=1)

    def compress(self, model: Model, bench: Bench, rng: Generator) -> Model:
        del rng
        first = self._groups(model)
        widths = {group.root: group.width for group in first}
        floors = self._floors(model, first)
        total, current = sum(widths.values()), model
        for step in range(1, self.steps + 1):
            keep = total - round(total * self.ratio * step / self.steps)
            pruned = self._step(model, current, keep, widths, floors, bench)
            if pruned is not None:
                current = bench.tune(pruned)
        left = sum(group.width for group in self._groups(current))
        bench.note(f"prune: {total - left} of {total} channels removed ({1 - left / max(total, 1):.1%})")
        return current

    def _groups(self, model: Model) -> tuple[Group, ...]:
        return Graph(copy.deepcopy(model.net), _image(model)).groups()

    def _floors(self, model: Model, groups: Iterable[Group]) -> dict[str, int]:
        called = list(account(model.net, model.arch.input_shape))
        floors = {}
        for group in groups:
            end = called[0] in group.writes or called[-1] in group.reads
            share = max(self.floor, self.end_floor) if end else self.floor
            floors[group.root] = max(1, -int(-share * group.width // 1))
        return floors

    def _step(
        self,
        model: Model,
        current: Model,
        keep: int,
        first: Mapping[str, int],
        floors: Mapping[str, int],
        bench: Bench,
    ) -> Model | None:
        """`current` with about `keep` channels, rebuilt from its architecture; None where nothing is to go or can."""
        net = copy.deepcopy(current.net)
        graph = Graph(net, _image(current))
        groups = graph.groups()
        quota = sum(group.width for group in groups) - keep
        if quota <= 0:
            return None
        scores = saliency(current.net, groups, bench.adversarial(current.net))
        grains = {root: grain(width, self.round_to) for root, width in first.items()}
        gone = choose({g.root: scores[g.root] for g in groups}, quota, grains, floors)
        if not any(gone.values()):
            bench.note("prune: no group can shrink further without falling under its floor")
            return None
        for root, channels in gone.items():
            if channels:
                graph.remove(root, channels)
        arch = model.arch.rewritten(*changes(model.net, net))
        with torch.random.fork_rng(devices=[]):
            rebuilt = arch.build()
        rebuilt.load_state_dict(net.state_dict())
        return Model(arch, rebuilt.to(_image(current).device))


def saliency(
    net: nn.Module, groups: Iterable[Group], batches: Iterable[tuple[Tensor, Tensor, Tensor]]
) -> dict[str, Tensor]:
    """[width] per group root: sum over the channel's parameters of mean |w dL/dw|, over the group's mean.

    L is the mean cross-entropy of x_adv in batches (x, x_adv, y); the network is used in eval mode and left as it was.
    """
    parameters = dict(net.named_parameters())
    totals = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in parameters.items()}
    count = 0
    for _, x_adv, y in batches:
        with frozen(net), torch.enable_grad():
            for parameter in parameters.values():
                parameter.requires_grad_(True)
            loss = F.cross_entropy(net(x_adv), y)
            slopes = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True, materialize_grads=True)
        for (name, parameter), slope in zip(parameters.items(), slopes, strict=True):
            totals[name] += (parameter.detach().double() * slope.double()).abs()
        count += 1
    return {group.root: _normalised(_channel_sums(group, totals) / max(count, 1)) for group in groups}


def _channel_sums(group: Group, totals: Mapping[str, Tensor]) -> Tensor:
    sums = torch.zeros(group.width, dtype=torch.float64)
    for part in group.slices:
        rows = totals[part.parameter].movedim(part.dim, 0)
        values = rows.reshape(len(rows), -1).sum(1).cpu()
        sums += torch.stack([values[list(places)].sum() for places in part.places])
    return sums


def _normalised(scores: Tensor) -> Tensor:
    mean = scores.mean()
    return scores / mean if mean > 0 else scores


def grain(width: int, round_to: int) -> int:
    """`round_to`, halved until `width` holds two of it."""
    while round_to > 1 and 2 * round_to > width:
        round_to //= 2
    return round_to


def choose(
    scores: Mapping[str, Tensor], quota: int, grains: Mapping[str, int], floors: Mapping[str, int]
) -> dict[str, tuple[int, ...]]:
    """Channels to remove per group, about `quota` in all, in whole blocks from the least salient block up.

    A block that would overshoot the quota by more than it falls short is left, and smaller ones are tried.
    """
    blocks: list[tuple[float, int, int, str, tuple[int, ...]]] = []
    for number, (root, values) in enumerate(scores.items()):
        order = values.argsort(stable=True)
        stops = _widths(len(values), grains[root], floors[root])
        for depth, (wide, narrow) in enumerate(pairwise(stops)):
            block = order[len(values) - wide : len(values) - narrow]
            blocks.append((float(values[block].mean()), number, depth, root, tuple(int(i) for i in block)))
    gone: dict[str, tuple[int, ...]] = dict.fromkeys(scores, ())
    removed, closed = 0, set()
    for _, _, _, root, members in sorted(blocks):
        over = removed + len(members) - quota
        if root in closed or over > quota - removed:
            closed.add(root)  # the later blocks of a group only make sense after the earlier ones
            continue
        gone[root] += members
        removed += len(members)
        if removed >= quota:
            break
    return {root: tuple(sorted(members)) for root, members in gone.items()}


def _widths(width: int, step: int, floor: int) -> list[int]:
    """`width` and every smaller multiple of `step` down to `floor`, falling."""
    return [width, *(w for w in range((width - 1) // step * step, 0, -step) if w >= floor)]


def _image(model: Model) -> Tensor:
    device = next(model.net.parameters()).device
    return torch.zeros((1, *model.arch.input_shape), device=device)
