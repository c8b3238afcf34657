"""Flags inputs whose answer changes when they are squeezed: fewer bits, a median, non-local means."""

import re
from collections.abc import Callable
from functools import partial
from typing import Annotated

import torch
from pydantic import AfterValidator
from torch import Tensor

from stages.detectors._squeezers import bit_depth, median_2x2, non_local_means
from stages.detectors.base import Detector
from stages.method import InputError

_FORM = re.compile(r"bit_([1-8])|(median_2)|nlm_(\d*[13579])_(\d*[13579])_([1-9]\d*)")
_GREY = ("bit_1", "median_2")
_COLOUR = ("bit_5", "median_2", "nlm_13_3_2")


def _squeezer(name: str) -> Callable[[Tensor], Tensor]:
    found = _FORM.fullmatch(name)
    if found is None:
        raise ValueError(
            'expected "bit_1" to "bit_8", "median_2", or "nlm_SEARCH_PATCH_STRENGTH" with odd SEARCH and PATCH, '
            f'such as "nlm_13_3_2"; got "{name}"'
        )
    bits, median, search, patch, strength = found.groups()
    if bits:
        return partial(bit_depth, bits=int(bits))
    if median:
        return median_2x2
    return partial(non_local_means, search=int(search), patch=int(patch), strength=int(strength))


def _known(name: str) -> str:
    _squeezer(name)
    return name


def _some(names: tuple[str, ...]) -> tuple[str, ...]:
    if not names:
        raise ValueError("expected one squeezer or more, got none; leave it out for the usual ones")
    return names


class FeatureSqueezing(Detector):
    """score(x) = max_i ||softmax(z(x)) - softmax(z(q_i(x)))||_1, in [0, 2], over the squeezers q_i.

    "bit_B" leaves 2^B levels, "median_2" is the 2 x 2 median, "nlm_A_B_H" non-local means with an A x A search window,
    B x B patches and strength H in units of 1/255 (`_squeezers.py` has each of them exactly). Left out, `squeezers` is
    the paper's joint detector for the number of channels: bit_1 and median_2 for one (its MNIST), else bit_5, median_2
    and nlm_13_3_2 (its CIFAR-10). The threshold belongs to the joint score, never to a single squeezer.

    Source: Xu, Evans and Qi 2018, sections II and IV, constants from their released code. Departures: a conservative
    threshold (`_threshold.py`); non-local means in real numbers and without the CIELAB detour (`_squeezers.py`).
    It detects attacks that do not know it; what `adaptive` finds is the number to believe.
    """

    squeezers: Annotated[tuple[Annotated[str, AfterValidator(_known)], ...], AfterValidator(_some)] | None = None

    def copies(self, x: Tensor) -> Tensor:
        if x.dim() != 4:
            raise InputError(f"feature_squeezing: expected images [B, C, H, W], got {tuple(x.shape)}")
        chosen = self.squeezers or (_GREY if x.shape[1] == 1 else _COLOUR)
        return torch.stack([_squeezer(name)(x) for name in chosen])

    def suspicions(self, z: Tensor, others: Tensor) -> Tensor:
        return (others.softmax(-1) - z.softmax(-1)).abs().sum(-1)
