"""Transposes of strided convolutions by their phases are those of automatic differentiation."""

from itertools import product

import pytest
import torch
from torch.nn import functional as F

from stages.bounds import _phases
from stages.seeding import generator


@pytest.mark.parametrize("stride", [[1, 1], [2, 2], [3, 2]])
def test_phases_make_the_transpose(stride: list[int]) -> None:
    rng = generator(0, "phases")
    for kernel, padding, sizes in product(((1, 1), (2, 3), (4, 4), (5, 1)), ([0, 0], [1, 2]), ([7, 9], [8, 8])):
        x = torch.randn(2, 3, *sizes, generator=rng, dtype=torch.float64, requires_grad=True)
        weight = torch.randn(4, 3, *kernel, generator=rng, dtype=torch.float64)
        result = F.conv2d(x, weight, stride=stride, padding=padding)
        rows = torch.randn(result.shape, generator=rng, dtype=torch.float64)
        (wanted,) = torch.autograd.grad(result, x, rows)
        torch.testing.assert_close(_phases.transposed(rows, weight, stride, padding, sizes), wanted)
