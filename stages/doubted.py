"""Is what the attack on a detector leaves believable? A black box, a whole ball and the detector's own gradients ask.

An attack that knows the detector can fail because the detector hides its gradients, not because it works. The checks
are those of `validity.py` and `smoothness.py`, for network and detector together.
"""

from dataclasses import dataclass, field, replace

import torch
from torch import Generator, Tensor

from stages import validity
from stages.attacks._losses import margin
from stages.attacks.square import Square
from stages.detectors.base import Detector
from stages.finding import Finding, Point
from stages.oracle import Logits, Oracle
from stages.seeding import generator
from stages.smoothness import Told, told
from stages.threat import Threat

FEW = 40
_SOME = 200
_SQUARE = Square(queries=200)
# A suspicion above the threshold against a lead in logits: both about 1 where the answer turns.
_SCALE = 10.0
# Rounding to one bit moves by half as much again as its straight-through gradient says; a part without a twin by any
# factor.
_TOLD = (0.5, 2.0)
_BLUR = 0.25


def some(rows: Tensor, rng: Generator) -> Tensor:
    """At most 200 of `rows` [M], drawn at random."""
    order: Tensor = rows[torch.randperm(len(rows), generator=rng).to(rows.device)]
    return order[:_SOME]


@dataclass(frozen=True, slots=True)
class Joint(Oracle):
    """Network and detector as one classifier, for images of labels `y` [N]: of two logits the second is the larger one
    exactly where the answer is wrong and not flagged. Any attack runs on it, with class 0 as the true one."""

    detector: Detector = field(kw_only=True)
    threshold: float = field(kw_only=True)
    y: Tensor = field(kw_only=True)

    def __getitem__(self, rows: Tensor) -> "Joint":
        return replace(self, rows=self.rows[rows])

    def __call__(self, x: Tensor) -> Tensor:
        z, suspicions = self.detector.examine(self.logits, x)
        lead, excess = margin(z, self.y[self.rows]), suspicions.amax(0) - self.threshold
        lead = torch.where(excess > 0, torch.minimum(lead, -_SCALE * excess), lead)
        return torch.stack([torch.zeros_like(lead), lead], 1)


def from_outside(
    detector: Detector, threshold: float, logits: Logits, x: Tensor, y: Tensor, threat: Threat, rng: Generator
) -> tuple[Tensor, Tensor]:
    """Square with 200 queries on network and detector together: which images stand, bool [N], and its inputs."""
    if len(x) == 0:
        return torch.ones(0, dtype=torch.bool, device=x.device), x
    plain = Oracle.of(logits, len(x), x.device)
    both = Joint(logits, plain.rows, plain.spent, detector=detector, threshold=threshold, y=y)
    with torch.no_grad():
        found = threat.project(_SQUARE.perturb(both, x, torch.zeros_like(y), threat, rng), x)
        return both(found).argmax(1) == 0, found


def black_box(white: Tensor, black: Tensor) -> Finding:
    """Asking for answers, scores and flags alone must not evade significantly more than following gradients does.

    bool [M] each: what stood up to the adaptive attack, and to the black box.
    """
    found = validity.black_box(white, black, f"against the detector, square with {_SQUARE.queries} queries")
    return Finding("detector_black_box", found.ok, found.text)


def twins(detector: Detector, x: Tensor) -> Finding:
    """Every copy's gradient tells roughly how the copy changes from one image to the next; hidden rounding tells 0 %.

    Measured as in `smoothness.py`, under a fixed random projection.
    """
    parts = [_told_by_copy(detector, number, x) for number in range(len(detector.copies(x[:1])))]
    low, high = _TOLD
    ok = all(low <= part.share <= high and part.error <= _BLUR for part in parts)
    told_all = ", ".join(f"{part.share:.0%}" for part in parts)
    text = (
        f"between {len(x)} images the gradients of the detector's copies tell {told_all} of their change; must be "
        f"{low:.0%} to {high:.0%} each" + ("" if ok else ", so a part that is not smooth must offer its twin")
    )
    return Finding("detector_twins", ok, text)


def falls(detector: Detector, threshold: float, logits: Logits, x: Tensor, y: Tensor, seed: int) -> Finding:
    """At linf eps 1 gradient steps from the image itself must reach a wrong answer that is not flagged.

    Every image can become any other there, so what stands shows that gradients lead nowhere. As without a detector
    (`validity.falls_to_chance`), the share of the commonest label may stand: that of a constant answer.
    """
    found = detector.adaptive.model_copy(update={"restarts": 0}).evade(
        lambda point, _: detector.inspect(logits, point),
        threshold,
        x,
        y,
        Threat(norm="linf", eps=1.0),
        generator(seed, "whole", device=x.device),
        (x,),
    )
    left, common = Point(1.0, int((~found.evaded).sum()), len(x)), int(y.bincount().max()) / len(x)
    text = (
        f"at linf eps 1, where every image can become any other, the attack that knows the detector leaves "
        f"{left.value:.3f} of {left.total} images (95 % low {left.interval[0]:.3f}); must be <= {common:.3f}, the "
        "share of the commonest class"
    )
    return Finding("detector_falls", left.interval[0] <= common, text)


def _told_by_copy(detector: Detector, number: int, x: Tensor) -> Told:
    weights = torch.randn(x.shape[1:], generator=generator(0, "projection", device=x.device), device=x.device)

    def value(point: Tensor) -> Tensor:
        total: Tensor = (detector.copies(point)[number] * weights).flatten(1).sum(1)
        return total

    def slope(point: Tensor) -> Tensor:
        with torch.enable_grad():
            at = point.detach().requires_grad_(True)
            total = value(at).sum()
            if not total.requires_grad:
                return torch.zeros_like(point)
            (found,) = torch.autograd.grad(total, at)
        return found

    return told(value, slope, x, x.roll(1, 0))
