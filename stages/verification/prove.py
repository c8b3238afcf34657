"""The proof: cases refuted by bounds on whole regions, the cheapest bounds first, then on ever smaller boxes."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stages.bounds.base import Box, Certifier
from stages.verification.cases import Array, Cases
from stages.verification.clock import Clock
from stages.verification.falsify import Hunt

_CHUNK = 64  # regions or boxes bounded at once, to begin with
_LARGEST = 1 << 13
_CLOSE = 2e-3
_SLOW = 1.0  # seconds that a chunk may take
_FIRST = 128


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
    """Sub-boxes float32 [M, n] of regions int64 [M], and the cases of their region that are open there, bool [M, J]."""

    low: Tensor
    high: Tensor
    region: Tensor
    still: Tensor

    def __getitem__(self, rows: Tensor | slice) -> "Boxes":
        return Boxes(self.low[rows], self.high[rows], self.region[rows], self.still[rows])

    def __len__(self) -> int:
        return len(self.low)


@dataclass(slots=True)
class Splitting:
    """Branch and bound over the inputs: a box in which a case stays open is cut in two across its most telling side.

    Bounds are `quick`; where many miss by less than `_CLOSE` of the outputs' size, `exact` ones are formed for those.
    Telling is the side with the largest |d g / d x_i| times width, with g the distance to being met of the nearest open
    case and the gradient taken in the middle of the box. Boxes are bounded many at once, the newest first, so that
    memory stays small; between chunks a few descents look for a witness in the boxes that are most open. A box whose
    every side is one step of float32 is not cut any further; then the answer stays open.
    """

    net: nn.Module
    cases: Cases
    quick: Certifier
    exact: Certifier
    hunt: Hunt
    boxes: int = 0
    chunk: int = 512
    hunted: float = 0.0

    def run(self, still: Tensor, clock: Clock) -> tuple[bool, Array | None]:
        """Whether every case int64 `still` was refuted everywhere, and the witness if one was met on the way."""
        cases_of, todo = self._begin(still)
        complete = True
        while complete and len(todo) < _FIRST:  # a chunk of few boxes takes as long as one of many
            todo, complete = self._halves(todo, cases_of[todo.region])
        stack = [todo]
        while stack and clock.left() > 0:
            some = self._pop(stack)
            began = clock.spent()
            met = cases_of[some.region]  # [B, J]
            bounds = self.cases.bounds[met]
            lower = self._lower(some, bounds)
            some = Boxes(some.low, some.high, some.region, some.still & ~refuted(lower.unsqueeze(1), bounds))
            self.boxes += len(some)
            keep = some.still.any(1)
            some, met, gap = some[keep], met[keep], (bounds - lower.unsqueeze(1)).amin(2)[keep]
            if len(some):
                halves, cut = self._halves(some, met)
                complete &= cut
                stack.append(halves)
                witness = self._look(some, met, gap, clock)
                if witness is not None:
                    return False, witness
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
        return cases_of, Boxes(self.cases.low[regions], self.cases.high[regions], regions, real)

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
        return Boxes(
            torch.cat([part.low for part in parts]),
            torch.cat([part.high for part in parts]),
            torch.cat([part.region for part in parts]),
            torch.cat([part.still for part in parts]),
        )

    def _lower(self, some: Boxes, bounds: Tensor) -> Tensor:
        """[B, U]; -inf for rows that no case asks for."""
        asked = bounds.isfinite().any(1).any(0).nonzero().squeeze(1)
        lower = some.low.new_full((len(some), len(self.cases.rows)), -torch.inf, dtype=torch.float64)
        with torch.no_grad():
            rows = self.cases.rows[asked]
            lower[:, asked] = self.quick.lower(self.net, Box(some.low, some.high), rows.expand(len(some), -1, -1))
            short = torch.where(some.still, (bounds - lower.unsqueeze(1)).amin(2), -torch.inf).amax(1)
            size = (self.net(some.low).double() @ rows.T).abs().amax(1)
            close = ((short >= 0) & (short < _CLOSE * size)).nonzero().squeeze(1)
            if len(close) > len(some) / 8:
                again = Box(some.low[close], some.high[close])
                lower[close.unsqueeze(1), asked] = self.exact.lower(self.net, again, rows.expand(len(close), -1, -1))
        return lower

    def _halves(self, some: Boxes, met: Tensor) -> tuple[Boxes, bool]:
        """Both halves of every box that can be cut, and whether all could."""
        middle = some.low + (some.high - some.low) / 2
        width = torch.where((middle > some.low) & (middle < some.high), some.high - some.low, 0.0)
        telling = width * (self._slope(middle, some.still, met).abs() + 1e-12)
        side = torch.where(telling.amax(1, keepdim=True) > 0, telling, width).argmax(1, keepdim=True)
        can = width.gather(1, side).squeeze(1) > 0
        at = middle.gather(1, side)
        left = Boxes(some.low, some.high.scatter(1, side, at), some.region, some.still)[can]
        right = Boxes(some.low.scatter(1, side, at), some.high, some.region, some.still)[can]
        both = Boxes(
            torch.cat([left.low, right.low]),
            torch.cat([left.high, right.high]),
            left.region.repeat(2),
            left.still.repeat(2, 1),
        )
        return both, bool(can.all())

    def _slope(self, x: Tensor, still: Tensor, met: Tensor) -> Tensor:
        """[B, n]: the gradient of the nearest open case's distance to being met."""
        point = x.clone().requires_grad_()
        with torch.enable_grad():
            values = self.net(point).double() @ self.cases.rows.T
            far = (values.unsqueeze(1) - self.cases.bounds[met]).amax(2)
            nearest = torch.where(still, far, torch.inf).amin(1)
            (slope,) = torch.autograd.grad(nearest.sum(), point)
        return slope.nan_to_num(0.0)

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
