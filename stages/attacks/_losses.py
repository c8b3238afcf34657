"""What attacks climb: cross-entropy, margin and DLR per example, in float32 whatever precision the network ran in."""

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from stages.oracle import Logits

Loss = Literal["ce", "margin", "dlr"]

Goal = Callable[[Tensor, Tensor], Tensor]
"""(logits [B, K], labels [B]) -> [B], to be climbed."""

_DLR_CLASSES = 4
_TINY = 1e-12


def cross_entropy(z: Tensor, y: Tensor) -> Tensor:
    """-log softmax(z)_y, [B]. Its gradient vanishes where the true class leads by about 100 or more."""
    loss: Tensor = F.cross_entropy(z.float(), y, reduction="none")
    return loss


def margin(z: Tensor, y: Tensor) -> Tensor:
    """max_{k != y} z_k - z_y, [B]; positive where the answer is wrong. The lead of the true class is its negative."""
    z = z.float()
    true = z.gather(1, y.unsqueeze(1)).squeeze(1)
    rest = z.scatter(1, y.unsqueeze(1), float("-inf"))
    return rest.amax(1) - true


def dlr(z: Tensor, y: Tensor) -> Tensor:
    """Difference of logits ratio, [B]: (max_{k != y} z_k - z_y) / (z_(1) - z_(3)), z_(i) the i-th largest logit.

    Unlike cross-entropy it does not change when all logits are scaled. It asks for three other classes; with fewer than
    four in all, the third logit is the smallest or missing, and `margin` is returned instead: as free of saturation,
    though not of scale.

    Source: Croce and Hein 2020, equation 6.
    """
    if z.shape[1] < _DLR_CLASSES:
        return margin(z, y)
    top = z.float().topk(3, dim=1).values
    return margin(z, y) / (top[:, 0] - top[:, 2] + _TINY)


def targeted_dlr(z: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """-(z_y - z_t) / (z_(1) - (z_(3) + z_(4)) / 2), [B], for the wrong classes `target` int64 [B].

    Positive where the target beats the true class. With fewer than four classes it is z_t - z_y: no fourth logit.

    Source: Croce and Hein 2020, equation 7.
    """
    z = z.float()
    gain = (z.gather(1, target.unsqueeze(1)) - z.gather(1, y.unsqueeze(1))).squeeze(1)
    if z.shape[1] < _DLR_CLASSES:
        return gain
    top = z.topk(4, dim=1).values
    return gain / (top[:, 0] - (top[:, 2] + top[:, 3]) / 2 + _TINY)


def per_example(loss: Loss, z: Tensor, y: Tensor) -> Tensor:
    """The named loss, [B] float32."""
    return {"ce": cross_entropy, "margin": margin, "dlr": dlr}[loss](z, y)


def gradient(logits: Logits, x: Tensor, y: Tensor, loss: Loss | Goal) -> tuple[Tensor, Tensor, Tensor]:
    """As `raw_gradient`, with 0 for entries that are NaN or infinite: one pixel must not end the climb of others."""
    z, losses, slope = raw_gradient(logits, x, y, loss)
    return z, losses, slope.nan_to_num(0.0, 0.0, 0.0)


def raw_gradient(logits: Logits, x: Tensor, y: Tensor, loss: Loss | Goal) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [B, K], loss [B] and its gradient in x, detached. Differentiates in x alone; weights keep no gradient.

    Losses are summed, not averaged, so that an example's gradient does not depend on the batch it is in. Where no
    differentiable path leads from x to the logits, the gradient is zero: attacks then stand still, and the validity
    checks report the share of such examples.
    """
    with torch.enable_grad():
        point = x.detach().requires_grad_(True)
        z = logits(point)
        with torch.autocast(x.device.type, enabled=False):
            losses = per_example(loss, z, y) if isinstance(loss, str) else loss(z, y)
        if not losses.requires_grad:
            return z.detach(), losses.detach(), torch.zeros_like(x)
        (slope,) = torch.autograd.grad(losses.sum(), point, allow_unused=True)
    return z.detach(), losses.detach(), torch.zeros_like(x) if slope is None else slope.detach()
