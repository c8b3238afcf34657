"""A chain for few rows: slack by channel in place of by entry, which takes no convolutions of its own.

Where a network is followed once for a handful of rows (CROWN-IBP), a third convolution for the slack of every layer
costs as much as a row. With m_c no less than the values of channel c, |L| m is no less than sum_c |W_oc| m_c anywhere,
|W_oc| the sum of the kernel's sizes, for images of any size: a product of small matrices. A ReLU then needs no
intercepts by entry either. With coefficients a, p = a down + min(a, 0) (up - down) those of its operand, b the offset
and e the slack,

    sum p b - |p| e - lift |min(a, 0)|,  |p| = p - 2 up min(a, 0),  lift <= up (-l)_+ (but for rounding)

is sum_c (b - e)_c sum p + sum min(a, 0) up ((-l)_+ + 2 e).

A normalisation that nothing but a ReLU reads is part of the ReLU's slopes. What a padded convolution would make
different from pixel to pixel, an offset of its operand, is paid at the operand (`settled`). Where each pixel goes its
own way at first, to a normalised image, the way back ends at its box. Channels that are off are left out (`_alive`).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import threshold

from stages.bounds import _alive, _layout, _linear, _lined, _ops, _slack, _stored
from stages.bounds._backward import Chain
from stages.bounds._interval import TINY, Interval, gamma, outward
from stages.bounds._trace import Op, Trace, fill
from stages.bounds.base import Box

_NORM = "_native_batch_norm_legit_no_training"
_APIECE = frozenset({"add", "sub", "mul", "div"})


class Channelwise(Chain):
    """Nothing in it is kept for gradients."""

    def __init__(self, net: nn.Module, box: Box, unit: float, double: bool, graph: Trace | None = None) -> None:
        super().__init__(net, box, unit, double, graph)
        self.peaks: dict[str, Tensor] = {}
        self.thins: dict[str, Tensor] = {}
        self._near: set[str] = set()
        self.settled: dict[str, tuple[Tensor, Tensor]] = {}
        self.alive: dict[str, Tensor] = {}  # channels that are left of a value's coefficients, or of a value (`_alive`)
        self.slim: dict[str, Op] = {}  # convolutions as they pass on what is left of their results' coefficients
        if any(op.kind != "convolution" for op in self.graph.ops if self.graph.input in op.reads()):
            # As they came: three channels last make short loops.
            low, high = outward(box.low, self.kind, -torch.inf), outward(box.high, self.kind, torch.inf)
            self.values[self.graph.input] = Interval(low.contiguous(), high.contiguous())
        self.made = {op.result: op for op in self.graph.ops}
        self._early = [] if box.ball else self._alone()
        self.begins.update(self._early[-1:])
        self._shared = {self.graph.output}.union(
            *(op.reads() for op in self.graph.ops if not op.counts and op.kind != "convolution")
        )
        self._padded = {
            name for op in self.graph.ops if op.kind == "convolution" and any(op.args[4]) for name in op.reads()[:1]
        }

    def follow(self, op: Op) -> None:
        """Shortcuts that step over pixels go to the front of what reads the same value: the way back, the other way
        around, then adds what they give to what is there, in place of laying out mostly zeros for a sum."""
        op = self.made[op.result] = _alive.reading(self, op)
        super().follow(op)
        if not op.counts and _linear.skips(op, self.values):
            self.done.pop()
            places = [place for place, before in enumerate(self.done) if before.result == op.reads()[0]]
            self.done.insert(places[0] + 1 if places else 0, op)

    def start(self, name: str, slopes: Tensor) -> Tensor:
        self._shared.add(name)  # with whom asks
        if name not in self.settled:
            return super().start(name, slopes)
        return slopes.new_zeros(len(slopes), self.batch, dtype=torch.float64)  # comes with the coefficients

    def _pull(self, op: Op, here: Any, waiting: dict[str, Any], lent: bool = False) -> Tensor | None:
        op, name = self.slim.get(op.result, op), op.reads()[0]
        there = waiting.get(name) if self.owned(name) and not lent else None
        if op.kind == "add" and op.result in self.alive:
            waiting.update(dict.fromkeys(self.operands(op), here))  # which nobody else reads
        elif there is not None and _linear.skips(op, self.values):
            _linear.add_skipping(op, self.values, here, there)
        else:
            super()._pull(op, here, waiting)
        if op.result not in self.settled:
            return None
        offset, slack = self.settled[op.result]
        return self.sums(op.result, (here, offset), (here.abs(), -slack))

    def _alone(self) -> list[str]:
        """What becomes of the image, one after the other, as long as every pixel goes its own way (a normalisation)."""
        found, name = [], self.graph.input
        readers = {
            read: [op for op in self.graph.ops if read in op.reads() and not op.counts] for read in self.graph.entries
        }
        while len(readers[name]) == 1 and readers[name][0].reads().count(name) == 1:
            op = readers[name][0]
            others = [read for read in op.reads() if read != name and read in self.graph.moving]
            same = self.graph.entries.get(op.result) == self.graph.entries[self.graph.input]
            if op.kind not in _APIECE or others or not same or op.result == self.graph.output:
                break
            name = op.result
            found.append(name)
        return found

    def _carry(self, op: Op, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if op.result in self._early:  # its box is all that is asked of it
            return
        source = op.reads()[0]
        if op.kind == "getitem" and source in self.peaks:
            self.set_peak(op.result, self.peaks[source])
            if source in self.thins and self.readers(op.result) == 1:
                self.thins[op.result] = self.thins[source]
        super()._carry(op, args, kwargs)
        if op.result in self._padded and op.result in self.offset and self.images(op.result):
            self.peak(op.result)
            offset, slack = self.offset.pop(op.result), self.slack.pop(op.result)
            self.paid.discard(op.result)
            offset, slack = _layout.last(offset), _layout.last(slack)
            self.settled[op.result] = offset, 1.001 * slack + 8 * self.dots * (offset.abs() + slack)

    def _new_slack(self, op: Op, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        names = self.operands(op)
        paid = all(name in self.paid or not (name in self.slack or name in self.offset) for name in names)
        if not (paid and self.images(op.result) and all(map(self.images, names))):
            return super()._new_slack(op, args, kwargs)
        if op.kind in {"convolution", _NORM} and _ops.is_affine(op, args):
            slack = _affine(self, op, args, kwargs)
        elif op.kind in {"add", "sub"} and _slack.alike(self, op):
            slack = _sum(self, op)
        else:
            return super()._new_slack(op, args, kwargs)
        self.paid.add(op.result)
        wide = self._wide(op, slack.add_(TINY))
        return (wide, *self.values[op.result][1:]) if op.kind == _NORM else self.fans(op, wide)

    def fans(self, op: Op, slack: Any) -> Any:
        extra = 4 * self.own * (self.readers(op.result) - 1)
        if extra <= 0 or op.result not in self.peaks or not isinstance(slack, Tensor):
            return super().fans(op, slack)
        return self._wide(op, _by_channel(slack) + extra * self.peaks[op.result])

    def _draw(self, op: Op) -> None:
        name = op.reads()[0]
        if op.kind == "relu" and name in self.peaks and name in self.paid and name not in self.settled:
            thin = _flat(self.slack[name]) and (name not in self.offset or _flat(self.offset[name]))
            if thin and math.isfinite(float(self.mosts[name].max())):
                on = _alive.channels(self, op)
                if on is not None:
                    _alive.keep(self, op, on)
                self.fronts[op.result] = _relu(self, op, name, on)
                self.fresh.add(op.result)
                return
        super()._draw(op)

    def owned(self, name: str) -> bool:
        """Whether coefficients of a value are made for it alone: by the convolutions that read it."""
        return name not in self._shared

    def images(self, name: str) -> bool:
        """Whether a value holds images [B, C, H, W], one after the other."""
        return len(self.shape(name)) == 4 and self.in_order(name)

    def in_order(self, name: str) -> bool:
        return name in self.alive or super().in_order(name)

    def peak(self, name: str, near: bool = False) -> Tensor:
        """[B, C] float64: no less than |x| + |b| of any entry of a channel; `near` where it is worth a look at all."""
        if name not in self.peaks or (near and name not in self._near):
            box, offset = self.values[name], self.offset.get(name)
            box = box[0] if isinstance(box, tuple) else box
            found = _largest(box.high) if box.positive else torch.maximum(_largest(box.high), -_largest(box.low, -1))
            found = found if offset is None else found + _by_channel(offset.abs())
            self._near.add(name)
            self.set_peak(name, torch.minimum(found, self.peaks[name]) if name in self.peaks else found)
        return self.peaks[name]

    def set_peak(self, name: str, found: Tensor) -> None:
        self.peaks[name], self.mosts[name] = found, found.amax(1)

    def thin(self, name: str) -> Tensor:
        """[B, C] float64: the slack of a value's channels."""
        return self.thins[name] if name in self.thins else _by_channel(self.slack[name])

    def _wide(self, op: Op, found: Tensor) -> Tensor:
        self.thins[op.result] = found
        return found.to(self.kind).view(*found.shape, 1, 1).expand(self.shape(op.result))


