"""Branch and bound over ReLUs: one of open sign is taken as off in one half of a domain and as on in the other."""

from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from stages.bounds import _sweep
from stages.bounds._backward import Chain, Pull
from stages.bounds._interval import UNITS
from stages.bounds._linear import Pulled
from stages.bounds.base import Box
from stages.method import InputError
from stages.verification.cases import Array, Cases
from stages.verification.clock import Clock
from stages.verification.falsify import Hunt

_ROUNDS, _ROOT_ROUNDS, _LAST_ROUNDS = 10, 40, 200
_RATE = 0.15
_DECAY, _SLOW_DECAY = 0.95, 0.98
_CHUNK = 16
_LARGEST = 512
_SLOW = 1.5  # seconds that a chunk may take
_MEMORY = 1.0  # GiB of coefficients

Split = tuple[int, int, bool]  # which ReLU layer, which neuron of it, on
Domain = tuple[Split, ...]


@dataclass(frozen=True, slots=True)
class Layer:
    """A ReLU of the trace: the value that it reads, and bounds [n] of that over the region."""

    result: str
    reads: str
    low: Tensor
    high: Tensor


@dataclass(slots=True)
class Branching:
    """For every open case the row that CROWN leaves nearest to a proof is bounded on ever smaller domains.

    A domain is a region and a set of signs. Its bound is beta-CROWN's: max over alpha in [0, 1] (slopes of the lines
    below open ReLUs) and beta >= 0 of the least value of  row . f(x) - sum_j beta_j s_j z_j,  s_j the sign taken, found
    by a few steps of Adam; whatever alpha and beta come out, it is a lower bound where s_j z_j >= 0 for all j. Boxes of
    the layers are those of the region by CROWN, cut with the signs. The ReLU to split is the one whose relaxation costs
    the bound most, |a_j| u_j (-l_j) / (u_j - l_j), with a_j its coefficient in the backward pass (after BaBSR, Bunel et
    al. 2020; where a_j > 0 it counts half).
    Source: Wang et al., "Beta-CROWN", 2021, equations 8 to 12. Departures: boxes of the layers are not formed anew in a
    domain; alpha starts from that of the whole region. Where every sign is taken, more steps
    are the last resort.
    """

    net: nn.Module
    cases: Cases
    hunt: Hunt
    domains: int = 0
    chunk: int = _CHUNK
    hunted: float = 0.0
    layers: list[Layer] = field(default_factory=list)
    boxes: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    lower: Tensor = field(default_factory=lambda: torch.empty(0))
    region: int = -1
    slopes: list[Tensor] = field(default_factory=list)

    def run(self, still: Tensor, clock: Clock) -> tuple[Tensor, Array | None]:
        """The cases of int64 `still` that stay open, and a witness if the search met one on the way."""
        left = still
        for case in still.tolist():
            done, witness = self._case(case, left, clock)
            if witness is not None:
                return left, witness
            if done:
                left = left[left != case]
            elif clock.left() <= 0:
                break
        return left, None

    def _case(self, case: int, left: Tensor, clock: Clock) -> tuple[bool, Array | None]:
        g = int(self.cases.region[case])
        if g != self.region:
            self._root(g)
        row, bound = self._nearest(case)
        stack: list[Domain] = [()]
        settled: list[Domain] = []
        while stack and clock.left() > 0:
            began = clock.spent()
            some, stack = stack[-self.chunk :], stack[: -self.chunk]
            self.domains += len(some)
            lower, scores = self._bound(g, some, row, bound, _ROUNDS if some != [()] else _ROOT_ROUNDS)
            for domain, value, score in zip(some, lower.tolist(), scores, strict=True):
                if value > bound:
                    continue
                if float(score.max()) <= 0:
                    settled.append(domain)
                    continue
                layer, neuron = self._place(int(score.argmax()))
                stack += [(*domain, (layer, neuron, on)) for on in (False, True)]
            self._pace(clock.spent() - began)
            if self.hunted < clock.spent() / 5:
                began = clock.spent()
                witness = self.hunt.round(left, clock)
                self.hunted += clock.spent() - began
                if witness is not None:
                    return False, witness
        # Nothing is left to split in these: only better multipliers can help.
        while settled and not stack and clock.left() > 0:
            some, settled = settled[: self.chunk], settled[self.chunk :]
            if bool((self._bound(g, some, row, bound, _LAST_ROUNDS)[0] <= bound).any()):
                return False, None
        return not stack and not settled, None

    def _root(self, g: int) -> None:
        """Boxes of what all layers read over a region, and CROWN's bounds of all rows."""
        chain = Chain(self.net, Box(self.cases.low[g : g + 1], self.cases.high[g : g + 1]), UNITS["float32"], False)
        self.layers, self.boxes, self.region = [], {}, g
        with torch.no_grad():
            _sweep.follow(chain, lambda op: _sweep.tighten(chain, op, _MEMORY))
            self.lower = _sweep.logits(chain, self.cases.rows.unsqueeze(0), _MEMORY)[0]
        for op in chain.graph.ops:
            if op.result in chain.fronts:
                for name in chain.operands(op):
                    box = chain.values[name]
                    self.boxes[name] = box.low, box.high
                    if op.kind == "relu":
                        low, high = (chain.flat(name, end)[0] for end in (box.low, box.high))
                        self.layers.append(Layer(op.result, name, low, high))
        if not self.layers:
            raise InputError("branching: the network has no ReLU, so there is no sign to split on")

    def _nearest(self, case: int) -> tuple[Tensor, float]:
        """The row [K] of a case that is nearest to staying above its bound, relative to its weights; and the bound."""
        self.slopes = [(layer.high > -layer.low).to(layer.low.dtype) for layer in self.layers]
        bounds = self.cases.bounds[case]
        short = (self.lower - bounds) / self.cases.rows.abs().sum(1)
        best = int(torch.where(bounds.isfinite(), short, -torch.inf).argmax())
        return self.cases.rows[best], float(bounds[best])

    def _bound(self, g: int, domains: list[Domain], row: Tensor, bound: float, rounds: int) -> tuple[Tensor, Tensor]:
        """[B] lower bounds, and [B, neurons] how much splitting each promises (0 where the sign is settled)."""
        chain, signs = self._chain(g, domains)
        slopes = row.to(chain.kind).expand(1, len(domains), -1)
        names = [layer.reads for layer in self.layers]
        alpha = [start.expand(len(domains), -1).clone().requires_grad_() for start in self.slopes]
        beta = [torch.zeros_like(sign).requires_grad_() for sign in signs]
        best = torch.full((len(domains),), -torch.inf, dtype=torch.float64)
        steps = torch.optim.Adam([*alpha, *beta], lr=_RATE)
        lower, push, seen = dict[str, Tensor](), dict[str, Tensor](), dict[str, Tensor]()
        for step in range(rounds):
            lower = {
                layer.result: chain.unflat(name, a).unsqueeze(0)
                for layer, name, a in zip(self.layers, names, alpha, strict=True)
            }
            push = {
                layer.result: chain.unflat(name, -b * sign).unsqueeze(0)
                for layer, name, b, sign in zip(self.layers, names, beta, signs, strict=True)
            }
            value = chain.bound(chain.graph.output, slopes, lower, push)[0]
            best = torch.maximum(best, value.detach().nan_to_num(-torch.inf))
            if step == rounds - 1 or bool((best > bound).all()):
                break
            steps.zero_grad()
            torch.autograd.backward(torch.where(best > bound, 0.0, -value).sum())
            steps.step()
            for group in steps.param_groups:
                group["lr"] *= _DECAY if rounds < _LAST_ROUNDS else _SLOW_DECAY
            with torch.no_grad():
                for a in alpha:
                    a.clamp_(0, 1)
                for b in beta:
                    b.clamp_(min=0)
        if domains == [()]:
            self.slopes = [a.detach()[0] for a in alpha]
        with torch.no_grad():
            self._spy(chain, seen)
            chain.bound(chain.graph.output, slopes, lower, push)
        return best, self._scores(chain, seen)

    def _chain(self, g: int, domains: list[Domain]) -> tuple[Chain, list[Tensor]]:
        """The region once for every domain, with its signs: [B, n] per layer, +1 on, -1 off, 0 open."""
        count = len(domains)
        box = Box(self.cases.low[g].expand(count, -1), self.cases.high[g].expand(count, -1))
        signs = [torch.zeros(count, len(layer.low)) for layer in self.layers]
        for b, domain in enumerate(domains):
            for layer, neuron, on in domain:
                signs[layer][b, neuron] = 1.0 if on else -1.0
        taken = {layer.result: sign for layer, sign in zip(self.layers, signs, strict=True)}
        chain = Chain(self.net, box, UNITS["float32"], False)
        with torch.no_grad():
            for op in chain.graph.ops:
                if op.result not in chain.graph.moving:
                    continue
                if not op.counts and not chain.is_linear(op):
                    for name in chain.operands(op):
                        low, high = self.boxes[name]
                        if op.result in taken:
                            sign = chain.unflat(name, taken[op.result])
                            low = torch.where(sign > 0, low.clamp(min=0), low)
                            high = torch.where(sign < 0, high.clamp(max=0), high)
                        chain.tighten(name, low, high)
                chain.follow(op)
        return chain, signs

    def _spy(self, chain: Chain, seen: dict[str, Tensor]) -> None:
        """The next backward passes leave the coefficients [1, B, ...] of every ReLU's result in `seen`."""
        for layer in self.layers:
            pull = chain.fronts[layer.result]

            chain.fronts[layer.result] = partial(_spying, pull, layer.result, seen)

    def _scores(self, chain: Chain, seen: dict[str, Tensor]) -> Tensor:
        found = []
        for layer in self.layers:
            box = chain.values[layer.reads]
            low, high = (chain.flat(layer.reads, end) for end in (box.low, box.high))
            crossing = (low < 0) & (high > 0)
            room = torch.where(crossing, -low * high / (high - low).clamp(min=1e-30), 0.0)
            if layer.result in seen:
                slope = chain.flat(layer.result, seen[layer.result])[0]
                found.append(room * torch.where(slope < 0, -slope, 0.5 * slope))
            else:
                found.append(torch.zeros_like(room))
        return torch.cat(found, 1)

    def _place(self, at: int) -> tuple[int, int]:
        for k, layer in enumerate(self.layers):
            if at < len(layer.low):
                return k, at
            at -= len(layer.low)
        raise IndexError(at)

    def _pace(self, seconds: float) -> None:
        if seconds < _SLOW / 2:
            self.chunk = min(2 * self.chunk, _LARGEST)
        elif seconds > 2 * _SLOW and self.chunk > 1:
            self.chunk //= 2


def _spying(
    pull: Pull, name: str, seen: dict[str, Tensor], slopes: Tensor, lower: Tensor | None
) -> tuple[Pulled, Tensor]:
    seen[name] = slopes
    return pull(slopes, lower)
