"""Rank budgets for the input-channel slices of a convolution (Dbouk and Shanbhag 2021, problems 1 and 2).

A dense kernel W [M, C, K, K] falls into C slices W_c [M, K^2] with singular values s_{c,1} >= s_{c,2} >= ... Keeping
g_c of slice c costs the error sum_c alpha_c sum_{i > g_c} s_{c,i}^2, so both problems are about atoms (c, i) of value
alpha_c s_{c,i}^2. Values fall within a slice, so the globally largest atoms never hold atom i + 1 without atom i: the
greedy choice is feasible, hence optimal for both.
"""

import torch
from torch import Tensor

from stages.method import InputError


def atoms(weight: Tensor, alpha: Tensor) -> Tensor:
    """Values [C, min(M, K^2)] in float64, falling along each row; what is zero to rounding is exactly 0.

    Raises `InputError` unless alpha holds C finite numbers of at least 0.
    """
    if alpha.shape != weight.shape[1:2] or not bool((torch.isfinite(alpha) & (alpha >= 0)).all()):
        raise InputError(f"gdws: expected {weight.shape[1]} finite weights of at least 0, got {tuple(alpha.shape)}")
    slices = weight.detach().double().flatten(2).transpose(0, 1)
    sigma = torch.linalg.svdvals(slices)
    # The usual cut for numerical rank: below it a singular value is rounding, not weight.
    cut = sigma[:, :1] * max(slices.shape[1:]) * torch.finfo(torch.float64).eps
    sigma = torch.where(sigma > cut, sigma, 0.0)
    return alpha.double().unsqueeze(1) * sigma**2


def mego(values: Tensor, total: int) -> tuple[int, ...]:
    """Least error for `total` atoms: kernels per slice g [C], the largest values kept. Problem 1.

    Atoms of value 0 are never kept, so the sum of g may be less. Raises `InputError` for a negative total.
    """
    if total < 0:
        raise InputError(f"gdws: expected a total of at least 0 kernels, got {total}")
    order = _falling(values)[:total]
    return _counts(values, order[values.flatten()[order] > 0])


def lego(values: Tensor, beta: float) -> tuple[int, ...]:
    """Fewest atoms for an error of at most beta: kernels per slice g [C]. Problem 2.

    Atoms are dropped from the smallest up while the dropped sum stays within beta. Raises `InputError` for beta < 0.
    """
    if not beta >= 0:
        raise InputError(f"gdws: expected an error budget of at least 0, got {beta}")
    order = _falling(values)
    dropped = int((values.flatten()[order].flip(0).cumsum(0) <= beta).sum())
    return _counts(values, order[: len(order) - dropped])


def error(values: Tensor, kernels: tuple[int, ...]) -> float:
    """The weighted error that keeping `kernels` leaves: the sum of the dropped values."""
    ranks = torch.arange(values.shape[1])
    dropped = ranks >= torch.tensor(kernels).unsqueeze(1)
    return float(values[dropped].sum())


def _falling(values: Tensor) -> Tensor:
    # Stable, so ties within a slice keep their order and the answer is the same everywhere.
    return values.flatten().argsort(descending=True, stable=True)


def _counts(values: Tensor, kept: Tensor) -> tuple[int, ...]:
    counts = torch.bincount(kept // values.shape[1], minlength=values.shape[0])
    return tuple(int(count) for count in counts)