def _affine(chain: Channelwise, op: Op, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """[B, C] float64, and the result's peaks: as `_slack.paid`, a channel's largest for all of its entries."""
    piece, [name] = _ops.parts(op, args, kwargs), chain.operands(op)
    kept = op.kind == "convolution" and name not in chain.offset
    own = gamma(piece.terms + 2, chain.rounding.unit) if kept else chain.share(piece.terms)
    share = own + _back(chain, op)
    grown, sizes = 1.002 * (1 + 4 * share), _sizes(op, args)
    largest, fixed = (
        sizes(chain.peak(name, op.kind == "convolution")),
        torch.as_tensor(piece.offset, dtype=torch.float64).flatten(),
    )
    chain.set_peak(op.result, torch.add(grown * largest, fixed, alpha=2.01))
    slack = torch.add(grown * share * largest, fixed, alpha=1.01 * grown * (share + 8 * chain.dots))
    return slack.add_(sizes(chain.thin(name)), alpha=grown) if name in chain.slack else slack


def _sum(chain: Channelwise, op: Op) -> Tensor:
    one, two = (arg.name for arg in op.args[:2])
    peak = chain.peak(one) + chain.peak(two)
    chain.set_peak(op.result, peak)
    share = chain.share(2) + _back(chain, op)
    slack = share * peak
    for name in (one, two):
        slack = slack.add_(chain.thin(name), alpha=1 + 4 * share) if name in chain.slack else slack
    return slack


def _back(chain: Channelwise, op: Op) -> float:
    """What coefficients lose on the way back, and 30 units for a ReLU that reads the result."""
    count = _linear.products(op, chain.values, chain.shape(op.result), chain.batch)
    return gamma(count + 4, chain.own) + 30 * chain.own


def _sizes(op: Op, args: tuple[Any, ...]) -> Callable[[Tensor], Tensor]:
    """|L| m [B, O] of images whose channels are m [B, C] everywhere."""
    if op.kind == _NORM:
        scale = _stored.scale(args).abs().double()
        return lambda m: m * scale
    weight, transposed, groups = args[1].abs().flatten(2).sum(2).double(), args[6], args[8]
    if groups == 1:
        weight = weight if transposed else weight.T
        return lambda m: m @ weight
    weight = weight.view(groups, -1, weight.shape[1])
    sides = "ngi,gio->ngo" if transposed else "ngi,goi->ngo"
    return lambda m: torch.einsum(sides, m.view(len(m), groups, -1), weight).flatten(1)


@dataclass(frozen=True, slots=True)
class _Relu:
    """Coefficients through a ReLU's lines: a positive one takes `down`, a negative one `bend` times as much, both for
    every entry of the batch. `drop`, not above zero, is what a negative one adds for each unit, `level` [B, C] what one
    of the operand does.
    """

    result: str
    name: str
    down: Tensor
    bend: Tensor
    drop: Tensor
    level: Tensor

    def __call__(self, chain: Chain, slopes: Tensor, lower: Tensor | None) -> tuple[_linear.Pulled, Tensor]:
        assert isinstance(chain, Channelwise)
        del lower  # nobody optimises slopes here
        if slopes.stride(3) == slopes.stride(4) == 0:
            return self._spread(chain, slopes[..., 0, 0].transpose(0, 1))
        laid = slopes.permute(1, 0, 3, 4, 2).contiguous()
        part = torch.ops.aten._prelu_kernel(laid, self.bend).mul_(self.down)
        negative = laid.clamp_(max=0) if chain.owned(self.result) else laid.clamp(max=0)
        lost = _lined.blocked(negative.mul_(self.drop).flatten(2))
        return self._paid(chain, part, lost)

    def _spread(self, chain: Channelwise, slopes: Tensor) -> tuple[_linear.Pulled, Tensor]:
        """The same for all pixels of a channel, [B, R, C]: what a mean of them passes back."""
        positive, negative = slopes.clamp(min=0), slopes.clamp(max=0)
        part = positive[:, :, None, None] * self.down
        part.addcmul_(negative[:, :, None, None], self.bend * self.down)
        lost = (negative.double() * self.drop.sum((2, 3), dtype=torch.float64)).sum(2)
        return self._paid(chain, part, lost)

    def _paid(self, chain: Channelwise, part: Tensor, lost: Tensor) -> tuple[_linear.Pulled, Tensor]:
        paid = _sums(part).mul_(self.level[:, None]).sum(2)
        total = paid.sub_(lost, alpha=1 + 2.1 * chain.dots + 16 * chain.own)
        return {self.name: part.permute(1, 0, 4, 2, 3)}, total.T


def _entries(value: Tensor) -> Tensor:
    """[B, 1, H, W, C] from [B, C, H, W]"""
    return value.permute(0, 2, 3, 1).contiguous().unsqueeze(1)


def _relu(chain: Channelwise, op: Op, name: str, on: Tensor | None) -> _Relu:
    """The lines of `_relax.relu`, of the channels `on`.

    up = h / (h + d), computed, is off by 2.1 units, so the line above has to clear up d by 5 units of d and 3 of h; it
    does by 16 of the channel's largest value. A slope of 0 below is 2^-30 of the one above, so that this can be a
    multiple of it, which a processor has one step for; 0 where the ReLU is off.
    """
    low, above, peak, thin = chain.values[name].low, chain.values[op.result].high, chain.peaks[name], chain.thin(name)
    if on is not None:
        low, peak, thin = _alive.pick(low, on), peak[:, on], thin[:, on]
    slack = torch.add(1.001 * thin, peak, alpha=4 * chain.own * (chain.readers(op.result) + 1))
    more = torch.add(slack, peak, alpha=8 * chain.own).to(chain.kind).view(*peak.shape, 1, 1)
    below = low.clamp(max=-TINY)
    up = above - below
    torch.div(above, up, out=up)
    drop = below.sub_(more, alpha=2).mul_(up)
    bend = threshold(up, 0.5, 2.0**30)
    down = up.div_(bend)
    level = -slack
    if name in chain.offset:
        offset = chain.offset[name].select(3, 0).select(2, 0).double()
        level = (offset if on is None else offset[:, on]) - slack
    source = chain.made[name].reads()[0] if chain.made[name].kind == "getitem" else ""
    norm = chain.made.get(source)
    if norm is not None and norm.kind == _NORM and chain.readers(name) == chain.readers(source) == 1:
        scale = _stored.scale(fill(norm.args, chain.values)).to(chain.kind)
        if bool((scale.abs() > TINY).all()):
            name, level = norm.reads()[0], level / scale
            down.mul_(scale[:, None, None])
    return _Relu(op.result, name, _entries(down), _entries(bend), _entries(drop), level)


def _sums(rows: Tensor) -> Tensor:
    """[B, R, C] float64 from [B, R, H, W, C]: over a channel's pixels, in blocks that `Chain.dots` covers."""
    pixels = rows.shape[2] * rows.shape[3]
    blocks = rows.view(*rows.shape[:2], -1, _part(pixels, _lined.BLOCK), rows.shape[4])
    found: Tensor = blocks.sum(3).sum(2, dtype=torch.float64)
    return found


@cache
def _part(count: int, most: int) -> int:
    """The largest divisor up to `most`."""
    return next(size for size in range(min(count, most), 0, -1) if count % size == 0)


def _largest(value: Tensor, side: int = 1) -> Tensor:
    """[B, C] float64: the largest of every channel, or the least if `side` is -1."""
    furthest = torch.amax if side > 0 else torch.amin
    if value.is_contiguous():
        return furthest(value.flatten(2), 2).double()
    flat = value.permute(0, 2, 3, 1).flatten(1, 2)
    batch, pixels, channels = flat.shape
    some = _part(pixels, max(8, 128 // channels))  # side by side: kernels take few channels one by one
    wide = furthest(flat.reshape(batch, -1, some * channels), 1)
    return furthest(wide.reshape(batch, some, channels), 1).double()


def _by_channel(value: Tensor) -> Tensor:
    """[B, C] float64: the largest of every channel of what is not negative."""
    return value[..., 0, 0].double() if _flat(value) else _largest(value)


def _flat(value: Tensor) -> bool:
    """Whether all pixels of a channel are one number."""
    return all(value.shape[i] == 1 or value.stride(i) == 0 for i in (2, 3))
