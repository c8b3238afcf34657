"""Attacks that use hidden representations, as starting points for one that uses the outputs."""

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Generator, Tensor

from stages.attacks._layers import spread, watched
from stages.attacks._losses import cross_entropy, gradient
from stages.attacks.base import Attack
from stages.method import InputError
from stages.oracle import Logits, charge, narrow
from stages.threat import Threat

Goal = Literal["joint", "disrupt", "imitate"]


class Hidden(Attack):
    """From a random start, `steps` steepest steps on a surrogate per goal, then `finish` steps on the margin.

        D(h, h') = mean over layers l, mean over units of (h_l - h'_l)^2 / var(h_l(x))
        disrupt:  max D(h(x'), h(x))                     whatever the label
        joint:    max CE(f(x'), y) + c D(h(x'), h(x))    c such that both gradients have equal norm at the first step
        imitate:  min D(h(x'), h(guide))                 a guide of another class

    h_l are the outputs of convolutions, linear layers and matrix products but the last; `layers` picks some by their
    place (-1 is the last of them). The guide is the nearest example of the batch, by the deepest picked layer, that has
    another label; in a batch of one label nothing is imitated. Where no layer is seen (linear networks) D is 0, and PGD
    is left. An example leaves at its first wrong answer. `step` is a share of eps; left out, it is 2.5 / steps, or
    2.5 / finish. `finish = 0` leaves the surrogates alone: as attacks on labels, disrupt and imitate are then weak.

    One query for h(x), one gradient a step, and one more at the first step of `joint`, where two norms are compared.

    Source: Shen et al. 2020/2022, "Incorporating hidden layer representation into adversarial attacks and defences";
    only the abstract was read, and all formulas are reconstructed. Imitation as Sabour et al. 2016, equation 1.
    Departures: units are scaled by the variance over the example's own units of the layer instead of per channel over
    data, and c is set per example, so that no path depends on the batch but for the guide; their reverse imitation
    (another label at the same features, against detectors) is left out; the margin steps are ours.
    """

    goals: tuple[Goal, ...] = Field(default=("joint", "disrupt", "imitate"), min_length=1)
    steps: int = Field(default=10, ge=1)
    finish: int = Field(default=10, ge=0)
    step: float | None = Field(default=None, gt=0)
    layers: tuple[int, ...] = ()

    def perturb(self, logits: Logits, x: Tensor, y: Tensor, threat: Threat, rng: Generator) -> Tensor:
        with torch.no_grad():
            home = self._pick(watched(logits, x)[1])
        guide = _nearest(home[-1], y) if home else None
        result = x.clone()
        alive = torch.arange(len(x), device=x.device)
        for goal in self.goals:
            start = threat.random(x, rng)
            far = home if goal != "imitate" else [] if guide is None else [hidden[guide] for hidden in home]
            alive = self._climb(logits, x, y, threat, goal, start, home, far, alive, result)
            if len(alive) == 0:
                break
        return result

    def _climb(
        self,
        logits: Logits,
        x: Tensor,
        y: Tensor,
        threat: Threat,
        goal: Goal,
        start: Tensor,
        home: Sequence[Tensor],
        far: Sequence[Tensor],
        alive: Tensor,
        result: Tensor,
    ) -> Tensor:
        """One goal for the examples `alive` [M]; writes `result`, returns who is left."""
        point, weight = start[alive], torch.ones(len(x), device=x.device)
        for number in range(self.steps + self.finish):
            here, labels = narrow(logits, alive), y[alive]
            if number < self.steps:
                scales = [spread(hidden[alive]) for hidden in home]
                z, slope, weight[alive] = self._slope(
                    here, point, labels, goal, [hidden[alive] for hidden in far], scales, weight[alive], number == 0
                )
            else:
                z, _, slope = gradient(here, point, labels, "margin")
            right = z.argmax(1) == labels
            result[alive[~right]] = point[~right]
            alive, point, slope = alive[right], point[right], slope[right]
            if len(alive) == 0:
                return alive
            count = self.steps if number < self.steps else self.finish
            length = threat.eps * (self.step if self.step is not None else 2.5 / count)
            point = threat.project(threat.ascend(point, slope, length), x[alive])
        with torch.no_grad():
            right = narrow(logits, alive)(point).argmax(1) == y[alive]
        result[alive] = point
        return alive[right]

    def _slope(
        self,
        logits: Logits,
        x: Tensor,
        y: Tensor,
        goal: Goal,
        far: Sequence[Tensor],
        scales: Sequence[Tensor],
        weight: Tensor,
        first: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Logits, gradient of the surrogate, and the weight c of D in it, [B]."""
        with torch.enable_grad():
            point = x.detach().requires_grad_(True)
            z, hidden, _ = watched(logits, point)
            hidden = self._pick(hidden)
            with torch.autocast(x.device.type, enabled=False):
                apart = _apart(hidden, far, scales) if far else z.new_zeros(len(x))
                loss = cross_entropy(z, y)
                if goal == "joint" and first and far:
                    size, own = (_slope_of(part, point, keep=True).flatten(1).norm(dim=1) for part in (apart, loss))
                    weight = torch.where((size > 0) & (own > 0), own / size.clamp(min=1e-30), 1.0)
                    charge(logits, gradients=1)
                goals = {"joint": loss + weight * apart, "disrupt": apart, "imitate": -apart}
            if not z.requires_grad and not hidden:
                raise InputError(
                    f"hidden: expected a network in torch whose layers can be seen, got {_name(logits)}, whose outputs "
                    'do not lead back to its input; there is "square" for engines'
                )
            return z.detach(), _slope_of(goals[goal], point, keep=False), weight

    def _pick(self, hidden: Sequence[Tensor]) -> list[Tensor]:
        if not self.layers or not hidden:
            return list(hidden)
        beyond = [place for place in self.layers if not -len(hidden) <= place < len(hidden)]
        if beyond:
            raise InputError(
                f"hidden: layers: expected places within {-len(hidden)}..{len(hidden) - 1}, since {len(hidden)} hidden "
                f"layers were seen, got {beyond[0]}"
            )
        return [hidden[place] for place in self.layers]


def _apart(hidden: Sequence[Tensor], far: Sequence[Tensor], scales: Sequence[Tensor]) -> Tensor:
    """D, [B]; raises `InputError` where the network shows other layers than it did at the start."""
    if [one.shape for one in hidden] != [one.shape for one in far]:
        raise InputError(f"hidden: expected the same {len(far)} layers in every pass, got {len(hidden)} that differ")
    parts = [
        (one.float() - other.float()).flatten(1).square().mean(1) / scale
        for one, other, scale in zip(hidden, far, scales, strict=True)
    ]
    return torch.stack(parts).mean(0)


def _nearest(hidden: Tensor, y: Tensor) -> Tensor | None:
    """For every example the row of the nearest one of another label, int64 [B]; None where there is one label alone."""
    other = y.unsqueeze(1) != y
    if not bool(other.any()):
        return None
    flat = hidden.flatten(1).float()
    distance: Tensor = torch.cdist(flat, flat).masked_fill(~other, float("inf"))
    return distance.argmin(1)


def _slope_of(values: Tensor, point: Tensor, keep: bool) -> Tensor:
    """Gradient of the sum, zero where no path leads back."""
    if not values.requires_grad:
        return torch.zeros_like(point)
    (slope,) = torch.autograd.grad(values.sum(), point, retain_graph=keep, allow_unused=True, materialize_grads=True)
    slope = slope.nan_to_num(0.0, 0.0, 0.0)
    return slope.detach()


def _name(logits: object) -> str:
    inner = getattr(logits, "logits", logits)
    return getattr(inner, "__name__", type(inner).__name__)
