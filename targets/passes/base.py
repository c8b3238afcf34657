"""What a pass is: a module with `lower(model, options, kit) -> ModelProto` and two words about itself.

    EXACT = True        the graph computes the same function, up to the order of floating-point sums; `apply` refuses
                        the pass where it does not. False: how much may change is the gate's business.
    WHOLE = False       changes the network, and never sees the detector around it. True: is about the graph as it
                        ships (another format, another parser), so it comes after a detector was attached.

The folder is the registry: every file here but `base.py` and `_name.py` is one pass of that name. A pass never changes
the model it was given, and equal models, options and kits give equal bytes.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import onnx

from pipeline.core.errors import BadInput, nearest

Array = npt.NDArray[np.float32]


class LoweringError(BadInput):
    """A graph that cannot be lowered as asked; the text names the pass and, where it can, the node."""


def _quiet(_: str) -> None:
    return


@dataclass(frozen=True, slots=True)
class Kit:
    """What a pass may use beside the graph.

    `calibration` float32 [N, C, H, W] in [0, 1], clean images and attacked ones, in a fixed order. `work` is a folder
    for intermediate files. `note` takes sentences for the log. Files that a pass makes beside the graph, such as
    `.ort`, go into `extras` by their suffix.
    """

    calibration: Array
    work: Path
    on_step: Callable[[int, int], None] | None = None
    note: Callable[[str], None] = _quiet
    extras: dict[str, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        images = self.calibration
        if images.ndim != 4 or images.dtype != np.float32 or not len(images):
            raise LoweringError(f"calibration: expected float32 [N, C, H, W], got {images.dtype} {images.shape}")
        if not (images.min() >= 0 and images.max() <= 1):
            raise LoweringError(f"calibration: expected values in [0, 1], got {images.min():g}..{images.max():g}")


class Pass(Protocol):
    """Satisfied by a module of this folder."""

    EXACT: bool
    WHOLE: bool

    def lower(self, model: onnx.ModelProto, options: Mapping[str, Any], kit: Kit, /) -> onnx.ModelProto: ...


def read_options(name: str, given: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The defaults with the given values over them. Raises `LoweringError` for unknown names and other types."""
    for key, value in given.items():
        if key not in defaults:
            raise LoweringError(f'pass "{name}": no option "{key}"{nearest(key, defaults)}')
        if type(value) is not type(defaults[key]):
            raise LoweringError(
                f'pass "{name}": option "{key}": expected {type(defaults[key]).__name__}, got {value!r}'
            )
    return {**defaults, **given}


def names() -> tuple[str, ...]:
    """The passes on offer, sorted; imports none of them."""
    folder = Path(__file__).parent
    return tuple(sorted(p.stem for p in folder.glob("*.py") if p.stem != "base" and p.stem[0] != "_"))


def load(name: str) -> ModuleType:
    """The module of a pass. Raises `LoweringError` with the nearest name."""
    from importlib import import_module

    if name not in names():
        raise LoweringError(f'no pass "{name}"{nearest(name, names())}')
    return import_module(f"targets.passes.{name}")
