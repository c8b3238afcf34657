"""Nearest points of an l1 ball cut with the data range."""

import torch
from torch import Tensor

from stages.threat import Threat


def project(x_adv: Tensor, x: Tensor, threat: Threat) -> Tensor:
    """The point of {v: ||v - x||_1 <= eps, low <= v <= high} nearest to `x_adv`, [B, ...], in the euclidean sense.

    With a = |x_adv - x| and c >= 0 the room that the range leaves in that direction, the distances of the solution are
    min(max(a - t, 0), c) for the least t >= 0 at which they sum to at most eps. The sum is piecewise linear in t with
    kinks at a and at a - c, so sorting the kinks gives t exactly. `Threat.project` clips after projecting instead,
    which stays in both sets but may stop short of the ball's surface.

    Source: the problem is that of Croce and Hein 2021, proposition 2.1; solved here by our own sweep, in float64.
    """
    delta = (x_adv - x).flatten(1).double()
    origin = x.flatten(1).double()
    length = delta.abs()
    room = torch.where(delta > 0, threat.high - origin, origin - threat.low).clamp(min=0)
    kinks = torch.cat([length, (length - room).clamp(min=0)], 1)
    kinks, order = kinks.sort(dim=1, descending=True)
    # From the largest kink down: a coordinate starts to grow at its `length` and stops at `length - room`.
    growing = torch.where(order < length.shape[1], 1.0, -1.0).to(kinks.dtype).cumsum(1)
    gain = growing[:, :-1] * (kinks[:, :-1] - kinks[:, 1:])
    reached = torch.cat([torch.zeros_like(gain[:, :1]), gain.cumsum(1)], 1)
    at = (reached <= threat.eps).sum(1, keepdim=True).clamp(min=1) - 1
    slope = growing.gather(1, at).clamp(min=1)
    cut = kinks.gather(1, at) - (threat.eps - reached.gather(1, at)) / slope
    inside = torch.minimum(length, room).sum(1, keepdim=True) <= threat.eps
    short = torch.minimum((length - torch.where(inside, 0.0, cut).clamp(min=0)).clamp(min=0), room)
    nearest = (origin + delta.sign() * short).clamp(threat.low, threat.high)
    return nearest.to(x.dtype).view_as(x)
