"""Windows on images: what single neurons of a convolution can see, cut out of every map instead of the whole of it.

A neuron at place p of a side sees entries step p + start, ..., step p + start + size - 1 of the same side of a value
before it. What a window has beyond the edge of the map is padding, where all that is taken from maps is 0.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True, slots=True)
class Side:
    """One side of the windows of all neurons of a map."""

    step: int
    start: int
    size: int

    def before(self, kernel: int, stride: int, pad: int, hole: int) -> "Side":
        """What of a convolution's operand the window of its result depends on."""
        size = (self.size - 1) * stride + hole * (kernel - 1) + 1
        return Side(self.step * stride, self.start * stride - pad, size)

    def beside(self, other: "Side") -> "Side | None":
        """The least windows that hold both, if there are any."""
        if self.step != other.step:
            return None
        start = min(self.start, other.start)
        return Side(self.step, start, max(self.start + self.size, other.start + other.size) - start)

    def edges(self, places: int, length: int) -> tuple[int, int]:
        """How far windows reach beyond a map of so many entries, for neurons at `places` places."""
        return max(0, -self.start), max(0, self.step * (places - 1) + self.start + self.size - length)


@dataclass(frozen=True, slots=True)
class Frame:
    """Windows of neurons of a map of `places`, on a map of `shape` (height and width both)."""

    rows: Side
    columns: Side
    places: tuple[int, int]
    shape: tuple[int, int]

    @property
    def area(self) -> int:
        return self.rows.size * self.columns.size

    @property
    def hangs_over(self) -> bool:
        return any(edge > 0 for edge in self._edges())

    def beside(self, other: "Frame") -> "Frame | None":
        rows, columns = self.rows.beside(other.rows), self.columns.beside(other.columns)
        return None if rows is None or columns is None else Frame(rows, columns, self.places, self.shape)

    def views(self, maps: Tensor) -> Tensor:
        """[..., *places, height, width, C] of maps [..., H, W, C]: the windows of all neurons, over padded maps."""
        left, right, above, below = self._edges()
        padded = F.pad(maps, (0, 0, left, right, above, below)) if self.hangs_over else maps.contiguous()
        padded = padded[..., self.rows.start + above :, self.columns.start + left :, :]
        *lead, down, along, deep = padded.stride()
        sizes = (*padded.shape[:-3], *self.places, self.rows.size, self.columns.size, padded.shape[-1])
        return padded.as_strided(sizes, (*lead, self.rows.step * down, self.columns.step * along, down, along, deep))

    @staticmethod
    def take(views: Tensor, images: Tensor, at: tuple[Tensor, Tensor]) -> Tensor:
        """[K, R, C, height, width] of `views` of maps [K, B, H, W, C]: of each row its image's, round its neuron."""
        return views[:, images, at[0], at[1]].permute(0, 1, 4, 2, 3)

    def place(self, windows: Tensor, at: tuple[Tensor, Tensor]) -> Tensor:
        """[R, C, H, W] with the windows [R, C, height, width] in their places, and 0 elsewhere."""
        placed: Tensor = _Place.apply(windows, self, at)  # type: ignore[no-untyped-call]
        return placed

    def inside(self, windows: Tensor, at: tuple[Tensor, Tensor]) -> Tensor:
        """The windows with 0 beyond the edges of the map."""
        if not self.hangs_over:
            return windows
        ones = windows.new_ones(1, 1, *self.shape, 1)
        return windows * self.take(self.views(ones), torch.zeros_like(at[0]), at)[0]

    def widened(self, windows: Tensor, wider: "Frame") -> Tensor:
        """Windows of this frame in those of one that holds it."""
        above, left = self.rows.start - wider.rows.start, self.columns.start - wider.columns.start
        below = wider.rows.size - self.rows.size - above
        right = wider.columns.size - self.columns.size - left
        return F.pad(windows, (left, right, above, below)) if above or left or below or right else windows

    def _edges(self) -> tuple[int, int, int, int]:
        above, below = self.rows.edges(self.places[0], self.shape[0])
        left, right = self.columns.edges(self.places[1], self.shape[1])
        return left, right, above, below


class _Place(torch.autograd.Function):
    """Every row writes entries of its own once, so the gradient is what lies there."""

    @staticmethod
    def forward(ctx: Any, windows: Tensor, frame: Frame, at: tuple[Tensor, Tensor]) -> Tensor:
        ctx.frame, ctx.at = frame, at
        left, right, above, below = frame._edges()
        height, width = frame.shape
        rows, channels = windows.shape[:2]
        tall, broad = above + height + below, left + width + right
        inner = Frame(
            Side(frame.rows.step, frame.rows.start + above, frame.rows.size),
            Side(frame.columns.step, frame.columns.start + left, frame.columns.size),
            frame.places,
            (tall, broad),
        )
        placed = windows.new_empty(rows, height, width, channels)
        some = max(1, rows * height * width // (tall * broad))  # so many that the padded maps are no larger than these
        for first in range(0, rows, some):
            here = slice(first, first + some)
            part, down, along = windows[here].permute(0, 2, 3, 1), at[0][here], at[1][here]
            wide = windows.new_zeros(len(part), tall, broad, channels)
            inner.views(wide)[torch.arange(len(part), device=windows.device), down, along] = part
            placed[here] = wide[:, above : above + height, left : left + width]
        return placed.permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (grad,) = grads
        rows = torch.arange(len(grad), device=grad.device)
        views = ctx.frame.views(grad.permute(0, 2, 3, 1).unsqueeze(0))
        return Frame.take(views, rows, ctx.at)[0], None, None
