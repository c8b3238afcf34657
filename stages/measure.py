"""Accuracies as measurements with their per-example outcomes; shared by the five stages."""

from torch import Tensor

from pipeline.core.measurement import Measurement, Strength, fraction
from pipeline.core.record import Outcomes


def accuracy(
    name: str, hits: Tensor, indices: Tensor, under: Strength = "quick"
) -> tuple[Measurement, dict[str, Outcomes]]:
    """Wilson interval and one bit per example; `hits` bool [N], `indices` int64 [N] within the split's file order.

    `under` is the strength of the attacks, and is left out where the metric's name speaks of none.
    """
    right = [bool(hit) for hit in hits.tolist()]
    return fraction(name, sum(right), len(right), under if ".robust." in name else None), {
        name: Outcomes.of(indices.tolist(), right)
    }
