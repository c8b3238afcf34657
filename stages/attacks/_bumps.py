"""Square's moves for l2 and l1: one window takes over what another holds, as a signed bump."""

import torch
from torch import Generator, Tensor

from stages.attacks import _l1
from stages.threat import Threat

_TINY = 1e-12
_FLAT = 1e-6

_ORDER = {"l2": 2, "l1": 1}
# The k-th ring of a bump adds 1 / (k + 1) to this power.
_FALL = {2: 2, 1: 4}


def signs(shape: tuple[int, ...], x: Tensor, rng: Generator) -> Tensor:
    return torch.randint(0, 2, shape, generator=rng, device=x.device).to(x.dtype) * 2 - 1


def corners(x: Tensor, side: int, rng: Generator) -> tuple[Tensor, Tensor]:
    """Top and left of one square per example, [B] each, anywhere inside the image."""
    height, width = x.shape[-2:]
    top = torch.randint(0, height - side + 1, (len(x),), generator=rng, device=x.device)
    left = torch.randint(0, width - side + 1, (len(x),), generator=rng, device=x.device)
    return top, left


def tiles(x: Tensor, threat: Threat, rng: Generator) -> Tensor:
    """The start: tiles of a fifth of the height, each a bump of random sign per channel and direction per batch."""
    batch, channels, height, width = x.shape
    order = _ORDER[threat.norm]
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
            delta[..., at[0], at[1]] = _eta(side, order, x, rng) * signs((batch, channels, 1, 1), x, rng)
    return _onto(delta, x, threat)


def move(best: Tensor, x: Tensor, threat: Threat, side: int, alive: Tensor, rng: Generator) -> Tensor:
    """Proposals for the examples `alive`: window `to` takes over what window `off` holds, and what is unused of eps."""
    order, channels = _ORDER[threat.norm], x.shape[1]
    side = min(max(side, 3) | 1, *x.shape[-2:])
    to, off = corners(x, side, rng), corners(x, side, rng)
    bump = _eta(side, order, x, rng) * signs((len(x), channels, 1, 1), x, rng)[alive]
    delta = best[alive] - x[alive]
    top, left = to[0][alive], to[1][alive]
    target, source = _window(top, left, side, x), _window(off[0][alive], off[1][alive], side, x)
    held = _norm(delta * (target | source), order)
    spare = (threat.eps**order - delta.flatten(1).abs().pow(order).sum(1)).clamp(min=0).view(-1, 1, 1, 1) / channels
    rows = (top.view(-1, 1) + torch.arange(side, device=x.device)).view(-1, 1, side, 1)
    columns = (left.view(-1, 1) + torch.arange(side, device=x.device)).view(-1, 1, 1, side)
    at = (
        torch.arange(len(alive), device=x.device).view(-1, 1, 1, 1),
        torch.arange(channels, device=x.device).view(1, -1, 1, 1),
        rows,
        columns,
    )
    old = delta[at]
    fresh = bump + old / (_norm(old, order) + _TINY)
    size = _norm(fresh, order)
    # On a tiny image the bump can cancel what is there, and a proposal without any change would be a wasted output.
    fresh = torch.where(size > _FLAT, fresh / size.clamp(min=_FLAT), bump)
    fresh = fresh * (channels * (spare + held) if order == 1 else (spare + held**2).sqrt())
    delta = torch.where(source, 0.0, delta)
    delta[at] = fresh
    return _onto(delta, x[alive], threat)


def _onto(delta: Tensor, x: Tensor, threat: Threat) -> Tensor:
    """l2: scaled to the surface, then cut with the range. l1: the nearest point, scaled up first where it is inside."""
    norms = torch.linalg.vector_norm(delta.flatten(1), ord=_ORDER[threat.norm], dim=1).clamp(min=_TINY)
    scale = (threat.eps / norms).view(-1, 1, 1, 1)
    if threat.norm == "l2":
        return threat.project(x + delta * scale, x)
    return _l1.project(x + delta * scale.clamp(min=1), x, threat)


def _norm(delta: Tensor, order: int) -> Tensor:
    """Per example and channel, [B, C, 1, 1]; a norm of entries, not of matrices."""
    norms: Tensor = torch.linalg.vector_norm(delta, ord=order, dim=(2, 3), keepdim=True)
    return norms


def _window(top: Tensor, left: Tensor, side: int, x: Tensor) -> Tensor:
    """Masks of the squares, bool [B, 1, H, W]."""
    rows = torch.arange(x.shape[-2], device=x.device).view(1, -1, 1)
    columns = torch.arange(x.shape[-1], device=x.device).view(1, 1, -1)
    top, left = top.view(-1, 1, 1), left.view(-1, 1, 1)
    inside = (rows >= top) & (rows < top + side) & (columns >= left) & (columns < left + side)
    return inside.unsqueeze(1)


def _eta(side: int, order: int, x: Tensor, rng: Generator) -> Tensor:
    """A bump of norm 1, [side, side]: one half positive, the other negative, lying or standing at random."""
    half = side // 2
    upper = _rectangles(half, side, order, x)
    lower = -_rectangles(side - half, side, order, x)
    bump = torch.cat([upper, lower])
    bump /= torch.linalg.vector_norm(bump.flatten(), ord=order)
    standing = torch.rand((), generator=rng, device=x.device) > 0.5
    return bump.T if bool(standing) else bump


def _rectangles(height: int, width: int, order: int, x: Tensor) -> Tensor:
    """Concentric squares, the k-th (from the middle, k = 0, 1, ...) adding a power of 1 / (k + 1), scaled to norm 1."""
    bump = torch.zeros(height, width, device=x.device, dtype=x.dtype)
    if height == 0:
        return bump
    middle, centre = height // 2, width // 2
    for ring in range(max(middle, centre) + 1):
        rows = slice(max(middle - ring, 0), min(middle + ring + 1, height))
        columns = slice(max(centre - ring, 0), min(centre + ring + 1, width))
        bump[rows, columns] += 1.0 / (ring + 1) ** _FALL[order]
    bump /= torch.linalg.vector_norm(bump.flatten(), ord=order)
    return bump
