"""GDWS: convolutions become several depthwise kernels per input channel and a 1x1 (Dbouk and Shanbhag 2021)."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Generator, Tensor, nn

from stages.compressors._account import Layer, account
from stages.compressors._importance import importance
from stages.compressors._svd import atoms, lego, mego
from stages.compressors.base import Bench, Compressor
from stages.evaluate import frozen
from stages.method import InputError
from stages.nn.arch import Model, Rewrite
from stages.nn.cost import cost
from stages.nn.layers.gdws_conv import Form, fit


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A convolution that may be replaced: atom values [C, R], its cost, and the cost of one kernel."""

    layer: nn.Conv2d
    values: Tensor
    dense: int
    unit: int

    def pays(self, kernels: int, margin: float) -> bool:
        return kernels * self.unit <= margin * self.dense


class GDWS(Compressor):
    """Truncates every K x K convolution slice by slice; which kernels go is decided on adversarial examples.

    solver "lego": fewest kernels per layer with weighted error <= beta, the same beta for every layer (the paper's).
    solver "mego": least weighted error per layer with `kernels` kernels per input channel on average.
    solver "joint" (default): one budget for the network; the kernels with the least weighted error per
    multiply-accumulate go first, until `ratio` of the network's multiply-accumulates is gone (extension of the notes,
    same proof of optimality); every layer keeps at least one kernel.

    weights "adversarial": alpha of equation 8 (`_importance`), so error means endangered decisions; "none": alpha is
    1 / ||W||_F^2, so error is relative. The first convolution, 1x1, grouped ones and ones that a smaller GDWS layer
    would not make cheaper than `margin` times dense stay dense. Cost is counted in multiply-accumulates, not measured.
    The result is fine-tuned once under the training recipe; where nothing is replaced, the model comes back untouched.

    Departures: the paper does not fine-tune, adds no cost test, and skips by layer order alone.
    Raises `InputError` where `ratio` is out of reach.
    """

    solver: Literal["lego", "mego", "joint"] = "joint"
    beta: float = Field(default=0.005, ge=0)
    kernels: float = Field(default=2.0, gt=0)
    ratio: float = Field(default=0.5, ge=0, lt=1)
    weights: Literal["adversarial", "none"] = "adversarial"
    rivals: int = Field(default=9, ge=1)
    margin: float = Field(default=0.9, gt=0, le=1)
    form: Form = "gather"

    def compress(self, model: Model, bench: Bench, rng: Generator) -> Model:
        del rng
        costs = account(model.net, model.arch.input_shape)
        layers = eligible(model.net, costs)
        if not layers:
            bench.note("gdws: no convolution larger than 1x1 beyond the first; the network stays as it is")
            return model
        found = self._candidates(model.net, layers, costs, bench)
        kernels = self._allocate(model, found)
        net, rewrites = copy.deepcopy(model.net), []
        for path, counts in kernels.items():
            layer = fit(net.get_submodule(path), counts, self.form)
            net.set_submodule(path, layer.eval())
            rewrites.append(
                Rewrite(at=path, layer="gdws_conv", options={"channels": _names(counts), "form": self.form})
            )
        bench.note(f"gdws: {len(rewrites)} of {len(layers)} convolutions replaced")
        return bench.tune(Model(model.arch.rewritten(*rewrites), net)) if rewrites else model

    def _candidates(
        self, net: nn.Module, layers: Mapping[str, nn.Conv2d], costs: Mapping[str, Layer], bench: Bench
    ) -> dict[str, _Candidate]:
        if self.weights == "adversarial":
            with frozen(net):
                alphas = importance(net, layers, bench.adversarial(net), self.rivals)
        else:
            alphas = {
                path: torch.ones(layer.in_channels, dtype=torch.float64)
                / layer.weight.detach().double().square().sum().clamp(min=torch.finfo(torch.float64).tiny).cpu()
                for path, layer in layers.items()
            }
        return {
            path: _Candidate(
                layer,
                atoms(layer.weight.cpu(), alphas[path]),
                costs[path].macs,
                costs[path].pixels * (layer.weight[0, 0].numel() + layer.out_channels),
            )
            for path, layer in layers.items()
        }

    def _allocate(self, model: Model, found: Mapping[str, _Candidate]) -> dict[str, tuple[int, ...]]:
        """Kernels per input channel for every layer that is worth replacing."""
        if self.solver == "joint":
            total = cost(model.net, model.arch.input_shape).macs
            chosen = joint(found, total, self.ratio, self.margin)
        elif self.solver == "lego":
            chosen = {path: lego(one.values, self.beta) for path, one in found.items()}
        else:
            chosen = {path: mego(one.values, round(self.kernels * len(one.values))) for path, one in found.items()}
        return {path: counts for path, counts in chosen.items() if found[path].pays(sum(counts), self.margin)}


def eligible(net: nn.Module, called: Mapping[str, Layer]) -> dict[str, nn.Conv2d]:
    """Convolutions that GDWS may replace: in use, not the first, larger than 1x1, of one group; in order of use."""
    convolutions = [(path, net.get_submodule(path)) for path in called]
    plain = [(path, layer) for path, layer in convolutions if type(layer) is nn.Conv2d]
    return {path: layer for path, layer in plain[1:] if layer.weight[0, 0].numel() > 1 and layer.groups == 1}


def joint(found: Mapping[str, _Candidate], total: int, ratio: float, margin: float) -> dict[str, tuple[int, ...]]:
    """Kernels per layer so that the network's `total` falls by `ratio`, with least weighted error.

    All atoms are dropped in order of value per cost until the budget is met. A layer counts as dense until its GDWS
    form pays. Raises `InputError` where even one kernel per layer is too much.
    """

    def price(path: str, kernels: int) -> int:
        one = found[path]
        return kernels * one.unit if one.pays(kernels, margin) else one.dense

    kept = {path: one.values.numel() for path, one in found.items()}
    spent = total + sum(price(path, kernels) - found[path].dense for path, kernels in kept.items())
    queue = [
        (float(value) / one.unit, path, atom)
        for path, one in found.items()
        for atom, value in enumerate(one.values.flatten().tolist())
    ]
    # Within a slice values fall, so dropping the smallest first drops from each slice's end; ties go last atom first.
    queue.sort(key=lambda entry: (entry[0], entry[1], -entry[2]))
    dropped: dict[str, list[int]] = {path: [] for path in found}
    for _, path, atom in queue:
        if spent <= (1 - ratio) * total:
            break
        if kept[path] == 1:
            continue
        before = price(path, kept[path])
        kept[path] -= 1
        dropped[path].append(atom)
        spent += price(path, kept[path]) - before
    if spent > (1 - ratio) * total:
        raise InputError(
            f"gdws.ratio: expected at most {1 - spent / total:.3f}, what separable convolutions can save of the "
            f"network's multiply-accumulates, got {ratio:g}"
        )
    return {path: _remaining(one, dropped[path]) for path, one in found.items()}


def _remaining(one: _Candidate, dropped: list[int]) -> tuple[int, ...]:
    keep = torch.ones(one.values.numel(), dtype=torch.bool)
    keep[dropped] = False
    return tuple(int(count) for count in keep.view_as(one.values).sum(1))


def _names(counts: tuple[int, ...]) -> list[int]:
    return [channel for channel, count in enumerate(counts) for _ in range(count)]
