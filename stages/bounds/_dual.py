"""Ascent on the bound of domains: slopes of ReLUs, and multipliers of what is known of split values.

With slopes alpha and multipliers beta >= 0 of constraints s_j (z_j - p_j) >= 0 the bound is the least value of

    L(x) = row . v(x) - sum_j beta_j s_j (z_j(x) - p_j)

over the box, where v and z follow the network with every non-linear operation replaced by the line that its coefficient
a takes: below where a > 0, above elsewhere. So its derivatives are those of L at the x where it is least: -s_j (z_j -
p_j) for beta_j and max(a, 0) z for the slope below a ReLU at z. That takes one pass forward, and no record of the
backward one. What has no such lines (pooling by maxima, attention) is derived automatically.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from stages.bounds._backward import Chain
from stages.bounds._interval import DOUBLE
from stages.bounds._slopes import Adam
from stages.bounds._trace import Op, fill


@dataclass(slots=True)
class Known:
    """Constraints side (z - point) >= 0 on inputs of `bends`: [B, D] each, side 0 where there is none.

    `at` counts through the inputs of all bends; `push` are the multipliers.
    """

    bends: tuple[Op, ...]
    widths: tuple[int, ...]
    at: Tensor
    side: Tensor
    point: Tensor
    push: Tensor

    def dense(self, values: Tensor, fill: float, reduce: str) -> dict[str, Tensor]:
        """By result of each bend [B, n]: the sum, or the extreme, of `values` [B, D] at the places they belong to."""
        flat = torch.full((len(values), sum(self.widths) + 1), fill, dtype=values.dtype, device=values.device)
        flat = flat.scatter_reduce(1, torch.where(self.side == 0, sum(self.widths), self.at), values, reduce)
        return {
            op.result: part
            for op, part in zip(self.bends, torch.split(flat[:, :-1], list(self.widths), 1), strict=True)
        }

    def ends(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The low and high ends that the constraints give each input, infinite where they give none."""
        low = self.dense(torch.where(self.side > 0, self.point, -torch.inf), -torch.inf, "amax")
        return low, self.dense(torch.where(self.side < 0, self.point, torch.inf), torch.inf, "amin")

    def used(self) -> list[Op]:
        """The bends of which anything is known in some domain."""
        return [self.bends[i] for i in torch.unique(self.bend()[self.side != 0]).tolist()]

    def bend(self) -> Tensor:
        """Which of `bends` each constraint is about, [B, D]."""
        return torch.bucketize(self.at, torch.tensor(self.widths, device=self.at.device).cumsum(0), right=True)

    def repeated(self) -> bool:
        """Whether some value has more than one constraint."""
        none = -1 - torch.arange(self.at.shape[1], device=self.at.device)
        places = torch.where(self.side == 0, none, self.at).sort(1).values
        return bool((places.diff(dim=1) == 0).any())


@dataclass(frozen=True, slots=True)
class Ascent:
    """[B] best bound seen and the last; slopes and multipliers at the end; of the last the coefficients of results and
    of the image, where it is least [B, ...], and what its lines make of every value there, None if they do not say."""

    best: Tensor
    last: Tensor
    lower: dict[str, Tensor]
    push: Tensor
    watch: dict[str, Tensor]
    lowest: Tensor | None
    reached: dict[str, Tensor] | None


