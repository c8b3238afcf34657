"""Randomised smoothing (Cohen et al. 2019): l2 radii of another classifier, the smoothed one. In `audit` only."""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist
from typing import ClassVar

import torch
from pydantic import Field
from torch import Generator, Tensor

from stages.bounds._binomial import lower_confidence
from stages.bounds.base import Bounds
from stages.evaluate import OnStep, outputs
from stages.method import InputError
from stages.oracle import Logits
from stages.seeding import generator
from stages.threat import Threat

_BATCH = 500


@dataclass(frozen=True, slots=True)
class Smoothed:
    """Of the smoothed classifier, [N] each: its class, how many of the n noisy copies were given it, and the l2 radius
    within which it stays; 0 where the statement is not possible and the classifier abstains."""

    classes: Tensor
    counts: Tensor
    radii: Tensor

    @property
    def abstained(self) -> Tensor:
        """bool [N]."""
        return self.radii == 0

    def right(self, y: Tensor) -> Tensor:
        """bool [N]: answered, and rightly."""
        return (self.classes == y) & ~self.abstained

    def certified(self, y: Tensor, eps: float) -> Tensor:
        """bool [N]: right on the whole closed ball of radius eps."""
        return self.right(y) & (self.radii > eps)


class Smoothing(Bounds):
    """The smoothed classifier g(x) = argmax_k P(f(x + sigma e) = k), e standard normal, and where it cannot change.

    The class c that f gives most of `n0` noisy copies of x is held fixed; of `n` fresh copies f gives it to some. With
    p the Clopper-Pearson lower bound at 1 - alpha on c's share (exact, one-sided), and p > 1/2,

        g(x + d) = c for every d in R^D with ||d||_2 < R = sigma Phi^-1(p);

    otherwise it abstains. Over the draws, R is too large with probability alpha at most, for each image by itself. The
    largest R that n copies can give is `reach`.

    That is a statement on g, whose every prediction takes n forward passes of f, and says nothing of f itself: it never
    feeds a certified figure of the file. Pseudo-random numbers stand in for independent ones and float32 for real
    numbers, as in every implementation known to us; attacks on exactly that exist (Jin et al. 2022, from memory).

    Source: Cohen, Rosenfeld, Kolter 2019, theorem 1 and algorithm CERTIFY. Departure: the closed ball of radius eps
    counts where R > eps, not R >= eps.
    """

    instead: ClassVar[str] = "proves something of another classifier, the smoothed one, and nothing about the network"
    sigma: float = Field(default=0.25, gt=0)
    n0: int = Field(default=100, ge=1)
    n: int = Field(default=10_000, ge=1, le=10_000_000)
    alpha: float = Field(default=0.001, gt=0, lt=1)

    @property
    def passes(self) -> int:
        """Forward passes per image."""
        return self.n0 + self.n

    @property
    def reach(self) -> float:
        """The largest radius: that of an image whose n copies all get one class."""
        return self._radius(self.n)

    def accept(self, threat: Threat) -> None:
        """Raises `InputError` for other norms than l2."""
        if threat.norm != "l2":
            raise InputError(
                f"smoothing: expected a threat in l2, in which Gaussian noise gives a radius, got {threat.norm}; "
                "take --threat l2:EPS, or a certifier (`list bounds`)"
            )

    def judge(self, logits: Logits, x: Tensor, seeds: Callable[[int], int], on_step: OnStep | None = None) -> Smoothed:
        """Images [N, C, H, W] one by one; `seeds(i)` is the i-th one's. `on_step(done, total)` counts images."""
        found = []
        for i, image in enumerate(x):
            select, estimate = (generator(seeds(i), part, device=x.device) for part in ("select", "estimate"))
            chosen = int(self._counts(logits, image, self.n0, select).argmax())
            hits = self._counts(logits, image, self.n, estimate)
            count = int(hits[chosen]) if chosen < len(hits) else 0
            found.append((chosen, count, self._radius(count)))
            if on_step is not None:
                on_step(i + 1, len(x))
        classes, counts, radii = zip(*found, strict=True)
        return Smoothed(torch.tensor(classes), torch.tensor(counts), torch.tensor(radii, dtype=torch.float64))

    def _counts(self, logits: Logits, image: Tensor, copies: int, rng: Generator) -> Tensor:
        """How often each class is given to `copies` noisy copies, int64 [K'], K' the highest class given plus one."""
        counts = torch.zeros(0, dtype=torch.int64)
        for at in range(0, copies, _BATCH):
            shape = (min(_BATCH, copies - at), *image.shape)
            noise = torch.randn(shape, generator=rng, device=image.device, dtype=image.dtype)
            given = outputs(logits, image + self.sigma * noise, _BATCH).argmax(1).cpu()
            more = torch.bincount(given, minlength=len(counts))
            more[: len(counts)] += counts
            counts = more
        return counts

    def _radius(self, count: int) -> float:
        share = lower_confidence(count, self.n, self.alpha)
        return self.sigma * NormalDist().inv_cdf(share) if share > 0.5 else 0.0
