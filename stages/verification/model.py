"""A network as the verifier sees it: numbers in a row go in and come out, in onnxruntime and as a torch twin."""

import gzip
import zlib
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from torch import Tensor, nn

from stages.engine_kernels import spelled_out
from stages.method import InputError
from stages.nn._onnx_glue import glued, shapes
from stages.nn._onnx_graph import LOGITS, loaded, opset
from stages.nn.imported import imported
from targets.runtime.ort import OrtEngine

Array = npt.NDArray[np.float32]
_GZIP = b"\x1f\x8b"
_LARGEST = 1 << 31  # bytes; no ONNX file is larger


def opened(path: Path) -> Path | bytes:
    """The path itself, or what is in it where it is gzip'd. Raises `InputError` where it cannot be read."""
    try:
        with path.open("rb") as file:
            if file.read(2) != _GZIP:
                return path
        with gzip.open(path) as packed:
            found = packed.read(_LARGEST + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if len(found) > _LARGEST:
        raise InputError(f"{path}: unpacks to more than {_LARGEST >> 30} GiB, which no ONNX file is")
    return found


class Flat(nn.Module):
    """[B, n] -> [B, K]: a network that takes [B, *shape], with everything in a row."""

    def __init__(self, net: nn.Module, shape: Sequence[int]) -> None:
        super().__init__()
        self.net = net
        self.shape = tuple(shape)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.net(x.reshape(-1, *self.shape))
        return y.flatten(1)


class Single(nn.Module):
    """[B, n] -> [B, K]: a network that takes one input of `shape` and knows of no batch, on many side by side."""

    def __init__(self, net: nn.Module, shape: Sequence[int]) -> None:
        super().__init__()
        self.net = net
        self.shape = tuple(shape)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = torch.vmap(self._alone)(x)
        return found

    def _alone(self, x: Tensor) -> Tensor:
        y: Tensor = self.net(x.reshape(self.shape))
        return y.reshape(-1)


class Model:
    """`net` maps float32 [B, n] to [B, K]; `outputs` asks onnxruntime about one input.

    `inputs` is the n of the specification, which settles one open size of the graph; `fed` is the shape of what
    onnxruntime is given. Several inputs are numbered on, in the graph's order, and so are several outputs, unless one
    is called "logits" or the first has just as many numbers as the specification, `outputs`. `strange` says why bounds
    on `net` prove nothing of what onnxruntime computes; None where they do. Raises `InputError` for inputs that are not
    float32, or an operator without a twin.
    """

    def __init__(self, path: Path, inputs: int, outputs: int | None = None) -> None:
        source = opened(path)
        self._engine = OrtEngine(source)
        names = [output.name for output in self._engine.session.get_outputs()]
        if not names or not self._engine.session.get_inputs():
            raise InputError(f"{path}: expected a network, the graph has no {'inputs' if names else 'outputs'}")
        if len(self._engine.session.get_inputs()) != 1 or (len(names) > 1 and LOGITS not in names):
            source = _single(source, self._engine.session, str(path), outputs)
            self._engine = OrtEngine(source)
            names = [output.name for output in self._engine.session.get_outputs()]
        [entry] = self._engine.session.get_inputs()
        if entry.type != "tensor(float)":
            raise InputError(f'{path}: input "{entry.name}" is a {entry.type}; expected tensor(float), that is float32')
        self._name = entry.name
        self.fed = _shape(entry.shape, inputs, f'{path}: input "{entry.name}"')
        self._output = LOGITS if LOGITS in names else names[0]
        self.classes = len(self.outputs(np.zeros(inputs, np.float32)))
        model = onnx.load(source) if isinstance(source, Path) else onnx.load_model_from_string(source)
        meant, self.strange = spelled_out(model)
        source = source if meant is model else meant.SerializeToString()
        self.net = self._batched(source) or Single(imported(source, self.fed[1:], free=False), self.fed).eval()

    def outputs(self, x: Array) -> Array:
        """Float32 [n] -> [K], computed by onnxruntime, one image alone."""
        fed = np.ascontiguousarray(x, np.float32).reshape(self.fed)
        found: Array = self._engine.session.run([self._output], {self._name: fed})[0]
        return found.reshape(-1).astype(np.float32)

    @torch.no_grad()
    def _batched(self, source: Path | bytes) -> Flat | None:
        """The twin on many images at once, where the 1 in front is a batch and not a size that the graph takes away."""
        if self.fed[0] != 1:
            return None
        twin = imported(source, self.fed[1:])
        if twin.piece is not None:
            return None
        twin.settle(self.fed[1:])
        net = Flat(twin, self.fed[1:]).eval()
        try:
            batched = net(torch.zeros(3, prod(self.fed))).shape == (3, self.classes)
        except (RuntimeError, IndexError):  # an operator found a shape that does not fit
            return None
        return net if batched else None

    def disagreement(self, points: Tensor) -> float:
        """How far the twin is from onnxruntime on float32 [B, n], in units of the largest output."""
        engine = torch.from_numpy(np.stack([self.outputs(point.numpy()) for point in points]))
        with torch.no_grad():
            gap = (self.net(points) - engine).abs().max()
        return float(gap / engine.abs().max().clamp(min=1.0))


def _single(source: Path | bytes, session: Any, where: str, outputs: int | None) -> bytes:
    model = loaded(source, where)
    try:
        fed = {name: np.zeros(shape, np.float32) for name, shape in shapes(model.graph).items()}
        sizes = [found.size for found in session.run(None, fed)]
        if sizes[0] == outputs != sum(sizes):
            del model.graph.output[1:]
        glued(model, opset(model))
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    data: bytes = model.SerializeToString()
    return data


def _shape(declared: Sequence[int | str | None], inputs: int, where: str) -> tuple[int, ...]:
    """The shape of one input, with a batch of one where the graph has one; an open size is what is left for it."""
    sizes = [size if isinstance(size, int) and size > 0 else None for size in declared]
    if None not in sizes and prod(size or 0 for size in sizes) == inputs and sizes:
        return tuple(size or 0 for size in sizes)
    sizes[:1] = [1 if sizes[0] is None else sizes[0]] if sizes else []
    known = prod(size for size in sizes if size is not None)
    if sizes.count(None) == 1 and known and inputs % known == 0:
        sizes[sizes.index(None)] = inputs // known
    if len(sizes) < 2 or None in sizes or prod(size or 0 for size in sizes) != inputs:
        raise InputError(
            f"{where} has shape {list(declared)}, the specification names {inputs} inputs X_0 to X_{inputs - 1}; "
            "expected as many as one image has numbers"
        )
    return tuple(size or 0 for size in sizes)
