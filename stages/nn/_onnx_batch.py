"""Graphs that were made for a fixed number of images, so that they take any."""

from collections.abc import Sequence
from math import prod


def freed(
    target: Sequence[int], small: Sequence[int], large: Sequence[int], shaped: Sequence[int], batch: int
) -> list[int] | None:
    """The target of a Reshape for any number of images; None where it cannot be told from shapes.

    `small` and `large` are the shapes of its input for `batch` and for twice as many images, `shaped` that of its
    output for `batch` images. The axis of `small` that grows holds the images, as its slowest part, so one image is

        stride = product(small[k:]) / batch

    numbers long; in the output that is the first axis j with product(shaped[j:]) / batch = stride, and it becomes -1.
    With a batch of one this is a guess between axes of one, so the caller compares the graph's outputs afterwards.
    """
    if len(small) != len(large):
        return None  # the batch was squeezed away where it was one
    growing = [k for k, (few, many) in enumerate(zip(small, large, strict=True)) if few != many]
    if not growing:
        return list(target)
    if len(growing) > 1:
        return None
    stride = prod(small[growing[0] :]) // batch
    for j, size in enumerate(shaped):
        if size % batch == 0 and prod(shaped[j:]) == stride * batch:
            return [*shaped[:j], -1, *shaped[j + 1 :]]
    return None
