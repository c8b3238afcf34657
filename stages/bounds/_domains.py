"""Domains of branch and bound as rows of tensors, kept until their turn comes."""

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True, slots=True)
class Domains:
    """Of each domain: image, row, input box and set of boxes (`_roots`) int64 [N]; the best bound of those it was cut
    from, and what its row missed when that set was formed, float64 [N]; what is known of it, [N, D] as in
    `_dual.Known`; and slopes below ReLUs to start from float16 [N, F], NaN where none are."""

    image: Tensor
    row: Tensor
    box: Tensor
    root: Tensor
    bound: Tensor
    missed: Tensor
    at: Tensor
    side: Tensor
    point: Tensor
    push: Tensor
    slopes: Tensor

    def __len__(self) -> int:
        return len(self.image)

    def __getitem__(self, rows: Tensor) -> "Domains":
        return Domains(*(getattr(self, part.name)[rows] for part in fields(self)))

    def deeper(self, depth: int) -> "Domains":
        """With room for so many constraints each."""
        more = max(0, depth - self.at.shape[1])
        return replace(
            self, **{name: F.pad(getattr(self, name), (0, more)) for name in ("at", "side", "point", "push")}
        )

    def halves(self, at: Tensor, point: Tensor) -> "Domains":
        """Both sides of the value `at` int64 [N] at `point` [N], one after the other for every domain."""
        depth = (self.side != 0).sum(1)
        wide = self.deeper(int(depth.max()) + 1)
        both = wide[torch.arange(len(self), device=at.device).repeat_interleave(2)]
        sides = both.side.new_tensor([1.0, -1.0]).repeat(len(self))
        column = depth.repeat_interleave(2).unsqueeze(1)
        return replace(
            both,
            at=both.at.scatter(1, column, at.repeat_interleave(2).unsqueeze(1)),
            side=both.side.scatter(1, column, sides.unsqueeze(1)),
            point=both.point.scatter(1, column, point.repeat_interleave(2).unsqueeze(1)),
        )


class Pool:
    """Domains by number; a number is given again once its domain was taken."""

    def __init__(self, none: Domains) -> None:
        self.rows, self.free = none, list[int]()

    def put(self, some: Domains) -> list[int]:
        depth = max(some.at.shape[1], self.rows.at.shape[1])
        some, self.rows = some.deeper(depth), self.rows.deeper(depth)
        short = len(some) - len(self.free)
        if short > 0:
            size, more = len(self.rows), max(short, len(self.rows))
            grown = (F.pad(part, (0, 0) * (part.dim() - 1) + (0, more)) for part in self._parts(self.rows))
            self.rows = Domains(*grown)
            self.free.extend(range(size + more - 1, size - 1, -1))
        taken = [self.free.pop() for _ in range(len(some))]
        for mine, theirs in zip(self._parts(self.rows), self._parts(some), strict=True):
            mine[taken] = theirs
        return taken

    def take(self, numbers: list[int]) -> Domains:
        self.free.extend(numbers)
        return self.rows[torch.tensor(numbers, dtype=torch.int64, device=self.rows.image.device)]

    @staticmethod
    def _parts(some: Domains) -> list[Tensor]:
        return [getattr(some, part.name) for part in fields(some)]
