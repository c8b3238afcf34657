"""The Carlini-Wagner attack for l2."""

from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Generator, Tensor

from stages.attacks._losses import gradient
from stages.attacks.base import Attack, Norm
from stages.oracle import Logits, narrow
from stages.threat import Threat

_INSIDE = 0.9999
_BETA1, _BETA2, _TINY = 0.9, 0.999, 1e-8
_CHECKS, _HEADWAY = 10, 0.9999


class CarliniWagner(Attack):
    """Least distance plus a price c for being right, by Adam on a variable in which the data range has no edge.

        min_w ||x' - x||_2^2 + c max(z_y - max_{k != y} z_k + confidence, 0),  x' = low + (high - low) (1 + tanh w) / 2

    For each example c starts at `price` and grows tenfold until a try of `steps` succeeds; then the interval between
    the highest that failed and the lowest that succeeded is halved, `searches` tries in all. A try succeeds where at
    some point max_{k != y} z_k - z_y >= confidence; in its second half it ends once a tenth of its steps lowers the
    objective by less than 0.01 %. An example leaves at its first wrong answer within eps; one that never had any comes
    back as its nearest wrong point, projected onto the threat. It looks for the least distance, so eps does not steer.

    Source: Carlini and Wagner 2017, "Towards evaluating the robustness of neural networks", sections V and VI (f_6);
    constants after their released code, from memory. Departures: `steps` is 1000 where that code has 10,000; broken
    examples leave; early ends are per example, where theirs ask for the whole batch, and not before the middle; a
    wrong answer within eps counts whatever the confidence; black and white pixels start 1e-4 of half the range inside,
    where theirs start 1e-6 and, with tanh flat there, images of nothing else end before they have moved.
    """

    steps: int = Field(default=1000, ge=1)
    searches: int = Field(default=9, ge=1)
    lr: float = Field(default=0.01, gt=0)
    price: float = Field(default=0.001, gt=0)
    confidence: float = Field(default=0.0, ge=0)

    @property
    def norms(self) -> frozenset[Norm]:
        return frozenset(("l2",))

    def perturb(self, logits: Logits, x: Tensor, y: Tensor, threat: Threat, rng: Generator) -> Tensor:
        del rng
        found = _Found.nothing(x)
        c = torch.full((len(x),), self.price, dtype=x.dtype, device=x.device)
        failed, worked = torch.zeros_like(c), torch.full_like(c, float("inf"))
        for _ in range(self.searches):
            if not bool(found.alive.any()):
                break
            success = self._descend(logits, x, y, threat, c, found)
            worked, failed = torch.where(success, c, worked), torch.where(success, failed, c)
            c = torch.where(worked.isinf(), 10 * c, (failed + worked) / 2)
        return threat.project(found.point, x)

    def _descend(self, logits: Logits, x: Tensor, y: Tensor, threat: Threat, c: Tensor, found: "_Found") -> Tensor:
        """One try at the prices c [B]: who succeeded, bool [B]; wrong points go to `found`."""
        success = torch.zeros_like(found.alive)
        run = _Run.begin(found.alive.nonzero().flatten(), x, threat)
        check = -(-self.steps // _CHECKS)
        for number in range(self.steps):
            if len(run.rows) == 0:
                break
            origin, rows = x[run.rows], run.rows
            point, rate = run.seen(threat)
            z, lead, slope = gradient(narrow(logits, rows), point, y[rows], "margin")
            success[rows] |= lead >= self.confidence if self.confidence else z.argmax(1) != y[rows]
            found.take(rows, point, z.argmax(1) != y[rows], threat.distance(point, origin), threat.eps)
            short = (self.confidence - lead).clamp(min=0)
            loss = (point - origin).flatten(1).square().sum(1) + c[rows] * short
            force = torch.where(short > 0, c[rows], 0.0).view(_column(x))
            run.step((2 * (point - origin) - force * slope) * rate, self.lr, number + 1)
            keep = found.alive[rows]
            if number % check == 0:
                keep = keep & (loss <= _HEADWAY * run.checked)
                run.checked = loss
            run = run if bool(keep.all()) else run.keep(keep)
        return success


@dataclass
class _Run:
    """Adam on w, for the examples `rows` [M]."""

    rows: Tensor
    w: Tensor
    mean: Tensor
    square: Tensor
    checked: Tensor

    @staticmethod
    def begin(rows: Tensor, x: Tensor, threat: Threat) -> "_Run":
        share = 2 * (x[rows] - threat.low) / (threat.high - threat.low) - 1
        w = (_INSIDE * share).atanh()
        never = torch.full((len(rows),), float("inf"), dtype=x.dtype, device=x.device)
        return _Run(rows, w, torch.zeros_like(w), torch.zeros_like(w), never)

    def keep(self, mask: Tensor) -> "_Run":
        return _Run(**{name: value[mask] for name, value in vars(self).items()})

    def seen(self, threat: Threat) -> tuple[Tensor, Tensor]:
        """The image x'(w), and dx'/dw."""
        t, half = self.w.tanh(), (threat.high - threat.low) / 2
        return (threat.low + half * (1 + t)).clamp(threat.low, threat.high), half * (1 - t.square())

    def step(self, slope: Tensor, lr: float, number: int) -> None:
        self.mean = self.mean.lerp(slope, 1 - _BETA1)
        self.square = self.square.lerp(slope.square(), 1 - _BETA2)
        size = (self.square / (1 - _BETA2**number)).sqrt() + _TINY
        self.w = self.w - lr * self.mean / (1 - _BETA1**number) / size


@dataclass
class _Found:
    """Per example: whether it is still looked for, and its nearest wrong point so far."""

    alive: Tensor
    point: Tensor
    distance: Tensor

    @staticmethod
    def nothing(x: Tensor) -> "_Found":
        alive = torch.ones(len(x), dtype=torch.bool, device=x.device)
        return _Found(alive, x.clone(), torch.full((len(x),), float("inf"), dtype=x.dtype, device=x.device))

    def take(self, rows: Tensor, point: Tensor, wrong: Tensor, distance: Tensor, eps: float) -> None:
        nearer = wrong & (distance < self.distance[rows])
        self.point[rows[nearer]], self.distance[rows[nearer]] = point[nearer], distance[nearer]
        self.alive[rows[wrong & (distance <= eps)]] = False


def _column(x: Tensor) -> tuple[int, ...]:
    return (-1,) + (1,) * (x.dim() - 1)
