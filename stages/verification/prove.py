"""The proof: cases refuted by bounds on whole regions, the cheapest bounds first, then on ever smaller boxes."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from stages.bounds._interval import DOUBLE, gamma, outward
from stages.bounds.base import Box, Certifier
from stages.bounds.crown_forward import CrownForward, Planes
from stages.verification.cases import Array, Cases
from stages.verification.clock import Clock
from stages.verification.falsify import Hunt

_CHUNK = 64  # regions or boxes bounded at once, to begin with
_LARGEST = 1 << 13
_CLOSE = 2e-3
_SLOW = 1.0  # seconds that a chunk may take
_FIRST = 128
_DIRECT = 0.1  # of what a bound moves across a side counts beside what it loses by it


def refuted(lower: Tensor, bounds: Tensor) -> Tensor:
    """bool [...]: whether some row stays above its bound everywhere; lower and bounds are [..., U]."""
    return (lower > bounds).any(-1)


def on_regions(net: nn.Module, cases: Cases, still: Tensor, certifier: Certifier, clock: Clock) -> Tensor:
    """int64: the cases among `still` that the certifier's bounds on whole regions do not refute."""
    left = []
    for regions in torch.split(torch.unique(cases.region[still]), _CHUNK):
        if clock.left() <= 0:
            left.append(still[torch.isin(cases.region[still], regions)])
            continue
        mine = still[torch.isin(cases.region[still], regions)]
        asked = cases.bounds[mine].isfinite().any(0).nonzero().squeeze(1)
        lower = torch.full((len(cases.low), len(cases.rows)), -torch.inf, dtype=torch.float64)
        box = Box(cases.low[regions], cases.high[regions])
        with torch.no_grad():
            found = certifier.lower(net, box, cases.rows[asked].expand(len(regions), -1, -1))
        lower[regions.unsqueeze(1), asked] = found
        left.append(mine[~refuted(lower[cases.region[mine]], cases.bounds[mine])])
    return torch.cat(left) if left else still


@dataclass(frozen=True, slots=True)
class Boxes:
    """Sub-boxes float32 [M, n] of regions int64 [M], and the cases of their region that are open there, bool [M, J].

    `telling` float32 [M, n]: how much the bounds of the box, or of the one it was cut from, suffer by each input, per
    unit of its width.
    """

    low: Tensor
    high: Tensor
    region: Tensor
    still: Tensor
    telling: Tensor

    def __getitem__(self, rows: Tensor | slice) -> "Boxes":
        return Boxes(*(getattr(self, name)[rows] for name in Boxes.__slots__))

    def __len__(self) -> int:
        return len(self.low)

    @staticmethod
    def joined(parts: list["Boxes"]) -> "Boxes":
        return Boxes(*(torch.cat([getattr(part, name) for part in parts]) for name in Boxes.__slots__))


