"""Random search over square patches; needs outputs only, so it runs on exported engines too."""

import math

import torch
from pydantic import Field
from torch import Generator, Tensor

from stages.attacks._losses import margin
from stages.attacks.base import Attack, Norm
from stages.method import InputError
from stages.oracle import Logits, narrow
from stages.threat import Threat

_TINY = 1e-12
_FLAT = 1e-6

# Query numbers, out of 10,000, after which the share of changed pixels is halved once more.
_HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)


class Square(Attack):
    """Change one random square at a time and keep the change where the margin max_{k != y} z_k - z_y rises.

    linf: start from vertical stripes of +-eps; a proposal moves one square by +-2 eps per channel, cut to the ball, so
    that its pixels lie on the surface. l2: start from a grid of signed bumps; a proposal takes the norm that one
    window holds, and what is unused, to a bump in another window. The side of the square is sqrt(p H W), where p starts
    at `share` and halves on a fixed schedule, stretched over `queries`.

    Each example costs at most `queries` outputs (the checks around an attack not counted) and leaves at its first
    wrong answer. Random numbers are drawn for the whole batch every time, so an example's path does not depend on
    which others are left. `logits` is called without gradients and may be any callable on [B, C, H, W].

    Source: Andriushchenko et al. 2020, algorithms 1 to 3; schedule and start share after the code released with Croce
    and Hein 2020, from memory. Departures: every example has squares of its own; squares may touch the last row and
    column, which the released code never reaches by an off-by-one; l2 windows may overlap, as in that code.
    """

    queries: int = Field(default=5000, ge=1)
    share: float = Field(default=0.8, gt=0, le=1)

    @property
    def needs_gradients(self) -> bool:
        return False

    @property
    def norms(self) -> frozenset[Norm]:
        return frozenset(("linf", "l2"))

    def perturb(self, logits: Logits, x: Tensor, y: Tensor, threat: Threat, rng: Generator) -> Tensor:
        if x.dim() != 4:
            raise InputError(f"square: expected images [B, C, H, W], got {tuple(x.shape)}")
        start, propose = (_stripes, _patch) if threat.norm == "linf" else (_bumps, _move)
        best = start(x, threat, rng)
        score = _ask(logits, best, y)
        for query in range(1, self.queries):
            alive = (score <= 0).nonzero().flatten()
            if len(alive) == 0:
                break
            side = _side(self.share, query, self.queries, *x.shape[-2:])
            candidate = propose(best, x, threat, side, alive, rng)
            value = _ask(narrow(logits, alive), candidate, y[alive])
            better = value > score[alive]
            best[alive[better]], score[alive[better]] = candidate[better], value[better]
        return best


def _ask(logits: Logits, x: Tensor, y: Tensor) -> Tensor:
    """The margin, [B]; infinite where another class wins, a tie that argmax breaks against y included."""
    with torch.no_grad():
        z = logits(x)
    return torch.where(z.argmax(1) == y, margin(z, y), math.inf)


def _side(share: float, query: int, queries: int, height: int, width: int) -> int:
    """Side of the square at this query, at least 1 and at most what fits."""
    scaled = query * 10_000 // queries
    p = share / 2 ** sum(scaled > bound for bound in _HALVINGS)
    return max(1, min(round(math.sqrt(p * height * width)), height, width))


def _signs(shape: tuple[int, ...], x: Tensor, rng: Generator) -> Tensor:
    return torch.randint(0, 2, shape, generator=rng, device=x.device).to(x.dtype) * 2 - 1


def _corners(x: Tensor, side: int, rng: Generator) -> tuple[Tensor, Tensor]:
    """Top and left of one square per example, [B] each, anywhere inside the image."""
    height, width = x.shape[-2:]
    top = torch.randint(0, height - side + 1, (len(x),), generator=rng, device=x.device)
    left = torch.randint(0, width - side + 1, (len(x),), generator=rng, device=x.device)
    return top, left


def _window(top: Tensor, left: Tensor, side: int, x: Tensor) -> Tensor:
    """Masks of the squares, bool [B, 1, H, W]."""
    rows = torch.arange(x.shape[-2], device=x.device).view(1, -1, 1)
    columns = torch.arange(x.shape[-1], device=x.device).view(1, 1, -1)
    top, left = top.view(-1, 1, 1), left.view(-1, 1, 1)
    inside = (rows >= top) & (rows < top + side) & (columns >= left) & (columns < left + side)
    return inside.unsqueeze(1)


def _stripes(x: Tensor, threat: Threat, rng: Generator) -> Tensor:
    batch, channels, _, width = x.shape
    return threat.project(x + threat.eps * _signs((batch, channels, 1, width), x, rng), x)


