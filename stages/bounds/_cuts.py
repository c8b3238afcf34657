"""Where a domain of branch and bound is cut in two.

A score says what a neuron's lines lose now, not what is left of that once slopes and the boxes behind a cut have
changed: where the lower line of a ReLU has found its slope, a cut may bring nothing at all. So the halves of the cuts
that score best are bounded, without any ascent, and the cut with the largest product of both halves' gains is taken
(Achterberg, "Constraint Integer Programming", 2007; from memory): both halves have to be proved.

Source: De Palma et al., "Improved Branch and Bound for Neural Network Verification via Lagrangian Decomposition", 2021,
filtered smart branching (from memory). Departures: the product in place of the worse half's gain, and more cuts.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from stages.bounds._backward import Chain
from stages.bounds._domains import Domains
from stages.bounds._roots import ends_of
from stages.bounds._trace import Op

_NARROWEST = 1e-3  # range of a curve's input that is worth splitting
_LEAST = 1e-3  # of what is missed: a half that gains nothing does not make all cuts alike


def scored(chain: Chain, bends: Sequence[Op], watch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """[B, all bends]: what the lines of one lose in a bound with coefficients `watch` of results, -1 where it is exact;
    and where to split it."""
    scores, points = [], []
    for op in bends:
        name = op.reads()[0]
        low, high = (chain.flat(name, end) for end in ends_of(chain, name))
        slopes = watch.get(op.result)
        weight = torch.zeros_like(low) if slopes is None else chain.flat(op.result, slopes[0])
        if op.kind == "relu":
            above = -weight.clamp(max=0) * high * -low / (high - low).clamp(min=1e-30)
            below = weight.clamp(min=0) * torch.minimum(high, -low) / 2
            scores.append(torch.where((low < 0) & (high > 0), above + below, -1.0))
            points.append(torch.zeros_like(low))
            continue
        lines, middle = chain.lines[op.result], (low + high) / 2
        [(down, up)] = lines.slopes.values()
        lift = chain.flat(op.result, (lines.high - lines.low).to(chain.kind))
        lost = lift + (chain.flat(op.result, up) - chain.flat(op.result, down)) * middle
        scores.append(torch.where(high - low > _NARROWEST, weight.abs() * lost, -1.0))
        points.append(middle)
    if not scores:
        return (torch.zeros(chain.batch, 0, device=chain.values[chain.graph.output].low.device),) * 2
    return torch.cat(scores, 1), torch.cat(points, 1)


def halves(
    some: Domains,
    scores: Tensor,
    points: Tensor,
    goal: Tensor,
    bounded: Callable[[Domains], Tensor],
    cuts: int,
) -> Domains:
    """Both halves of every domain, one after the other, with the bounds that are known of them.

    scores and points [N, F] of all cuts, the score negative where there is none; `bounded` says lower bounds of
    domains. goal [N]. Of so many `cuts` the best is taken; of one nothing is bounded.
    """
    top, at = scores.topk(min(scores.shape[1], cuts))
    there = top > 0
    there[:, 0] = True
    owner, place = there.nonzero().unbind(1)
    both = some[owner].halves(at[owner, place], points[owner, at[owner, place]])
    if cuts == 1:
        return both
    bound = torch.fmax(bounded(both).view(-1, 2), some.bound[owner].unsqueeze(1))
    missed = (goal - some.bound)[owner].unsqueeze(1)
    gain = torch.minimum(bound, goal[owner].unsqueeze(1)) - some.bound[owner].unsqueeze(1)
    worth = torch.full_like(top, -1.0, dtype=torch.float64)
    worth[owner, place] = torch.maximum(gain, _LEAST * missed).prod(1).nan_to_num(0.0)
    row = torch.full_like(at, -1)
    row[owner, place] = torch.arange(len(owner), device=at.device)
    chosen = row.gather(1, worth.argmax(1, keepdim=True)).squeeze(1)
    spots = torch.stack([2 * chosen, 2 * chosen + 1], 1).flatten()
    return replace(both[spots], bound=bound[chosen].flatten())
