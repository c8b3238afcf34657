"""Trained networks and questions at fixed sizes about them, for the files that make what `--trained` asks."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from onnx import ModelProto
from safetensors.numpy import load_file, save_file

from stages.data.base import to_float
from stages.task import Splits, Task

Array = npt.NDArray[Any]
FOLDER = Path("runs/benchmarks/specs")
_LOOKED = 60  # test images that questions are taken from


@dataclass(frozen=True, slots=True)
class Question:
    """Unsafe where, somewhere in low <= x <= high float32 [n], any entry of rows @ y <= bounds holds, or `every` one.

    rows [U, K] are a 1, or a 1 and a -1 with bound 0, so that they can be written as the competition writes them.
    """

    name: str
    low: Array
    high: Array
    rows: Array
    bounds: Array
    every: bool = False

    def text(self) -> str:
        """VNN-LIB."""
        lines = [f"(declare-const X_{i} Real)" for i in range(len(self.low))]
        lines += [f"(declare-const Y_{k} Real)" for k in range(self.rows.shape[1])]
        for i, (low, high) in enumerate(zip(self.low.tolist(), self.high.tolist(), strict=True)):
            lines += [f"(assert (<= X_{i} {high!r}))", f"(assert (>= X_{i} {low!r}))"]
        terms = [_term(row, float(bound)) for row, bound in zip(self.rows, self.bounds, strict=True)]
        unsafe = [f"(assert {term})" for term in terms]
        if not self.every:
            unsafe = [f"(assert (or {' '.join(f'(and {term})' for term in terms)}))"]
        return "\n".join([*lines, *unsafe, ""])

    def room(self, y: torch.Tensor) -> torch.Tensor:
        """[B, K] -> [B]: at least 0 where outputs are unsafe."""
        left = torch.from_numpy(self.bounds).to(y) - y @ torch.from_numpy(self.rows).to(y).T
        return left.amin(1) if self.every else left.amax(1)


@dataclass(frozen=True, slots=True)
class Family:
    model: ModelProto
    questions: tuple[Question, ...]


Families = dict[str, Callable[[], Family]]


def _term(row: Array, bound: float) -> str:
    places = {float(weight): k for k, weight in enumerate(row) if weight}
    if set(places) == {1.0, -1.0} and bound == 0:
        return f"(<= Y_{places[1.0]} Y_{places[-1.0]})"
    if len(places) == 1:
        [(weight, k)] = places.items()
        if abs(weight) == 1:
            return f"(<= Y_{k} {bound!r})" if weight > 0 else f"(>= Y_{k} {-bound!r})"
    raise ValueError(f"row {row.tolist()} with bound {bound}: expected one output, or one no larger than another")


def opened(kind: str) -> Splits:
    """The data set under the folder that TEMPER_DATA names. Raises `InputError` where it is not there."""
    task = {"data": {"kind": kind}, "threat": {"norm": "linf", "eps": 0.1}}
    return Task.load(task).open(Path(os.environ.get("TEMPER_DATA", "../shared/data")))


def right(splits: Splits, answers: Callable[[Array], Array], count: int) -> Iterator[tuple[int, Array, int]]:
    """The first test images (place, [C, H, W] in [0, 1], label) that `answers`, [B, C, H, W] -> [B, K], gets right."""
    x, y = to_float(splits.test.images[:_LOOKED]).numpy(), splits.test.labels[:_LOOKED].numpy()
    found = np.flatnonzero(answers(x).argmax(1) == y)[:count]
    return ((int(i), x[i], int(y[i])) for i in found)


def robust(
    name: str, image: Array, label: int, classes: int, eps: float, scale: Array | float = 1.0, mean: Array | float = 0.0
) -> Question:
    """Can any other class reach the label's output within eps, clipped to [0, 1]?

    The network is fed (pixels - `mean`) times `scale`, each [n] or one number.
    """
    flat = np.asarray(image, np.float64).reshape(-1)
    low, high = (((np.clip(flat + side, 0, 1) - mean) * scale).astype(np.float32) for side in (-eps, eps))
    rows = -np.delete(np.eye(classes), label, 0)
    rows[:, label] = 1.0
    return Question(name, low, high, rows, np.zeros(classes - 1))


def kept(name: str, train: Callable[[], dict[str, Array]]) -> dict[str, Array]:
    """Arrays that are trained once, then read from runs/benchmarks/specs."""
    path = FOLDER / f"{name}.safetensors"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({key: np.ascontiguousarray(value) for key, value in train().items()}, path)
    found: dict[str, Array] = load_file(path)
    return found
