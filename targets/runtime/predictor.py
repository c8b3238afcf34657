"""Open a bundle and predict: digests first, then one runtime, then images to logits, labels and margins.

Where the bundle holds a detector, every answer has its score and flag: a flagged input's label is not to be trusted.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from targets.runtime.bundle import Bundle, open_manifest, verify_files
from targets.runtime.errors import BundleError, MissingRuntime
from targets.runtime.images import as_images

Array = npt.NDArray[np.float32]
Outputs = Callable[[Array], dict[str, npt.NDArray[Any]]]
"""Images -> every output of the model by name."""


class Answer(NamedTuple):
    """Logits float32 [N, classes]; the detector's scores float32 [N] and flags bool [N], None without one."""

    logits: Array
    scores: Array | None
    flags: npt.NDArray[np.bool_] | None


class Predictor:
    """A callable from images to logits. `provider` names what runs: onnxruntime's provider, or "TensorRT"."""

    def __init__(self, bundle: Bundle, outputs: Outputs, provider: str) -> None:
        self.bundle, self.outputs, self.provider = bundle, outputs, provider

    def __call__(self, images: npt.NDArray[Any]) -> Array:
        """Images uint8 [N, C, H, W], or floats in [0, 1], -> logits float32 [N, classes]; raises as `answer`."""
        return self.answer(images).logits

    def answer(self, images: npt.NDArray[Any]) -> Answer:
        """Images uint8 [N, C, H, W], or floats in [0, 1], -> logits and, where there is a detector, what it says.

        Raises `BadImages` for any other input, `BundleError` where the model answers in another shape.
        """
        checked = as_images(images, self.bundle.shape)
        found = self.outputs(checked)
        wanted: dict[str, tuple[int, ...]] = {"logits": (len(checked), self.bundle.classes)}
        if self.bundle.guarded:
            wanted |= {"score": (len(checked),), "flag": (len(checked),)}
        for name, shape in wanted.items():
            got = list(found[name].shape) if name in found else "nothing"
            if got != list(shape):
                raise BundleError(f"{self.bundle.folder / self.bundle.model}: expected {name} {list(shape)}, got {got}")
        if not self.bundle.guarded:
            return Answer(found["logits"], None, None)
        return Answer(found["logits"], found["score"], found["flag"].astype(np.bool_))

    def predict(self, images: npt.NDArray[Any]) -> tuple[npt.NDArray[np.int64], Array]:
        """Labels int64 [N] (numbers of classes; `bundle.labels` has their names) and margins float32 [N].

        The margin is the largest logit less the second largest: how far the answer is from another one.
        """
        return decide(self(images))


def decide(logits: Array) -> tuple[npt.NDArray[np.int64], Array]:
    """Labels and margins from logits [N, classes]."""
    two = np.sort(logits, axis=1)[:, -2:]
    return logits.argmax(axis=1).astype(np.int64), two[:, 1] - two[:, 0]


def open_bundle(path: str | Path, verify: bool = True, threads: int = 1, runtime: str = "auto") -> Predictor:
    """A predictor for the bundle in a folder (or for the one in `bundle/` of a run's folder).

    `verify` holds every file against the manifest first; without it only the files that are opened are checked.
    `runtime`: "cpu" is onnxruntime on the processor; "onnxruntime" uses the manifest's provider; "tensorrt" the engine
    that `finish` built here; "auto" takes the engine where `finish` built one, else the manifest's provider where it
    works, else the processor - `Predictor.provider` says which. Raises `BundleError` and what derives from it.
    """
    if runtime not in ("auto", "cpu", "onnxruntime", "tensorrt"):
        raise BundleError(f"runtime: expected auto, cpu, onnxruntime or tensorrt, got {runtime!r}")
    bundle = open_manifest(Path(path))
    if verify:
        verify_files(bundle)
    if runtime in ("auto", "tensorrt"):
        plan = bundle.engine()
        if plan is not None:
            from targets.runtime.trt import open_engine

            engine = open_engine(plan, bundle.shape, bundle.classes, bundle.batches[2], bundle.guarded)
            return Predictor(bundle, engine.outputs, "TensorRT")
        if runtime == "tensorrt":
            raise BundleError(f"{bundle.folder}: no engine was built here yet; run `finish` on the device")
    return on_onnxruntime(bundle, threads, runtime)


def on_onnxruntime(bundle: Bundle, threads: int = 1, runtime: str = "auto") -> Predictor:
    """The bundle's portable model on onnxruntime; see `open_bundle`."""
    from targets.runtime.ort import CPU, OrtEngine

    model = bundle.read(bundle.model)
    wanted = CPU if runtime == "cpu" else bundle.provider
    try:
        engine = OrtEngine(model, threads, wanted)
    except MissingRuntime:
        if runtime != "auto" or wanted == CPU:
            raise
        engine = OrtEngine(model, threads, CPU)
    return Predictor(bundle, engine.outputs, engine.provider)