def _patch(best: Tensor, x: Tensor, threat: Threat, side: int, alive: Tensor, rng: Generator) -> Tensor:
    """linf proposals for the examples `alive`."""
    top, left = _corners(x, side, rng)
    signs = _signs((len(x), x.shape[1], 1, 1), x, rng)
    mask = _window(top[alive], left[alive], side, x)
    return threat.project(best[alive] + 2 * threat.eps * signs[alive] * mask, x[alive])


def _bumps(x: Tensor, threat: Threat, rng: Generator) -> Tensor:
    """l2 start: tiles of a fifth of the height, each a bump of random sign per channel and direction per batch."""
    batch, channels, height, width = x.shape
    side = max(min(height, width) // 5, 1)
    rows, columns = height // side, width // side
    top, left = (height - rows * side) // 2, (width - columns * side) // 2
    delta = torch.zeros_like(x)
    for row in range(rows):
        for column in range(columns):
            at = (
                slice(top + row * side, top + (row + 1) * side),
                slice(left + column * side, left + (column + 1) * side),
            )
            delta[..., at[0], at[1]] = _eta(side, x, rng) * _signs((batch, channels, 1, 1), x, rng)
    return threat.project(x + threat.eps * _unit(delta), x)


def _move(best: Tensor, x: Tensor, threat: Threat, side: int, alive: Tensor, rng: Generator) -> Tensor:
    """l2 proposals for the examples `alive`: window `to` takes over what window `off` holds."""
    side = min(max(side, 3) | 1, *x.shape[-2:])
    to, off = _corners(x, side, rng), _corners(x, side, rng)
    bump = _eta(side, x, rng) * _signs((len(x), x.shape[1], 1, 1), x, rng)[alive]
    delta = best[alive] - x[alive]
    top, left = to[0][alive], to[1][alive]
    target, source = _window(top, left, side, x), _window(off[0][alive], off[1][alive], side, x)
    both = (target | source).to(x.dtype)
    held = torch.linalg.vector_norm(delta * both, dim=(2, 3), keepdim=True)
    spare = (threat.eps**2 - delta.flatten(1).square().sum(1)).clamp(min=0).view(-1, 1, 1, 1) / x.shape[1]
    rows = (top.view(-1, 1) + torch.arange(side, device=x.device)).view(-1, 1, side, 1)
    columns = (left.view(-1, 1) + torch.arange(side, device=x.device)).view(-1, 1, 1, side)
    at = (
        torch.arange(len(alive), device=x.device).view(-1, 1, 1, 1),
        torch.arange(x.shape[1], device=x.device).view(1, -1, 1, 1),
        rows,
        columns,
    )
    old = delta[at]
    fresh = bump + old / (torch.linalg.vector_norm(old, dim=(2, 3), keepdim=True) + _TINY)
    size = torch.linalg.vector_norm(fresh, dim=(2, 3), keepdim=True)
    # On a tiny image the bump can cancel what is there, and a proposal without any change would be a wasted output.
    fresh = torch.where(size > _FLAT, fresh / size.clamp(min=_FLAT), bump) * (spare + held**2).sqrt()
    delta = torch.where(source, 0.0, delta)
    delta[at] = fresh
    return threat.project(x[alive] + threat.eps * _unit(delta), x[alive])


def _unit(delta: Tensor) -> Tensor:
    norms = torch.linalg.vector_norm(delta.flatten(1), dim=1).clamp(min=_TINY)
    unit: Tensor = delta / norms.view(-1, 1, 1, 1)
    return unit


def _eta(side: int, x: Tensor, rng: Generator) -> Tensor:
    """A bump of norm 1, [side, side]: one half positive, the other negative, lying or standing at random."""
    half = side // 2
    upper = _rectangles(half, side, x)
    lower = -_rectangles(side - half, side, x)
    bump = torch.cat([upper, lower])
    bump /= torch.linalg.vector_norm(bump)
    standing = torch.rand((), generator=rng, device=x.device) > 0.5
    return bump.T if bool(standing) else bump


def _rectangles(height: int, width: int, x: Tensor) -> Tensor:
    """Concentric squares, the k-th (from the middle, k = 0, 1, ...) adding 1 / (k + 1)^2, scaled to norm 1."""
    bump = torch.zeros(height, width, device=x.device, dtype=x.dtype)
    if height == 0:
        return bump
    middle, centre = height // 2, width // 2
    for ring in range(max(middle, centre) + 1):
        rows = slice(max(middle - ring, 0), min(middle + ring + 1, height))
        columns = slice(max(centre - ring, 0), min(centre + ring + 1, width))
        bump[rows, columns] += 1.0 / (ring + 1) ** 2
    bump /= torch.linalg.vector_norm(bump)
    return bump