def ascend(
    chain: Chain, row: Tensor, lower: Mapping[str, Tensor], known: Known, steps: int, rate: float, goal: Tensor
) -> Ascent:
    """The best bound on row [B, K] times the output in `steps` of Adam from slopes `lower` and `known.push` on.

    Every step's bound is sound, so the best is kept. Ends early where all bounds pass `goal` [B].
    """
    alphas = {key: value.clone() for key, value in lower.items()}
    push = known.push.clone()
    names = {op.result: op.reads()[0] for op in known.used()}
    climb = Adam([*alphas.values(), push])
    best = torch.full((chain.batch,), -torch.inf, dtype=torch.float64, device=row.device)
    repeated = known.repeated()
    plain = all(result in chain.lines for result in chain.fronts)
    for step in range(steps + 1):
        free = [*alphas.values(), push]
        for value in free:
            value.requires_grad_(not plain)
        with torch.set_grad_enabled(not plain):
            pushed = known.dense(-known.side * push, 0.0, "sum")
            more = {key: chain.unflat(name, pushed[key]).unsqueeze(0) for key, name in names.items()}
            watch: dict[str, Tensor] = {}
            found = chain.bound(chain.graph.output, row.unsqueeze(0), lower=alphas, push=more, watch=watch)[0]
            moved = push.double() * known.side * known.point
            if repeated:
                found = found - _lost(chain, known, push.detach(), pushed, names)
            found = found + moved.sum(1) - 64 * DOUBLE * len(moved[0]) * moved.detach().abs().sum(1)
            total = found.sum()
        best = torch.maximum(best, found.detach())
        lowest = chain.ends.lowest(watch[chain.graph.input][0].detach()) if chain.graph.input in watch else None
        # Nothing moves a bound whose way does not pass by what is free.
        still = not known.bends or lowest is None or not (plain or total.requires_grad)
        last = step == steps or still or bool((best > goal).all())
        reached = _reached(chain, alphas, watch, lowest) if plain and lowest is not None else None
        if last:
            break
        if reached is None:
            grads = list(torch.autograd.grad(total, free, allow_unused=True, materialize_grads=True))
        else:
            grads = _gradients(chain, alphas, known, watch, reached)
        climb.step(grads, rate * 0.97**step)
        with torch.no_grad():
            for value in alphas.values():
                value.clamp_(0, 1)
            push.clamp_(min=0)
    kept = [{key: value.detach() for key, value in part.items()} for part in (alphas, watch)]
    return Ascent(best, found.detach(), kept[0], push.detach(), kept[1], lowest, reached)


def _lost(chain: Chain, known: Known, push: Tensor, pushed: Mapping[str, Tensor], names: Mapping[str, str]) -> Tensor:
    """[B]: what the bound may lose where multipliers of several constraints on one value z are summed, at most |z|
    times what the sum in float64 and the one that was taken differ by."""
    exact = known.dense(-(known.side * push).double(), 0.0, "sum")
    size = known.dense(push.double(), 0.0, "sum")
    total = torch.zeros(len(push), dtype=torch.float64, device=push.device)
    for key, name in names.items():
        off = (exact[key] - pushed[key].detach().double()).abs() + 4 * DOUBLE * push.shape[1] * size[key]
        total = total + (off * chain.flat(name, chain.values[name].size()).double()).sum(1)
    return 1.001 * total


def _reached(
    chain: Chain, alphas: Mapping[str, Tensor], watch: Mapping[str, Tensor], lowest: Tensor
) -> dict[str, Tensor]:
    """Every value at the point `lowest`, with the lines that the bound takes in place of what is not linear."""
    values: dict[str, Tensor] = {chain.graph.input: lowest}
    for op in chain.done:
        if op.result not in chain.fronts:
            held = {**chain.values, **values}
            values[op.result] = op.target(*fill(op.args, held), **fill(dict(op.kwargs), held))
            continue
        lines, below = chain.lines[op.result], watch[op.result][0] > 0 if op.result in watch else None
        low, high = lines.low.to(chain.kind), lines.high.to(chain.kind)
        for name, (fixed, up) in lines.slopes.items():
            down = torch.where(fixed != up, alphas[op.result][0], fixed) if op.result in alphas else fixed
            low, high = low + down * values[name], high + up * values[name]
        values[op.result] = low if below is None else torch.where(below, low, high)
    return values


def _gradients(
    chain: Chain,
    alphas: Mapping[str, Tensor],
    known: Known,
    watch: Mapping[str, Tensor],
    reached: Mapping[str, Tensor],
) -> list[Tensor]:
    grads = []
    names = {op.result: op.reads()[0] for op in known.bends}
    for key, alpha in alphas.items():
        [(down, up)] = chain.lines[key].slopes.values()
        slope = watch[key].clamp(min=0) * reached[names[key]] if key in watch else torch.zeros_like(alpha)
        grads.append(torch.where(down != up, slope, 0.0))
    inputs = torch.cat([chain.flat(name, reached[name]) for name in names.values()], 1)
    return [*grads, -known.side * (inputs.gather(1, known.at) - known.point)]
