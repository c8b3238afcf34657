"""The one place that imports torchvision."""

import importlib
import sys
from types import ModuleType

import torch

# The library of stand-in operators must live as long as the process.
_stand_ins: list[torch.library.Library] = []


def torchvision() -> ModuleType:
    """The torchvision module, also where its compiled operators cannot load (a CUDA build beside a CPU torch).

    There the import fails because `torchvision::nms` has no definition to register a fake kernel for; defining it
    first is enough. Models and transforms then work; operators in C++ (nms, image decoding) still raise.
    """
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
    for name in [name for name in sys.modules if name == "torchvision" or name.startswith("torchvision.")]:
        del sys.modules[name]
    library = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")  # type: ignore[no-untyped-call]
    _stand_ins.append(library)
    return importlib.import_module("torchvision")
