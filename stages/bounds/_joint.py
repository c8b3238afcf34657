"""What values can be where a row is refuted, with the row in the bound of every value.

A point x that refutes a row has row . f(x) <= goal. So for a value z, either sign s, and any gamma >= 0,

    s z(x) >= s z(x) + gamma (row . f(x) - goal)        at every such x,

and the linear bound below the right side is that of one function: where z and the row depend on the same neurons their
coefficients are added before a line is chosen, and what cancels costs nothing. Slopes of all ReLUs, above z too, and
gamma are optimised for each z and s alone. `_halfspace` adds up two finished bounds instead, which is less, and far
less work where bounds of a value alone are cheap (in windows of maps).

Source: Kotha et al., "Provably Bounding Neural Network Preimages", 2023, theorem 2, for one output constraint; the
values are taken layer by layer, in the boxes that those before have got.

Rounding: the row is scaled in the bound's own precision; what that loses of |row| |f| is paid for, the rest as in
`_backward`.
"""

import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from stages.bounds import _relax, _slopes, _sweep
from stages.bounds._backward import Chain
from stages.bounds._interval import DOUBLE, TINY, outward
from stages.bounds._roots import Boxes, ends_of, followed
from stages.bounds._trace import Op

_POWERS = (0.0, -2.0)  # of e, times what makes the row and the value alike: gammas to begin with
_RATE = 0.5


def narrowed(
    begin: Callable[[], Chain],
    bends: Sequence[Op],
    row: Tensor,
    goal: Tensor,
    slopes: Mapping[str, Tensor],
    boxes: Boxes,
    memory: float,
    steps: int,
    end: float,
) -> tuple[Boxes, Tensor]:
    """Better `boxes` of what `bends` read, for points that refute row [B, K], and bool [B]: there are none.

    `begin` makes a chain that nothing was followed in, `slopes` [1, B, n] are the row's own, of its best bound. After
    `end` boxes stay as they are.
    """
    boxes = dict(boxes)
    for bend in bends:
        if time.monotonic() > end:
            break
        chain = begin()
        followed(chain, boxes)
        name = bend.reads()[0]
        mine = {key: chain.unflat(key, value) for key, value in slopes.items()}
        low, high = (chain.flat(name, side) for side in ends_of(chain, name))
        open_ = chain.flat(name, _relax.crossed(bend, chain.values, chain.values[name])) & ~chain.empty.unsqueeze(1)
        count = int(open_.sum(1).max())
        order = open_.int().argsort(dim=1, descending=True, stable=True)[:, :count]
        for at in torch.split(order, max(1, _sweep.block(chain, memory) // 2), 1) if count else ():
            if time.monotonic() > end:
                break
            units = torch.zeros(at.shape[1], *low.shape, dtype=chain.kind, device=at.device)
            units = units.scatter_(2, at.T.unsqueeze(-1), 1.0)
            found = _best(chain, bend, torch.cat([units, -units]), row, goal, mine, steps)
            below, above = found.chunk(2)
            asked = open_.gather(1, at)
            below, above = outward(below.T, chain.kind, -torch.inf), outward(-above.T, chain.kind, torch.inf)
            old_low, old_high = low.gather(1, at), high.gather(1, at)
            low = low.scatter(1, at, torch.where(asked, torch.maximum(old_low, below), old_low))
            high = high.scatter(1, at, torch.where(asked, torch.minimum(old_high, above), old_high))
        boxes[name] = low, high
    chain = begin()
    followed(chain, boxes)
    ends = {name: ends_of(chain, name) for name in boxes}
    return {name: (chain.flat(name, low), chain.flat(name, high)) for name, (low, high) in ends.items()}, chain.empty


def _best(
    chain: Chain, bend: Op, units: Tensor, row: Tensor, goal: Tensor, slopes: Mapping[str, Tensor], steps: int
) -> Tensor:
    """[R, B] float64: the best bound on units [R, B, n] times the input of `bend` in `steps` of Adam, and without."""
    push = {bend.result: chain.unflat(bend.reads()[0], units)}
    size = chain.values[chain.graph.output].size()
    later, alphas = False, dict[str, Tensor]()
    for op in chain.done:
        later |= op.result == bend.result
        if op.result in slopes and later:
            alphas[op.result] = slopes[op.result].detach().expand(len(units), *slopes[op.result].shape[1:]).clone()
    first = _slopes.drawn(chain, chain.graph.output, len(units))
    alphas = {result: alphas.get(result, start) for result, start in first.items()}

    def bound(gamma: Tensor, watch: dict[str, Tensor] | None = None) -> Tensor:
        scaled = gamma.unsqueeze(-1) * row
        found = chain.bound(chain.graph.output, scaled, lower=alphas, push=push, watch=watch)
        lost = (2 * chain.own * (scaled.detach().abs() * size).double() + TINY * size.double()).sum(-1)
        moved = gamma.double() * goal
        kept: Tensor = found - moved - 1.001 * lost - 8 * DOUBLE * moved.detach().abs()
        return kept

    none = row.new_zeros(len(units), chain.batch)
    best, power = _started(chain, bound, none, row, slopes)
    moving = [*alphas.values(), power]
    climb = _slopes.Adam(moving)
    for step in range(steps + 1):
        with torch.enable_grad():
            for value in moving:
                value.requires_grad_()
            found = bound(power.exp())
            total = found.sum()
        best = torch.maximum(best, found.detach())
        if step < steps:
            grads = torch.autograd.grad(total, moving, allow_unused=True, materialize_grads=True)
            climb.step(grads, _RATE)
            with torch.no_grad():
                for value in alphas.values():
                    value.clamp_(0, 1)
    return best


def _started(
    chain: Chain, bound: Callable[..., Tensor], none: Tensor, row: Tensor, slopes: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """[R, B]: the best bound of a few gammas, none among them, and the logarithm of the best one above zero."""
    watch, mine = dict[str, Tensor](), dict[str, Tensor]()
    best = bound(none, watch)
    chain.bound(chain.graph.output, row.unsqueeze(0), lower=slopes, watch=mine)
    _, radius = chain.ends.inside.split()
    image, alike = chain.graph.input, none
    if image in watch and image in mine:  # else no pixel moves one of them
        sizes = [(part[image].abs() * radius).flatten(2).sum(-1).clamp(min=TINY) for part in (watch, mine)]
        alike = (sizes[0] / sizes[1]).log().clamp(-20, 20)
    power, start = alike, torch.full_like(best, -torch.inf)
    for guess in _POWERS:
        found = bound((alike + guess).exp())
        power, start = torch.where(found > start, alike + guess, power), torch.maximum(found, start)
    return torch.maximum(best, start), power
