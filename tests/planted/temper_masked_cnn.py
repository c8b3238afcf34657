"""A network whose robustness is an illusion: it rounds its input first, so that gradients with respect to it are zero.

It is a third party's builder, known through the entry point in the folder beside this file. With this folder on the
path (`PYTHONPATH=tests/planted`), a spec may say

    [stages.search]
    kind = "fixed"
    arch = { builder = "masked_cnn", levels = 6 }

and gradient attacks find next to nothing, while a search by outputs alone does.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from stages.nn.builders import small_cnn


class Round(nn.Module):
    """Pixels in steps of 1 / levels; the derivative is zero wherever there is one."""

    def __init__(self, levels: int) -> None:
        super().__init__()
        self.levels = levels

    def forward(self, x: Tensor) -> Tensor:
        steps = x * self.levels + 0.5
        return (steps - torch.remainder(steps, 1)) / self.levels  # a floor for which there are no bounds


def build(
    input_shape: tuple[int, int, int],
    classes: int,
    mean: Sequence[float] = (0.0,),
    std: Sequence[float] = (1.0,),
    *,
    levels: int = 6,
    width: int = 16,
) -> nn.Sequential:
    """Rounding, then `small_cnn`."""
    body = small_cnn.build(input_shape, classes, mean, std, width=width, hidden=64)
    return nn.Sequential(Round(levels), body)
