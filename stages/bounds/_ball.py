"""The least value of a linear function over the inputs: a box, or an l2 or l1 ball cut with a box."""

import torch
from torch import Tensor

from stages.bounds import _layout
from stages.bounds._interval import DOUBLE, SINGLE, TINY, Interval, gamma, outward
from stages.bounds.base import Box

_HALVINGS = 40


class Ends:
    """min over x of a^T x, for many a at once, in float64 and moved down by what float64 can lose.

    Box: a^T m - |a|^T r with midpoint m and radius r.
    l1 ball of radius eps round x0, cut with the box: moving entry i by t changes a^T x by -|a_i| t, up to the entry's
    room in the box; the budget eps goes to the largest |a_i| first (a fractional knapsack, exact).
    l2 ball, cut with the box: for every lam > 0
        min >= a^T x0 + sum_i min_{d_i in box} (a_i d_i + lam d_i^2 / 2) - lam eps^2 / 2
    by weak duality, with d_i = clip(-a_i / lam); the best lam, where ||d|| = eps, is found by bisection (any is sound).
    """

    def __init__(self, box: Box, kind: torch.dtype, last: bool) -> None:
        ends = outward(box.low, kind, -torch.inf), outward(box.high, kind, torch.inf)
        self.inside = Interval(*(_layout.last(end, last) for end in ends))
        self._own = SINGLE if kind == torch.float32 else DOUBLE
        self._parts: dict[float, tuple[Tensor, Tensor]] = {}
        self.ball = box.ball
        if box.ball is not None:
            self._low, self._high = box.low.double().flatten(1), box.high.double().flatten(1)
            self._size = torch.maximum(self._low.abs(), self._high.abs())
            # Points in the ball are given in float32: rounding may carry them that much out of it.
            order = 1.0 if box.ball.norm == "l1" else 2.0
            norms = torch.linalg.vector_norm(box.ball.centre.double().flatten(1), order, 1)
            self._reach = box.ball.eps * (1 + 1e-6) + 2.0**-23 * norms

    def least(self, slopes: Tensor, loss: float) -> Tensor:
        """[R, B] from [R, B, n] or more dimensions; `loss` times |a|^T |x| is taken off as well."""
        if self.ball is None:
            return self._box(slopes, loss)
        flat = slopes.flatten(2).double()
        share = loss + gamma(4 * flat.shape[-1] + 32, DOUBLE)
        move = self._l1 if self.ball.norm == "l1" else self._l2
        centre = self.ball.centre.double().flatten(1)
        found = torch.einsum("rbn,bn->rb", flat, centre) + move(flat, centre)
        found = found - share * torch.einsum("rbn,bn->rb", flat.abs(), self._size) - TINY
        return torch.maximum(found, self._box(slopes, loss))

    def lowest(self, slopes: Tensor) -> Tensor:
        """[B, ...]: points of the box where slopes [B, ...] have their least value there, or nearly so in a ball."""
        inside = self.inside
        if self.ball is None:
            return torch.where(slopes > 0, inside.low, inside.high)
        flat, centre = slopes.flatten(1).double().unsqueeze(0), self.ball.centre.double().flatten(1)
        step = self._l1_step(flat, centre) if self.ball.norm == "l1" else self._l2_step(flat, centre)[0]
        point = (centre + step[0]).view(slopes.shape).to(slopes.dtype)
        return torch.minimum(torch.maximum(point, inside.low), inside.high)

    def _box(self, slopes: Tensor, loss: float) -> Tensor:
        """Terms a m - |a| r' in the precision of the slopes, summed in float64; r' pays for what all that may lose."""
        middle, wide = self.parts(loss)
        return _summed((slopes * middle).addcmul_(slopes.abs(), wide, value=-1)) - TINY

    def parts(self, loss: float) -> tuple[Tensor, Tensor]:
        """m and r' of the box."""
        if loss in self._parts:
            return self._parts[loss]
        middle, radius = self.inside.split()
        # Units of max |x|: four for a term, one for the radius, one for r' and seven for adding up eight terms.
        share = loss + 16 * self._own + 4 * gamma(middle[0].numel() + 32, DOUBLE)
        self._parts[loss] = middle, torch.add(radius, self.inside.size(), alpha=share)
        return self._parts[loss]

    def _l1(self, flat: Tensor, centre: Tensor) -> Tensor:
        return (flat * self._l1_step(flat, centre)).sum(-1)

    def _l1_step(self, flat: Tensor, centre: Tensor) -> Tensor:
        room = torch.where(flat > 0, centre - self._low, self._high - centre).clamp(min=0)
        order = flat.abs().argsort(-1, descending=True)
        room = room.gather(-1, order)
        left = (self._reach.unsqueeze(-1) - (room.cumsum(-1) - room)).clamp(min=0)
        away = torch.zeros_like(flat).scatter(-1, order, torch.minimum(room, left))
        return -flat.sign() * away

    def _l2(self, flat: Tensor, centre: Tensor) -> Tensor:
        step, lam = self._l2_step(flat, centre)
        least: Tensor = (flat * step + lam * step**2 / 2).sum(-1) - lam[..., 0] * self._reach**2 / 2
        return least

    def _l2_step(self, flat: Tensor, centre: Tensor) -> tuple[Tensor, Tensor]:
        down, up = (self._low - centre).clamp(max=0), (self._high - centre).clamp(min=0)
        reach = self._reach.clamp(min=TINY).unsqueeze(-1)
        high = flat.norm(dim=-1, keepdim=True) / reach + TINY
        low = high * 1e-6
        with torch.no_grad():  # at the best lam the bound does not move with it
            for _ in range(_HALVINGS):
                lam = (low * high).sqrt()
                wide = torch.minimum(torch.maximum(-flat / lam, down), up).norm(dim=-1, keepdim=True) > reach
                low, high = torch.where(wide, lam, low), torch.where(wide, high, lam)
        high = high.detach()
        return torch.minimum(torch.maximum(-flat / high, down), up), high


def _summed(terms: Tensor) -> Tensor:
    """[R, B] float64 from [R, B, ...]; the order of the entries does not matter."""
    if terms.dim() == 5:
        terms = terms.permute(0, 1, 3, 4, 2)
    flat = terms.flatten(2)
    if flat.shape[-1] % 8 == 0:  # eighths first: there is less to make float64 of
        flat = flat.view(*flat.shape[:2], 8, -1).sum(2)
    return flat.double().sum(-1)