@dataclass(slots=True)
class Splitting:
    """Branch and bound over the inputs: a box in which a case stays open is cut in two across its most telling side.

    A case is met only where all its rows A x + c, below what the network answers, are at most their bounds: so a box is
    first clipped to what such half-spaces leave of it, the smallest box round all that is left for some open case
    (interval contraction, Jaulin et al. 2001, section 4.2). Telling is the side whose range makes the bound lose most
    (`_telling`), with a tenth of |A_i| times width, the row of each open case that is nearest to refuting it counted:
    both halves gain what a bound loses, and clipping has used what it depends on. Bounds are `quick`; where many miss
    by less than `_CLOSE` of the outputs' size, `exact` ones are formed for those. Boxes are bounded many at once, the
    newest first, so that memory stays small; few are cut again before they are bounded. Between chunks a few descents
    look for a witness in the boxes that are most open. A box whose every side is one step of float32 is not cut any
    further; then the answer stays open.
    """

    net: nn.Module
    cases: Cases
    quick: CrownForward
    exact: CrownForward
    hunt: Hunt
    boxes: int = 0
    chunk: int = 512
    hunted: float = 0.0

    def run(self, still: Tensor, clock: Clock) -> tuple[bool, Array | None]:
        """Whether every case int64 `still` was refuted everywhere, and the witness if one was met on the way."""
        cases_of, todo = self._begin(still)
        complete = True
        stack = [todo]
        while stack and clock.left() > 0:
            some = self._pop(stack)
            began = clock.spent()
            self.boxes += len(some)
            bounds = self.cases.bounds[cases_of[some.region]]  # [B, J, U]
            asked = bounds.isfinite().any(1).any(0).nonzero().squeeze(1)
            bounds = bounds[..., asked]
            found = self._planes(some, asked, bounds)
            some = clipped(some, found, bounds)
            keep = some.still.any(1)
            some, gap = some[keep], (bounds - found.lower.unsqueeze(1)).amin(2)[keep]
            if len(some):
                witness = self._look(some, cases_of[some.region], gap, clock)
                if witness is not None:
                    return False, witness
                some, cut = halves(some)
                while cut and len(some) < _FIRST and not stack:  # few boxes take as long as many
                    some, cut = halves(some)
                complete &= cut
                if len(some):
                    stack.append(some)
            self._pace(clock.spent() - began)
        return complete and not stack, None

    def _begin(self, still: Tensor) -> tuple[Tensor, Boxes]:
        """The open cases of each region in a row, int64 [G, J] (the last one repeated), and the regions as boxes."""
        regions = torch.unique(self.cases.region[still])
        mine = [still[self.cases.region[still] == g] for g in regions]
        most = max(len(cases) for cases in mine)
        cases_of = torch.zeros(len(self.cases.low), most, dtype=torch.int64)
        real = torch.zeros(len(regions), most, dtype=torch.bool)
        for place, (g, cases) in enumerate(zip(regions.tolist(), mine, strict=True)):
            cases_of[g] = cases[-1]
            cases_of[g, : len(cases)] = cases
            real[place, : len(cases)] = True
        low, high = self.cases.low[regions], self.cases.high[regions]
        return cases_of, Boxes(low, high, regions, real, torch.zeros_like(low))

    def _pop(self, stack: list[Boxes]) -> Boxes:
        """The newest boxes, at most a chunk of them."""
        parts, room = [], self.chunk
        while stack and room > 0:
            top = stack.pop()
            if len(top) > room:
                stack.append(top[: len(top) - room])
                top = top[len(top) - room :]
            parts.append(top)
            room -= len(top)
        return Boxes.joined(parts)

    def _planes(self, some: Boxes, asked: Tensor, bounds: Tensor) -> Planes:
        """Of the rows int64 [U] that cases ask for."""
        with torch.no_grad():
            rows = self.cases.rows[asked]
            found = self.quick.planes(self.net, Box(some.low, some.high), rows.expand(len(some), -1, -1))
            short = torch.where(some.still, (bounds - found.lower.unsqueeze(1)).amin(2), -torch.inf).amax(1)
            size = (self.net(some.low).double() @ rows.T).abs().amax(1)
            close = ((short >= 0) & (short < _CLOSE * size)).nonzero().squeeze(1)
            if len(close) > len(some) / 8:
                again = Box(some.low[close], some.high[close])
                better = self.exact.planes(self.net, again, rows.expand(len(close), -1, -1))
                for old, new in zip((found.lower, found.offset), (better.lower, better.offset), strict=True):
                    old[close] = new
                found.slopes[close] = 0.0
                found.owed[close] = 0.0
                columns = torch.searchsorted(found.free, better.free)  # fewer where some inputs are fixed in these
                found.owed[close.unsqueeze(1), :, columns] = better.owed.transpose(1, 2)
                found.slopes[close.unsqueeze(1), :, columns] = better.slopes.transpose(1, 2)
        return found

    def _look(self, some: Boxes, met: Tensor, gap: Tensor, clock: Clock) -> Array | None:
        """A witness from short descents in the boxes whose bounds leave the most room; a fifth of the time at most."""
        if self.hunted > clock.spent() / 5:
            return None
        began = clock.spent()
        room, place = torch.where(some.still, gap, -torch.inf).max(1)
        first = room.argsort(descending=True)[: self.hunt.particles]
        case = met[first].gather(1, place[first].unsqueeze(1)).squeeze(1)
        witness = self.hunt.around(some.low[first], some.high[first], case, clock)
        self.hunted += clock.spent() - began
        return witness

    def _pace(self, seconds: float) -> None:
        if seconds < _SLOW / 2:
            self.chunk = min(2 * self.chunk, _LARGEST)
        elif seconds > 2 * _SLOW and self.chunk > _CHUNK:
            self.chunk //= 2


