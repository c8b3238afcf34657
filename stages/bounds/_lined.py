"""Coefficients through the lines of an elementwise operation, with intercepts that cover what is lost on the way."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stages.bounds import _linear, _relax
from stages.bounds._trace import Op

if TYPE_CHECKING:
    from stages.bounds._backward import Chain

BLOCK = 128


@dataclass(frozen=True, slots=True)
class Lined:
    """Coefficients through lines: a positive one takes the line below, a negative one the line above.

    `slopes` below and above by operand, `floor` the intercept below and `gap` how much higher the one above is; `shift`
    the intercept of a free slope of 1 below a ReLU, whose line goes through 0; `rises` the slopes above less
    those below.
    """

    result: str
    slopes: Mapping[str, tuple[Tensor, Tensor]]
    floor: Tensor
    gap: Tensor
    shift: Tensor | None
    rises: Mapping[str, Tensor]

    def __call__(self, chain: "Chain", slopes: Tensor, lower: Tensor | None) -> tuple[_linear.Pulled, Tensor]:
        negative = slopes.clamp(max=0)
        base, extra = self.floor, self.gap
        found = {}
        for name, (fixed, up) in self.slopes.items():
            down = fixed
            if lower is not None and self.shift is not None:
                # Relative to the line below that `floor` was made for.
                down = torch.where(fixed != up, lower, fixed)
                change = (down - fixed) * self.shift
                base, extra = base + change, extra - change
            rise = self.rises[name] if down is fixed else up - down
            part = slopes * down if down is up else (slopes * down).addcmul_(negative, rise)
            found[name] = _linear.sum_to(part, chain.values[name].low.shape)
        return found, chain.sums(self.result, (slopes, base), (negative, extra))


def _rises(lines: _relax.Lines) -> dict[str, Tensor]:
    return {name: up - down for name, (down, up) in lines.slopes.items()}


def blocked(rows: Tensor) -> Tensor:
    """Sums over the last dimension, in blocks and then in float64."""
    whole = rows.shape[-1] // BLOCK * BLOCK
    if not whole:
        return rows.sum(-1).double()
    total: Tensor = rows[..., :whole].reshape(*rows.shape[:-1], -1, BLOCK).sum(-1).sum(-1, dtype=torch.float64)
    return total if whole == rows.shape[-1] else total + rows[..., whole:].sum(-1)


def elementwise(chain: "Chain", op: Op, lines: _relax.Lines) -> Lined:
    """Offset and slack of the operands go into the intercepts."""
    kind = lines.low.dtype
    fans = 4 * chain.own * chain.readers(op.result) * chain.values[op.result].size().to(kind)
    low, high = lines.low - fans, lines.high + fans
    shift = None
    size, free = low.abs() + high.abs(), torch.zeros_like(low)
    for name, (down, up) in lines.slopes.items():
        offset, slack = chain.folded(name, op, kind)
        low = low + down.to(kind) * offset - down.to(kind).abs() * slack
        high = high + up.to(kind) * offset + up.to(kind).abs() * slack
        size = size + offset.abs() + slack
        if op.kind == "relu":  # by what a free slope may move an end
            free, shift = offset.abs() + slack, (offset - slack).to(chain.kind)
    floor, gap = chain.ends_of_lines(low, high, size, free)
    return Lined(op.result, lines.slopes, floor, gap, shift, _rises(lines))


def relu(chain: "Chain", op: Op, lines: _relax.Lines) -> Lined:
    """The same in few steps, where the operand's slack is `paid`.

    With offset b and slack e, a line below of slope d has d (b - e), the line above up (b + e) + lift. What a sum over
    blocks loses, 2.1 dots of all intercepts, is in e as far as it comes from b, and in the factor of the lift.
    """
    [(name, (down, up))] = lines.slopes.items()
    offset, slack = chain.offset.get(name), chain.slack[name]
    above = chain.values[op.result].high.to(chain.kind)
    shift = -slack if offset is None else offset - slack
    over = slack if offset is None else offset + slack
    fans = 4 * chain.own * (chain.readers(op.result) + 1)
    floor = (down * shift).sub_(above, alpha=fans)
    ceiling = (up * over).add_(lines.high, alpha=1 + 2.1 * chain.dots + 16 * chain.own)
    gap = (ceiling - floor).add_(above, alpha=2 * fans)
    return Lined(op.result, lines.slopes, floor, gap, shift, _rises(lines))
