"""onnxruntime: a session with the asked provider or an error, and a callable from images to logits.

Official Linux builds from 1.29 on send session metadata to their maker unless told not to before the first import.
"""

import os

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from targets.runtime.errors import BundleError, MissingRuntime

try:
    import onnxruntime
except ImportError as missing:
    raise MissingRuntime('onnxruntime is not installed; `pip install onnxruntime` (or "temper-edge[cpu]")') from missing

Array = npt.NDArray[np.float32]
CPU = "CPUExecutionProvider"
_BATCH = 256


class OrtEngine:
    """An `.onnx` or `.ort` model; `provider` is the one that took the nodes, not the one that was hoped for.

    `threads` is the number of threads inside one operator; 0 lets onnxruntime take every core. `keep` is written: the
    graph that onnxruntime made of the model and runs.
    Raises `MissingRuntime` where the asked provider does not answer, `BundleError` where the model does not load.
    """

    def __init__(self, model: bytes | Path, threads: int = 1, provider: str = CPU, keep: Path | None = None) -> None:
        options = onnxruntime.SessionOptions()
        if keep is not None:
            options.optimized_model_filepath = str(keep)
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        # x86 without VNNI adds two u8 x s8 products in 16 bits and saturates: logits came out 20 % too small. This asks
        # for the kernels that cannot, where weights use all 8 bits; elsewhere it changes nothing.
        options.add_session_config_entry("session.x64quantprecision", "1")
        if threads == 1:
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if provider not in onnxruntime.get_available_providers():
            raise MissingRuntime(f"onnxruntime was built without {provider}; it has {_providers()}")
        wanted = [provider] if provider == CPU else [provider, CPU]
        source = model if isinstance(model, bytes) else str(model)
        try:
            self.session: Any = onnxruntime.InferenceSession(source, options, providers=wanted)
        except Exception as error:  # onnxruntime's exceptions share no base class of their own
            raise BundleError(f"onnxruntime cannot load the model: {_first_line(error)}") from error
        self.provider: str = self.session.get_providers()[0]
        if self.provider != provider:
            raise MissingRuntime(f"{provider} does not work on this machine: onnxruntime fell back to {self.provider}")

    def __call__(self, images: Array) -> Array:
        """Float32 [N, C, H, W] -> logits float32 [N, classes]; long batches run in pieces, so memory stays bounded."""
        return self._run(images, ["logits"])[0]

    def outputs(self, images: Array) -> dict[str, npt.NDArray[Any]]:
        """Every output by name: logits and, of a graph with a detector, score float32 [N] and flag bool [N]."""
        names = [output.name for output in self.session.get_outputs()]
        return dict(zip(names, self._run(images, names), strict=True))

    def _run(self, images: Array, names: list[str]) -> list[npt.NDArray[Any]]:
        pieces = [
            self.session.run(names, {"input": images[start : start + _BATCH]})
            for start in range(0, len(images), _BATCH)
        ]
        return pieces[0] if len(pieces) == 1 else [np.concatenate(parts) for parts in zip(*pieces, strict=True)]


def version() -> str:
    return f"onnxruntime {onnxruntime.__version__}"


def _providers() -> str:
    return ", ".join(onnxruntime.get_available_providers())


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
