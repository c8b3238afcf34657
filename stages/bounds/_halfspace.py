"""What values can be where a row is refuted: less than what they can be on all of the box.

A point x of the box that refutes a row, row . f(x) <= goal, lies in the half-space A x + c <= goal, with A x + c the
linear bound below the row. So for a value z >= a x + b on the box, and any gamma >= 0,

    z >= a x + b + gamma (A x + c - goal)        at every such x,

whose least value over the box may be above that of a x + b (weak duality; Zhou et al., "Clip-and-Verify", 2025, section
3; Kotha et al., "Provably Bounding Neural Network Preimages", 2023, ask the same of all slopes at once). It is concave
in gamma, and its best is sought where its derivative, A x + c - goal at the least x, changes sign. Boxes formed like
this hold for the points that refute the row. Where nothing is left of one, or the row is bounded above the goal by
them, there is no such point: the row is above its goal, by how much is not known.

Rounding: all sums that count are float64, moved down by what they can lose and by what `Chain.bound` leaves to the end.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from stages.bounds._backward import Chain
from stages.bounds._interval import DOUBLE, TINY, gamma
from stages.bounds._neurons import Neurons

_HALVINGS = 8
_REACH = 6  # the best gamma is sought up to 2^6 times either way of what makes both terms alike


def offset(found: Tensor, least: Tensor, slopes: Tensor, size: Tensor, loss: float) -> Tensor:
    """b with z >= slopes x + b on the box, from the bound `found` and `least`, its part due to x; float64 [..., n].

    `size` is the largest |x|; what the transposes may lose at each entry of x is `loss` of it.
    """
    lost = (loss + gamma(slopes.shape[-1] + 8, DOUBLE)) * (slopes.abs() * size).sum(-1)
    return found - least - lost - 8 * DOUBLE * (found.abs() + least.abs()) - TINY


@dataclass(frozen=True, slots=True)
class Halfspace:
    """slopes x + offset <= 0 where a row is refuted, of each image; slopes, ends of the box float64 [B, n]."""

    slopes: Tensor
    offset: Tensor
    low: Tensor
    high: Tensor

    @staticmethod
    def of(chain: Chain, found: Tensor, slopes: Tensor, goal: Tensor) -> "Halfspace":
        """From bounds [B] on the rows and their coefficients [B, ...] of the image."""
        loss, flat = chain.input_loss(), slopes.flatten(1).double()
        least = chain.ends.least(slopes.unsqueeze(0), loss)[0]
        low, high = (end.flatten(1).double() for end in (chain.ends.inside.low, chain.ends.inside.high))
        size = torch.maximum(low.abs(), high.abs())
        return Halfspace(flat, offset(found, least, flat, size, loss) - goal, low, high)

    def better(self, rows: Chain | Neurons, found: Tensor, slopes: Tensor) -> Tensor:
        """[R, B] no less than `found`, by what is left of the box; of single neurons [1, R]."""
        chain = rows.chain if isinstance(rows, Neurons) else rows
        loss = chain.input_loss()
        if isinstance(rows, Neurons):
            mine, a = self.of_images(rows.images), slopes.flatten(1).double().unsqueeze(0)
            least = rows.least_of(slopes).unsqueeze(0)
        else:
            mine, a, least = self, slopes.flatten(2).double(), chain.ends.least(slopes, loss)
        size = torch.maximum(mine.low.abs(), mine.high.abs())
        b = offset(found, least, a, size, loss)
        share = mine._best(a.to(chain.kind)).double()
        both = a + share.unsqueeze(-1) * mine.slopes
        ends = torch.where(both > 0, mine.low, mine.high)
        lost = (a.abs() * size).sum(-1) + share * ((mine.slopes.abs() * size).sum(-1) + mine.offset.abs()) + b.abs()
        moved = (both * ends).sum(-1) + b + share * mine.offset - 4 * gamma(a.shape[-1] + 16, DOUBLE) * lost - TINY
        return torch.maximum(found, torch.where(moved.isfinite(), moved, -torch.inf))

    def of_images(self, images: Tensor) -> "Halfspace":
        return Halfspace(self.slopes[images], self.offset[images], self.low[images], self.high[images])

    def _best(self, a: Tensor) -> Tensor:
        """[R, B]: a good gamma for coefficients a [R, B, n]."""
        kind = a.dtype
        radius = ((self.high - self.low) / 2).to(kind)
        mine = self.slopes.to(kind)
        start = (self.offset + (self.slopes * (self.low + self.high) / 2).sum(-1)).to(kind)
        weights = mine * radius
        alike = (a.abs() * radius).sum(-1) / weights.abs().sum(-1).clamp(min=TINY)
        low, high = torch.full_like(alike, -_REACH), torch.full_like(alike, _REACH)
        for _ in range(_HALVINGS):
            power = (low + high) / 2
            sides = (a + (alike * power.exp2()).unsqueeze(-1) * mine).sign()
            rises = start - (weights * sides).sum(-1) > 0
            low, high = torch.where(rises, power, low), torch.where(rises, high, power)
        return alike * low.exp2()
