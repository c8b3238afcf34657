"""Squeezers against brute force on tiny images; their gradients; what the median of four is."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from stages.detectors._squeezers import bit_depth, median_2x2, non_local_means
from stages.seeding import generator

SHAPES = [(2, 3, 5, 7), (1, 1, 1, 4), (3, 1, 4, 1), (1, 2, 1, 1), (1, 1, 8, 8)]


def random(shape: tuple[int, ...], levels: int | None = None) -> Tensor:
    x = torch.rand(shape, generator=generator(0, *map(str, shape)))
    return x if levels is None else (x * levels).round() / levels


def at(x: Tensor, i: int, j: int) -> Tensor:
    """[B, C] at a place; beyond the first row and column the edge is repeated."""
    return x[:, :, max(i, 0), max(j, 0)]


def mirrored(place: int, size: int) -> int:
    while not 0 <= place < size:
        place = 0 if size == 1 else -place if place < 0 else 2 * (size - 1) - place
    return place


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("levels", [None, 3])
def test_the_median_is_the_third_smallest_of_each_window(shape: tuple[int, ...], levels: int | None) -> None:
    x = random(shape, levels)
    found = median_2x2(x)
    for i, j in itertools.product(range(shape[2]), range(shape[3])):
        window = np.stack([at(x, i + di, j + dj).numpy() for di, dj in itertools.product((-1, 0), (-1, 0))])
        assert np.array_equal(found[:, :, i, j].numpy(), np.sort(window, axis=0)[2])


def test_the_median_is_right_for_every_order_of_four_values() -> None:
    for order in itertools.product(range(4), repeat=4):
        x = torch.tensor(order, dtype=torch.float32).view(1, 1, 2, 2) / 4
        assert float(median_2x2(x)[0, 0, 1, 1]) == sorted(order)[2] / 4


def test_the_medians_gradient_goes_to_the_selected_pixel() -> None:
    x = torch.tensor([[0.1, 0.7], [0.4, 0.9]]).view(1, 1, 2, 2).requires_grad_(True)
    (slope,) = torch.autograd.grad(median_2x2(x)[0, 0, 1, 1], x)
    assert torch.equal(slope.view(2, 2), torch.tensor([[0.0, 1.0], [0.0, 0.0]]))


@pytest.mark.parametrize("bits", range(1, 9))
def test_bit_depth_leaves_exactly_so_many_levels_and_does_nothing_twice(bits: int) -> None:
    x = torch.linspace(0, 1, 5001).view(1, 1, 1, -1)
    once = bit_depth(x, bits)
    assert len(torch.unique(once)) == 2**bits
    assert torch.equal(bit_depth(once, bits), once)
    assert float((once - x).abs().max()) <= 0.5 / (2**bits - 1) + 1e-6


def test_eight_bits_are_the_identity_on_decoded_images() -> None:
    x = torch.arange(256, dtype=torch.uint8).to(torch.float32).view(1, 1, 16, 16) / 255
    assert torch.equal(bit_depth(x, 8), x)


def test_one_bit_is_black_and_white_with_half_to_even() -> None:
    x = torch.tensor([0.0, 0.499, 0.5, 0.501, 1.0]).view(1, 1, 1, 5)
    assert bit_depth(x, 1).flatten().tolist() == [0, 0, 0, 1, 1]


def test_bit_depth_keeps_its_value_and_passes_the_gradient_straight_through() -> None:
    x, weight = random((2, 1, 4, 4)), random((2, 1, 4, 4)) - 0.5
    point = x.clone().requires_grad_(True)
    squeezed = bit_depth(point, 3)
    assert torch.equal(squeezed.detach(), bit_depth(x, 3))
    (slope,) = torch.autograd.grad((squeezed * weight).sum(), point)
    assert torch.equal(slope, weight)


def naive(x: Tensor, search: int, patch: int, strength: float) -> Tensor:
    """The formula of the docstring, pixel by pixel, in float64."""
    images = x.double().numpy()
    result = np.zeros_like(images)
    _, channels, height, width = images.shape
    h2, half, edge = (strength / 255) ** 2, search // 2, patch // 2
    around = list(itertools.product(range(-edge, edge + 1), repeat=2))
    for b, i, j in itertools.product(*map(range, (images.shape[0], height, width))):
        image, weights, total = images[b], 0.0, np.zeros(channels)

        def pixel(row: int, column: int, image: np.ndarray = image) -> np.ndarray:
            return image[:, mirrored(row, height), mirrored(column, width)]

        for di, dj in itertools.product(range(-half, half + 1), repeat=2):
            apart = np.mean([(pixel(i + u, j + v) - pixel(i + di + u, j + dj + v)) ** 2 for u, v in around])
            weight = math.exp(-apart / h2)
            weights, total = weights + weight, total + weight * pixel(i + di, j + dj)
        result[b, :, i, j] = total / weights
    return torch.from_numpy(result)


@pytest.mark.parametrize("shape", [(1, 1, 5, 6), (2, 3, 4, 4), (1, 2, 1, 3)])
@pytest.mark.parametrize(("search", "patch", "strength"), [(3, 3, 10), (5, 1, 40), (7, 3, 25), (1, 3, 5)])
def test_non_local_means_is_its_formula(shape: tuple[int, ...], search: int, patch: int, strength: float) -> None:
    x = 0.5 + 0.2 * random(shape)
    found = non_local_means(x, search, patch, strength)
    assert torch.allclose(found.double(), naive(x, search, patch, strength), atol=2e-6)


def test_non_local_means_of_a_flat_image_is_that_image_and_hardly_any_strength_changes_nothing() -> None:
    flat = torch.full((1, 3, 6, 6), 0.37)
    assert torch.allclose(non_local_means(flat, 5, 3, 2), flat, atol=1e-6)
    x = random((1, 1, 6, 6))
    assert torch.allclose(non_local_means(x, 5, 3, 0.01), x, atol=1e-6)


def test_the_gradient_of_non_local_means_is_its_slope() -> None:
    x = (0.5 + 0.2 * random((1, 1, 4, 4))).double()
    assert torch.autograd.gradcheck(lambda p: non_local_means(p, 3, 3, 20), x.requires_grad_(True), atol=1e-6)


def test_one_bit_has_a_gradient_near_its_boundary_alone_and_in_all_as_much_as_it_changes() -> None:
    x = torch.linspace(0, 1, 1001).view(1, 1, 1, -1).requires_grad_(True)
    (slope,) = torch.autograd.grad(bit_depth(x, 1).sum(), x)
    near = (x.detach() - 0.5).abs() < 0.3
    assert torch.equal(slope != 0, near)
    assert float(slope.mean()) == pytest.approx(1, abs=0.01)
