"""How far two graphs are apart on the same images, both on onnxruntime."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from targets.runtime.ort import OrtEngine

Array = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Parity:
    """`gap`: largest |logit difference|; `scale`: largest |logit| before; `top1`: share of equal classes."""

    gap: float
    scale: float
    top1: float
    images: int


def logits_of(model: bytes, images: Array, threads: int = 1) -> Array:
    """Float32 [N, C, H, W] -> logits [N, classes] of a graph with input "input" and output "logits"."""
    return OrtEngine(model, threads)(images)


def between(before: Array, after: Array) -> Parity:
    """Compare logits [N, classes]. NaN anywhere makes the gap NaN, which no tolerance admits."""
    if before.shape != after.shape or not len(before):
        raise ValueError(f"parity: expected two equal shapes [N, classes], got {before.shape} and {after.shape}")
    return Parity(
        gap=float(np.abs(before - after).max()),
        scale=float(np.abs(before).max()),
        top1=float((before.argmax(1) == after.argmax(1)).mean()),
        images=len(before),
    )


def compare(before: bytes, after: bytes, images: Array, threads: int = 1) -> Parity:
    """Parity of two graphs on probe images."""
    return between(logits_of(before, images, threads), logits_of(after, images, threads))
