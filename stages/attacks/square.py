"""Random search over square patches; needs outputs only, so it runs on exported engines too."""

import math

import torch
from pydantic import Field
from torch import Generator, Tensor

from stages.attacks import _bumps
from stages.attacks._losses import margin
from stages.attacks.base import Attack
from stages.method import InputError
from stages.oracle import Logits, narrow
from stages.threat import Threat

# Query numbers, out of 10,000, after which the share of changed pixels is halved once more.
_HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)


class Square(Attack):
    """Change one random square at a time and keep the change where the margin max_{k != y} z_k - z_y rises.

    linf: start from vertical stripes of +-eps; a proposal moves one square to x + eps or x - eps per channel, cut with
    the range. l2 and l1: start from a grid of signed bumps; a proposal takes the norm that one window holds, and what
    is unused, to a bump in another window (l1: projected onto the ball cut with the range). The side of the square is
    sqrt(p H W), where p starts at `share` and halves after 10, 50, 200, 500, 1,000, 2,000, ... queries; with `stretch`
    these numbers are out of 10,000 and scaled to `queries`.

    Each example costs at most `queries` outputs (the checks around an attack not counted) and leaves at its first
    wrong answer. Random numbers are drawn for the whole batch every time, so an example's path does not depend on
    which others are left. `logits` is called without gradients and may be any callable on [B, C, H, W].

    Source: Andriushchenko et al. 2020, algorithms 1 to 3; schedule, start share and the l1 version after the code
    released with Croce and Hein 2020 and 2021, from memory, compared with it. That code's ensemble does not stretch.
    Departures: every example has squares of its own; squares may touch the last row and column, which the released
    code never reaches by an off-by-one; l2 windows may overlap, as in that code.
    """

    queries: int = Field(default=5000, ge=1)
    share: float = Field(default=0.8, gt=0, le=1)
    stretch: bool = True

    @property
    def needs_gradients(self) -> bool:
        return False

    def perturb(self, logits: Logits, x: Tensor, y: Tensor, threat: Threat, rng: Generator) -> Tensor:
        if x.dim() != 4:
            raise InputError(f"square: expected images [B, C, H, W], got {tuple(x.shape)}")
        height, width = x.shape[-2:]
        scale = self.queries if self.stretch else 10_000
        sides = [_side(self.share, query, scale, height, width) for query in range(1, self.queries)]
        search = _squares if threat.norm == "linf" else _windows
        return search(logits, x, y, threat, sides, rng)


def _squares(logits: Logits, x: Tensor, y: Tensor, threat: Threat, sides: list[int], rng: Generator) -> Tensor:
    """linf. Squares are painted into the best points, and those that did not help are taken back."""
    result = _stripes(x, threat, rng)
    lead = _ask(logits, result, y)
    rows = (lead <= 0).nonzero().flatten()
    down, up = (threat.project(x[rows] + by, x[rows]).flatten(1) for by in (-threat.eps, threat.eps))
    best, lead, labels, asked = result[rows].flatten(1), lead[rows], y[rows], narrow(logits, rows)
    for side in sides:
        if len(rows) == 0:
            break
        at, raised = _draw(x, rows, side, rng)
        before = best.gather(1, at)
        painted = torch.where(raised, up.gather(1, at), down.gather(1, at))
        best.scatter_(1, at, painted)
        value = _ask(asked, best.view(-1, *x.shape[1:]), labels)
        better = value > lead
        best.scatter_(1, at, torch.where(better.unsqueeze(1), painted, before))
        lead = torch.where(better, value, lead)
        wrong = lead > 0
        if bool(wrong.any()):
            result[rows[wrong]] = best[wrong].view(-1, *x.shape[1:])
            keep = (~wrong).nonzero().flatten()
            rows, best, lead, labels, asked = rows[keep], best[keep], lead[keep], labels[keep], narrow(asked, keep)
            down, up = down[keep], up[keep]
    result[rows] = best.view(-1, *x.shape[1:])
    return result


def _windows(logits: Logits, x: Tensor, y: Tensor, threat: Threat, sides: list[int], rng: Generator) -> Tensor:
    """l2 and l1."""
    best = _bumps.tiles(x, threat, rng)
    lead = _ask(logits, best, y)
    for side in sides:
        alive = (lead <= 0).nonzero().flatten()
        if len(alive) == 0:
            break
        candidate = _bumps.move(best, x, threat, side, alive, rng)
        value = _ask(narrow(logits, alive), candidate, y[alive])
        better = value > lead[alive]
        best[alive[better]], lead[alive[better]] = candidate[better], value[better]
    return best


def _ask(logits: Logits, x: Tensor, y: Tensor) -> Tensor:
    """The margin, [B]; infinite where another class wins, a tie that argmax breaks against y included."""
    with torch.no_grad():
        z = logits(x)
    return torch.where(z.argmax(1) == y, margin(z, y), math.inf)


def _side(share: float, query: int, scale: int, height: int, width: int) -> int:
    """Side of the square at this query, at least 1 and at most what fits."""
    scaled = query * 10_000 // scale
    p = share / 2 ** sum(scaled > bound for bound in _HALVINGS)
    return max(1, min(round(math.sqrt(p * height * width)), height, width))


def _stripes(x: Tensor, threat: Threat, rng: Generator) -> Tensor:
    batch, channels, _, width = x.shape
    return threat.project(x + threat.eps * _bumps.signs((batch, channels, 1, width), x, rng), x)


def _draw(x: Tensor, rows: Tensor, side: int, rng: Generator) -> tuple[Tensor, Tensor]:
    """One square for each of `rows`: places in its pixels [M, C side side], and where it goes up, bool, equally shaped.

    Numbers are drawn for all of x.
    """
    batch, channels, height, width = x.shape
    top, left = _bumps.corners(x, side, rng)
    raised = torch.randint(0, 2, (batch, channels, 1), generator=rng, device=x.device)[rows] > 0
    span = torch.arange(side, device=x.device)
    planes = torch.arange(channels, device=x.device).view(-1, 1, 1) * (height * width)
    offsets = (planes + span.view(-1, 1) * width + span).flatten()
    at = (top * width + left)[rows].unsqueeze(1) + offsets
    return at, raised.expand(-1, -1, side * side).reshape(len(rows), -1)
