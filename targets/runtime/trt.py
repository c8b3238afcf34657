"""A TensorRT engine as a callable from images to logits, over the CUDA driver alone (ctypes, no other package).

What here needs a GPU was never run in the project's own tests: `Cuda` and `TrtEngine`. They are kept small for that.
"""

import ctypes
import subprocess
import sys
from importlib import import_module
from typing import Any

import numpy as np
import numpy.typing as npt

from targets.runtime.errors import EngineError, MissingRuntime
from targets.runtime.form import BATCHES
from targets.runtime.trt_build import MODULES, installed

Array = npt.NDArray[np.float32]
_PROBE = "import ctypes, sys; sys.exit(1 if ctypes.CDLL('libcuda.so.1').cuInit(0) else 0)"


def driver_answers(timeout: float = 30.0) -> bool:
    """Whether a CUDA driver is there and starts. Asked in another process: a TensorRT runtime without one crashes."""
    try:
        done = subprocess.run([sys.executable, "-c", _PROBE], capture_output=True, timeout=timeout, check=False)
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0


def open_engine(
    plan: bytes, shape: tuple[int, int, int], classes: int, largest: int = BATCHES[2], guarded: bool = False
) -> "TrtEngine":
    """Deserialise a plan on this machine's GPU. Raises `MissingRuntime` without TensorRT or a driver."""
    name = installed()
    if name is None:
        raise MissingRuntime(f"TensorRT is not installed ({' or '.join(MODULES)}); or open with runtime='cpu'")
    if not driver_answers():
        raise MissingRuntime("no CUDA driver answers on this machine; open with runtime='cpu'")
    return TrtEngine(import_module(name), plan, Cuda(), shape, classes, largest, guarded)


class Cuda:
    """The few calls of the CUDA driver that inference needs, on the primary context of device 0."""

    def __init__(self) -> None:
        self._lib = ctypes.CDLL("libcuda.so.1")
        device, self._context, stream = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_void_p()
        self._call("cuInit", 0)
        self._call("cuDeviceGet", ctypes.byref(device), 0)
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), device)
        self.enter()
        self._call("cuStreamCreate", ctypes.byref(stream), 0)
        self.stream: int = stream.value or 0

    def enter(self) -> None:
        """Make the context current in the calling thread; a server calls from many."""
        self._call("cuCtxSetCurrent", self._context)

    def allocate(self, size: int) -> int:
        pointer = ctypes.c_uint64()
        self._call("cuMemAlloc_v2", ctypes.byref(pointer), ctypes.c_size_t(size))
        return pointer.value

    def upload(self, pointer: int, array: npt.NDArray[Any]) -> None:
        source = ctypes.c_void_p(array.ctypes.data)
        self._call("cuMemcpyHtoD_v2", ctypes.c_uint64(pointer), source, ctypes.c_size_t(array.nbytes))

    def download(self, array: npt.NDArray[Any], pointer: int) -> None:
        target = ctypes.c_void_p(array.ctypes.data)
        self._call("cuMemcpyDtoH_v2", target, ctypes.c_uint64(pointer), ctypes.c_size_t(array.nbytes))

    def wait(self) -> None:
        self._call("cuStreamSynchronize", ctypes.c_void_p(self.stream))

    def free_bytes(self) -> int:
        """Memory that the GPU has left; on Jetson this is the board's own memory."""
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self._call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        return free.value

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self._lib, name)(*arguments)
        if status != 0:
            raise EngineError(f"CUDA driver: {name} failed with status {status}")


class TrtEngine:
    """One execution context with buffers for the largest batch; calls are one after another, not thread-safe.

    `guarded` says that the graph has a detector, so that its outputs are logits, score and flag.
    """

    def __init__(
        self,
        trt: Any,
        plan: bytes,
        cuda: Any,
        shape: tuple[int, int, int],
        classes: int,
        largest: int = BATCHES[2],
        guarded: bool = False,
    ) -> None:
        self._cuda, self._largest = cuda, largest
        self._runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
        self._engine = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise EngineError("TensorRT does not take the engine: it fits another GPU or version; run `finish` again")
        self._context = self._engine.create_execution_context()
        self._input = cuda.allocate(4 * self._largest * int(np.prod(shape)))
        self._context.set_tensor_address("input", self._input)
        # Per image: its shape and type. TensorRT's booleans are bytes.
        self._form: dict[str, tuple[tuple[int, ...], npt.DTypeLike]] = {"logits": ((classes,), np.float32)}
        if guarded:
            self._form |= {"score": ((), np.float32), "flag": ((), np.bool_)}
        self._buffers = {}
        for name, (inner, dtype) in self._form.items():
            size = self._largest * int(np.prod(inner)) * np.dtype(dtype).itemsize
            self._buffers[name] = cuda.allocate(size)
            self._context.set_tensor_address(name, self._buffers[name])

    def __call__(self, images: Array) -> Array:
        """Float32 [N, C, H, W] -> logits float32 [N, classes], in pieces of the engine's largest batch."""
        return self.outputs(images)["logits"]

    def outputs(self, images: Array) -> dict[str, npt.NDArray[Any]]:
        """Every output by name: logits and, of a graph with a detector, score float32 [N] and flag bool [N]."""
        self._cuda.enter()
        starts = range(0, len(images), self._largest)
        pieces = [self._piece(images[start : start + self._largest]) for start in starts]
        return {name: np.concatenate([piece[name] for piece in pieces]) for name in self._form}

    def _piece(self, images: Array) -> dict[str, npt.NDArray[Any]]:
        piece = np.ascontiguousarray(images, np.float32)
        found: dict[str, npt.NDArray[Any]] = {
            name: np.empty((len(piece), *inner), dtype) for name, (inner, dtype) in self._form.items()
        }
        self._context.set_input_shape("input", piece.shape)
        self._cuda.upload(self._input, piece)
        if not self._context.execute_async_v3(self._cuda.stream):
            raise EngineError(f"TensorRT failed to run a batch of {len(piece)}")
        self._cuda.wait()
        for name, array in found.items():
            self._cuda.download(array, self._buffers[name])
        return found
