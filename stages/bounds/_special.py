"""Linear bounds of operations that are not elementwise: max pooling, products of matrices, softmax."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from stages.bounds import _attention, _linear, _norms, _relax
from stages.bounds._backward import SPECIAL, Chain, Pull
from stages.bounds._interval import Interval, gamma
from stages.bounds._trace import Op, fill


def max_pool(chain: Chain, op: Op) -> Pull:
    """Below: the entry with the highest low end. Above: the same where no other can pass it, else the highest end."""
    args = fill(op.args, chain.values)
    x: Interval = args[0]
    top, at = op.target(x.low, *args[1:])
    best = op.target(x.high, *args[1:])[0]
    alone = _others(x.high, at, args) <= top
    name, box, result = op.args[0].name, x.low.shape, chain.values[op.result][0]
    offset, slack = (pick(t, at) for t in chain.folded(name, op))
    fans = 4 * chain.own * chain.readers(op.result) * result.size().double()
    low, high = offset - slack - fans, torch.where(alone, offset + slack, best.double()) + fans
    floor, gap = chain.ends_of_lines(low, high, offset.abs() + slack)

    def pull(slopes: Any, lower: Tensor | None) -> tuple[_linear.Pulled, Tensor]:
        del lower
        here = slopes[0]
        negative = here.clamp(max=0)
        part = torch.where((here > 0) | alone, here, 0.0)
        where = at.expand(part.shape).flatten(3)
        back = part.new_zeros(*part.shape[:3], box[2] * box[3]).scatter_add(3, where, part.flatten(3))
        return {name: back.view(len(here), *box)}, chain.dot(op.result, here, floor) + chain.dot(
            op.result, negative, gap
        )

    return pull


def pick(value: Tensor, at: Tensor) -> Tensor:
    return value.expand(*at.shape[:2], *value.shape[2:]).flatten(2).gather(2, at.flatten(2)).view(at.shape)


def _others(high: Tensor, at: Tensor, args: tuple[Any, ...]) -> Tensor:
    """The highest end in every window but the entry `at`, -inf where there is no other."""
    kernel, stride, pads, holes = (_two(args, i) for i in (1, 2, 3, 4))
    size, out = high.shape[2:], at.shape[2:]
    last = [max(0, (out[i] - 1) * stride[i] + holes[i] * (kernel[i] - 1) + 1 - size[i] - pads[i]) for i in (0, 1)]
    wide = F.pad(high, (pads[1], last[1], pads[0], last[0]), value=-torch.inf)
    numbers = torch.arange(size[0] * size[1], device=high.device).view(1, 1, *size).to(high.dtype)
    numbers = F.pad(numbers, (pads[1], last[1], pads[0], last[0]), value=-1.0)
    found = torch.full_like(at, -torch.inf, dtype=high.dtype)
    for i in range(kernel[0]):
        for j in range(kernel[1]):
            rows = slice(i * holes[0], i * holes[0] + (out[0] - 1) * stride[0] + 1, stride[0])
            columns = slice(j * holes[1], j * holes[1] + (out[1] - 1) * stride[1] + 1, stride[1])
            other = numbers[..., rows, columns].long() != at
            found = torch.maximum(found, torch.where(other, wide[..., rows, columns], -torch.inf))
    return found


def _two(args: tuple[Any, ...], place: int) -> tuple[int, int]:
    """Kernel, stride, padding or dilation as two numbers; left out, the stride is the kernel."""
    value = args[place] if place < len(args) else []
    if len(value) == 0:
        return _two(args, 1) if place == 2 else ((0, 0) if place == 3 else (1, 1))
    return int(value[0]), int(value[-1])


def matrices(chain: Chain, op: Op) -> Pull:
    """x y in m_x y + x m_y - m_x m_y +- r_x r_y: the bound of a product of numbers, summed."""
    args = fill(op.args, chain.values)
    (ma, ra), (mb, rb) = _relax.middle(args[0], chain.kind), _relax.middle(args[1], chain.kind)
    first, second = (arg.name for arg in op.args[:2])
    terms = max(args[0].low.shape[-2], args[0].low.shape[-1], args[1].low.shape[-1])
    size = args[0].size().double() @ args[1].size().double()
    share = chain.rounding.share(terms) + 4 * chain.own * chain.readers(op.result)
    reach = ra @ rb + 4 * (share + gamma(4 * terms + 64, chain.own)) * size
    floor, gap = chain.ends_of_lines(-(ma @ mb) - reach, reach - ma @ mb, size)
    left, right = ma.to(chain.kind), mb.to(chain.kind)
    shapes = args[0].low.shape, args[1].low.shape

    def pull(slopes: Tensor, lower: Tensor | None) -> tuple[_linear.Pulled, Tensor]:
        del lower
        bias = chain.dot(op.result, slopes, floor) + chain.dot(op.result, slopes.clamp(max=0), gap)
        parts = (
            (first, _linear.sum_to(slopes @ right.transpose(-1, -2), shapes[0])),
            (second, _linear.sum_to(left.transpose(-1, -2) @ slopes, shapes[1])),
        )
        found: _linear.Pulled = {}
        for name, part in parts:
            bias = bias + chain.start(name, part)
            found[name] = found[name] + part if name in found else part
        return found, bias

    return pull


SPECIAL.update({"max_pool2d_with_indices": max_pool, "mm": matrices, "bmm": matrices, "matmul": matrices})
SPECIAL.update({"_softmax": _attention.front, "_safe_softmax": _attention.front, "native_layer_norm": _norms.front})
