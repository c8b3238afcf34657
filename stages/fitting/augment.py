"""Random crops and mirror images, on uint8 or float batches."""

import torch
from pydantic import Field
from torch import Generator, Tensor
from torch.nn import functional as F

from stages.method import Value


class Augment(Value):
    """`crop`: pad by this many black pixels on every side and cut back at a random place; `flip`: mirror every second
    image, at random, left to right. Off by default: digits and traffic signs must not be mirrored.
    """

    crop: int = Field(default=0, ge=0)
    flip: bool = False

    def __call__(self, x: Tensor, rng: Generator) -> Tensor:
        """[B, C, H, W] -> the same shape and type; `rng` lies on the CPU, whatever the device of x."""
        if self.flip:
            mirrored = torch.rand(x.shape[0], generator=rng).to(x.device) < 0.5
            x = torch.where(mirrored.view(-1, 1, 1, 1), x.flip(3), x)
        return _crop(x, self.crop, rng) if self.crop else x


def _crop(x: Tensor, margin: int, rng: Generator) -> Tensor:
    n, channels, height, width = x.shape
    padded = F.pad(x, (margin, margin, margin, margin))
    top, left = torch.randint(0, 2 * margin + 1, (2, n), generator=rng).to(x.device)
    rows = (top[:, None] + torch.arange(height, device=x.device))[:, None, :, None]
    columns = (left[:, None] + torch.arange(width, device=x.device))[:, None, None, :]
    images = torch.arange(n, device=x.device)[:, None, None, None]
    planes = torch.arange(channels, device=x.device)[None, :, None, None]
    return padded[images, planes, rows, columns]