def clipped(some: Boxes, found: Planes, bounds: Tensor) -> Boxes:
    """Every box cut down to a box that holds all its points where an open case can be met; bounds are [B, J, U].

    A x + c <= b leaves of side i what A_i x_i <= b - c - min sum_{k != i} A_k x_k allows. In float64, what is left
    moved outward by what that may lose, then to float32.
    """
    free = found.free
    low, high = some.low[:, free].double(), some.high[:, free].double()
    wide = torch.where(high > low, high - low, torch.inf)
    ends = torch.stack([found.slopes * low.unsqueeze(1), found.slopes * high.unsqueeze(1)])
    least, size = ends.amin(0).sum(2) + found.offset, ends.abs().amax(0).sum(2) + found.offset.abs()
    steep = torch.where(found.slopes == 0, 1.0, found.slopes.abs())
    left = (torch.full_like(low, torch.inf), torch.full_like(high, -torch.inf))
    still, near = [], torch.zeros_like(low)
    for mine, open_ in zip(bounds.unbind(1), some.still.unbind(1), strict=True):
        room = mine - least + 4 * gamma(len(free) + 16, DOUBLE) * (size + mine.abs())
        step = (room.unsqueeze(2) / steep).nan_to_num(torch.inf, torch.inf)  # a plane that is no number says nothing
        step = step + 4 * DOUBLE * (step.abs() + low.abs().unsqueeze(1) + high.abs().unsqueeze(1))
        below = torch.where(found.slopes < 0, high.unsqueeze(1) - step, -torch.inf).amax(1)
        above = torch.where(found.slopes > 0, low.unsqueeze(1) + step, torch.inf).amin(1)
        below, above = torch.maximum(below, low), torch.minimum(above, high)
        can = open_ & ~refuted(found.lower, mine) & (below <= above).all(1)
        still.append(can)
        left = (
            torch.where(can.unsqueeze(1), torch.minimum(below, left[0]), left[0]),
            torch.where(can.unsqueeze(1), torch.maximum(above, left[1]), left[1]),
        )
        nearest = (found.lower - mine).argmax(1)
        place = torch.arange(len(low)), nearest
        near = near + can.unsqueeze(1) * (_DIRECT * found.slopes[place].abs() + found.owed[place] / wide)
    new_low, new_high, telling = some.low.clone(), some.high.clone(), torch.zeros_like(some.low)
    new_low[:, free] = outward(left[0], some.low.dtype, -torch.inf).clamp(low, high).float()
    new_high[:, free] = outward(left[1], some.high.dtype, torch.inf).clamp(low, high).float()
    telling[:, free] = near.float()
    return replace(some, low=new_low, high=new_high, still=torch.stack(still, 1), telling=telling)


def halves(some: Boxes) -> tuple[Boxes, bool]:
    """Both halves of every box that can be cut, across the most telling side, and whether all could."""
    middle = some.low + (some.high - some.low) / 2
    width = torch.where((middle > some.low) & (middle < some.high), some.high - some.low, 0.0)
    telling = width * (some.telling + 1e-12)
    side = torch.where(telling.amax(1, keepdim=True) > 0, telling, width).argmax(1, keepdim=True)
    can = width.gather(1, side).squeeze(1) > 0
    at = middle.gather(1, side)
    left = replace(some, high=some.high.scatter(1, side, at))[can]
    right = replace(some, low=some.low.scatter(1, side, at))[can]
    return Boxes.joined([left, right]), bool(can.all())
