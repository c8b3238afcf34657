"""Linear bounds of a largest entry: max pooling with any windows, adaptive or not, and amax and amin.

Of x_1 ... x_K with ends l_i, u_i:
  below  the entry with the largest l_i;
  above  max x <= g + sum_i (x_i - g)_+ with g the larger of max l_i and the third largest u_i. No term but those of the
         two largest u_i is left, and each is bounded by its chord, (x_i - g)_+ <= (x_i - l_i) (u_i - g) / (u_i - l_i).
At the centre of the box this g gives the least sum, (u_1 + max(u_2, g)) / 2, where the constant gives u_1; where one
entry is above all others for certain it is that entry. Source: none that we follow; the chords are ReLU's.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stages.bounds._interval import DOUBLE, TINY, Interval
from stages.bounds._trace import Op, fill

if TYPE_CHECKING:
    from stages.bounds._backward import Chain, Pull

_ROUND = 64 * DOUBLE


@dataclass(frozen=True, slots=True)
class Windows:
    """An operand as [N, S]: `at` [K, O] are places in a row of S, -1 where a window has no K-th entry."""

    at: Tensor
    dims: tuple[int, ...]

    def rows(self, x: Tensor, shape: torch.Size) -> Tensor:
        """[..., N, S] from [..., *shape]."""
        lead = x.shape[: x.dim() - len(shape)]
        last = tuple(range(-len(self.dims), 0))
        size = 1
        for dim in self.dims:
            size *= shape[dim]
        return x.movedim(self.dims, last).reshape(*lead, -1, size)

    def back(self, rows: Tensor, shape: torch.Size) -> Tensor:
        """The inverse of `rows`."""
        rest = [size for i, size in enumerate(shape) if i - len(shape) not in self.dims]
        wide = rows.reshape(*rows.shape[:-2], *rest, *(shape[dim] for dim in self.dims))
        return wide.movedim(tuple(range(-len(self.dims), 0)), self.dims)


def windows(op: Op, args: tuple[Any, ...], result: torch.Size) -> Windows:
    shape = args[0].low.shape
    if op.kind in {"amax", "amin"}:
        chosen = args[1] if len(args) > 1 and args[1] else range(len(shape))
        dims = tuple(sorted(dim % len(shape) - len(shape) for dim in chosen))
        size = 1
        for dim in dims:
            size *= shape[dim]
        return Windows(torch.arange(size, device=args[0].low.device).unsqueeze(1), dims)
    dims = tuple(range(-3 if op.kind == "max_pool3d_with_indices" else -2, 0))
    at = torch.zeros(1, 1, dtype=torch.int64)
    for dim in dims:
        side = _adaptive if op.kind == "adaptive_max_pool2d" else _strided(args, dim)
        inner, outer = side(shape[dim], result[dim])[None, :, None, :], at[:, None, :, None]
        both = torch.where((outer >= 0) & (inner >= 0), outer * shape[dim] + inner, -1)
        at = both.flatten(0, 1).flatten(1)
    return Windows(at.to(args[0].low.device), dims)


def _adaptive(size: int, out: int) -> Tensor:
    first = torch.tensor([i * size // out for i in range(out)])
    last = torch.tensor([-(-(i + 1) * size // out) for i in range(out)])
    places = first + torch.arange(int((last - first).max())).unsqueeze(1)
    return torch.where(places < last, places, -1)


def _strided(args: tuple[Any, ...], side: int) -> Callable[[int, int], Tensor]:
    kernel, stride, pad, hole = (_each(args, place, side) for place in (1, 2, 3, 4))

    def places(size: int, out: int) -> Tensor:
        found = torch.arange(out) * stride - pad + torch.arange(kernel).unsqueeze(1) * hole
        return torch.where((found >= 0) & (found < size), found, -1)

    return places


def _each(args: tuple[Any, ...], place: int, side: int) -> int:
    """Kernel, stride, padding or dilation of one side; left out, the stride is the kernel."""
    value = args[place] if place < len(args) else []
    if len(value) == 0:
        return _each(args, 1, side) if place == 2 else (0 if place == 3 else 1)
    return int(value[side] if len(value) > 1 else value[0])


def front(chain: "Chain", op: Op) -> "Pull":
    """Coefficients through the lines: the entry below, or the two above, get them."""
    args = fill(op.args, chain.values)
    x, name, kind = args[0], op.args[0].name, chain.kind
    whole = chain.values[op.result]
    result: Interval = whole[0] if isinstance(whole, tuple) else whole
    shape, out = x.low.shape, result.low.shape
    sign = -1.0 if op.kind == "amin" else 1.0
    frame = windows(op, args, out)
    low, high = (frame.rows(end, shape).double() for end in ((x.low, x.high) if sign > 0 else (-x.high, -x.low)))
    offset, slack = (frame.rows(part.expand(shape), shape) for part in chain.folded(name, op))
    missing = (frame.at < 0).unsqueeze(0)
    lows, highs = (torch.where(missing, -torch.inf, end[:, frame.at.clamp(min=0)]) for end in (low, high))
    floor_at = _places(frame, lows.argmax(1, keepdim=True))
    top = highs.topk(min(3, highs.shape[1]), 1)
    level = lows.amax(1)
    if highs.shape[1] > 2:
        level = torch.maximum(level, top.values[:, 2])
    upper, shares = level, []
    for i in range(min(2, highs.shape[1])):
        at, end = _places(frame, top.indices[:, i : i + 1]), top.values[:, i]
        bottom = low.gather(1, at)
        exact = torch.where(end > level, (end - level) / (end - bottom).clamp(min=TINY), 0.0)
        share = exact.to(kind)
        near, room = share.double(), (end - bottom).clamp(min=0)
        size = end.abs() + bottom.abs()
        lift = torch.where(exact > 0, ((near - exact).abs() + _ROUND) * room + _ROUND * size - near * bottom, 0.0)
        upper = upper + lift + near * (sign * offset.gather(1, at) + slack.gather(1, at))
        shares.append((at, share))
    fans = (4 * chain.own * chain.readers(op.result) * result.size().double()).reshape(level.shape)
    lower = sign * offset.gather(1, floor_at) - slack.gather(1, floor_at) - fans
    upper = upper + _ROUND * level.abs() + fans
    size = offset.gather(1, floor_at).abs() + slack.gather(1, floor_at)
    floor, gap = (part.reshape(out) for part in chain.ends_of_lines(lower, upper, size))

    def pull(chain: "Chain", slopes: Any, lower_slopes: Tensor | None) -> tuple[dict[str, Tensor], Tensor]:
        del lower_slopes
        here = sign * (slopes[0] if isinstance(slopes, dict) else slopes)
        flat = here.reshape(len(here), *level.shape)
        back = flat.new_zeros(len(flat), *low.shape)
        back = back.scatter_add(2, floor_at.expand(flat.shape), flat.clamp(min=0))
        for at, share in shares:
            back = back.scatter_add(2, at.expand(flat.shape), flat.clamp(max=0) * share)
        bias = chain.dot(op.result, here, floor) + chain.dot(op.result, here.clamp(max=0), gap)
        return {name: sign * frame.back(back, shape)}, bias

    return pull


def _places(frame: Windows, chosen: Tensor) -> Tensor:
    """[N, O] places in a row of S from [N, 1, O] numbers of entries in each window."""
    at: Tensor = frame.at.unsqueeze(0).expand(len(chosen), -1, -1).gather(1, chosen).squeeze(1)
    return at.clamp(min=0)
