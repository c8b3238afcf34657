"""By how much bounds let a process grow: in pages, and in bytes that are in use."""

import ctypes
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from stages.bounds.alpha_crown import AlphaCrown
from stages.bounds.base import Box, Certifier

Asked = tuple[Box, Tensor]


@torch.no_grad()
def growth(net: nn.Module, certifier: Certifier, first: Asked, asked: Asked) -> tuple[float, float]:
    """MiB of pages, and MiB in use after any operation (not for alpha-CROWN, as it takes a second run).

    `first` is asked before, for the trace and for what torch loads at the first call.
    """
    certifier.lower(net, *first)
    ctypes.CDLL(None).malloc_trim(0)  # what is freed and kept would hide what is taken
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = _status("VmRSS")
    certifier.lower(net, *asked)
    pages = (_status("VmHWM") - before) / 1024
    if isinstance(certifier, AlphaCrown):
        return pages, float("nan")
    with _Live() as live:
        certifier.lower(net, *asked)
    return pages, (live.most - live.before) / 2**20


def _status(field: str) -> int:
    """KiB"""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


class _Heap(ctypes.Structure):
    """struct mallinfo2 of glibc's malloc.h: `mapped` and `used` bytes."""

    _fields_: ClassVar = [
        *((f"_{i}", ctypes.c_size_t) for i in range(4)),
        ("mapped", ctypes.c_size_t),
        *((f"_{i}", ctypes.c_size_t) for i in range(5, 7)),
        ("used", ctypes.c_size_t),
        *((f"_{i}", ctypes.c_size_t) for i in range(8, 10)),
    ]


class _Live(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Looks after every operation how many bytes of the heap are in use."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._info = ctypes.CDLL(None).mallinfo2
        self._info.restype = _Heap
        self.before = self.most = self._used()

    def _used(self) -> int:
        found = self._info()
        return int(found.used + found.mapped)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        self.most = max(self.most, self._used())
        return found
