"""The file under audit: as onnxruntime runs it, and its torch twin where it has one. Both take images in pixels."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from torch import Tensor

from stages.adapter import FLOATS, Adapter, Behind, FileLogits, Form, Layout
from stages.engine_kernels import spelled_out
from stages.method import InputError
from stages.nn.imported import LOGITS, imported
from stages.oracle import Logits
from stages.seeding import generator
from stages.shipped import Relay, Shipped
from targets.runtime.errors import BundleError
from targets.runtime.ort import OrtEngine

_PIECE = 128
_REAL, _RANDOM = 32, 16
# Of the largest logit: float32 sums in another order stay far below it, another function does not.
_SAME = 1e-3
# Probabilities below it have lost digits, and say nothing precise of the logits that they came from.
_CLEAR = 1e-30
# Logits less apart than this may have the same probability in float32.
_TIED = 2.0**-21
# Where values are rounded on the way single codes differ: the mean difference, as a share of the logits' spread.
_ROUNDED, _TOP1 = 0.02, 0.9


@dataclass(frozen=True, slots=True)
class Subject:
    """The file, its twin and what is known of both.

    `why` is the reason where there is no twin; `gap` the largest difference between the logits of twin and file (after
    a softmax: between their logarithms) on the inputs that were compared, of which `text` tells; `strange` what
    onnxruntime computes that the file's nodes do not say, so that bounds on the twin prove nothing of the file.
    """

    path: Path
    digest: str
    file: FileLogits
    classes: int
    twin: Behind | None
    why: str
    gap: float
    text: str
    notes: tuple[str, ...]
    strange: str | None = None

    @property
    def through(self) -> Logits:
        """Values of the file, gradients of its twin; the file alone where there is none."""
        return self.file if self.twin is None else Shipped(self._answers, self.twin)

    @property
    def attacked(self) -> Logits:
        """What attacks ask: for gradients the twin, where it is the file to rounding; for answers what is quicker."""
        if self.twin is None or self.twin.twin.rounds:
            return self.through
        # A file that ends in a softmax answers with something else, and one with a fixed batch slowly.
        return self.twin if self.twin.twin.softmax or self.file.exact else Relay(self._answers, self.twin)

    def _answers(self, images: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        found: npt.NDArray[np.float32] = self.file(torch.from_numpy(images)).numpy()
        return found


def opened(path: Path, x: Tensor, form: Form, threads: int) -> Subject:
    """The file ready for images like x, float [N, C, H, W] in [0, 1], of which the first few serve for comparison.

    Raises `InputError` for what is no ONNX classifier of such images.
    """
    image = tuple(x.shape[1:])
    try:
        data = path.read_bytes()
        session = OrtEngine(path, threads).session
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error
    except BundleError as error:
        raise InputError(f"{path}: {error}") from error
    layout, wanted, batch = _fitted(path, session, image, form.layout)
    output = _scores(path, session)
    adapter = Adapter(form, layout, image, wanted).eval()
    file, notes = _session(path, FileLogits(adapter, session, output, batch or _PIECE, batch is not None), x)
    classes = _classes(path, file, x)
    if tuple(wanted) not in (image, (*image[1:], image[0])):
        notes = (*notes, f"images of {_times(image)} are flattened to the file's {_times(wanted)}, {layout}")
    subject = Subject(path, hashlib.sha256(data).hexdigest(), file, classes, None, "", 0.0, "", notes)
    probes = torch.cat([x[:_REAL], torch.rand(_RANDOM, *image, generator=generator(0, "audit", "inputs"))])
    expected = file.one_by_one(probes)
    if not bool(torch.isfinite(expected).all()):
        bad = int((~torch.isfinite(expected)).any(1).sum())
        raise InputError(f"{path}: its outputs are NaN or infinite for {bad} of {len(probes)} images; repair the model")
    model = onnx.load(path)
    meant, strange = spelled_out(model)
    source = path if meant is model else bytes(meant.SerializeToString())
    try:
        twin = Behind(adapter, imported(source, wanted, output, before_softmax=True)).eval()
        gap, text = _agree(twin, probes, expected)
    except InputError as error:
        return replace(subject, why=str(error).removeprefix(f"{path}: "))
    if twin.twin.softmax:
        text += "; the file ends in a softmax, and gradients are taken before it"
    return replace(subject, twin=twin, gap=gap, text=text, strange=strange)


def _fitted(
    path: Path, session: Any, image: tuple[int, ...], layout: Layout | None
) -> tuple[Layout, tuple[int, ...], int | None]:
    """Layout and shape of one input, and the batch that the file is fixed to, if any."""
    inputs = session.get_inputs()
    if len(inputs) != 1:
        raise InputError(f"{path}: expected a classifier with one input, got {len(inputs)}: {_names(inputs)}")
    if inputs[0].type not in FLOATS:
        raise InputError(f'{path}: expected an input of floats, got "{inputs[0].name}" of {inputs[0].type}')
    sizes = [size if isinstance(size, int) and size > 0 else None for size in inputs[0].shape]
    turned: dict[Layout, tuple[int, ...]] = {"nchw": image, "nhwc": (*image[1:], image[0])}
    if len(sizes) > 1:
        fitting = [name for name, shape in turned.items() if _fits(sizes[1:], shape)]
        for name in fitting:
            if layout in (None, name):
                return name, turned[name], sizes[0]
        numbers, open_places = int(np.prod(image)), sizes[1:].count(None)
        rest = int(np.prod([size or 1 for size in sizes[1:]]))
        flat = (open_places == 0 and rest == numbers) or (open_places == 1 and numbers % rest == 0)
        if flat and not fitting:
            return layout or "nchw", tuple(size or numbers // rest for size in sizes[1:]), sizes[0]
    raise InputError(
        f'{path}: its input "{inputs[0].name}" is {_times(inputs[0].shape)}, which does not fit images of '
        f"{_times(image)} (C x H x W){f' as {layout}' if layout else ''}; expected a batch and {int(np.prod(image))} "
        "numbers: choose other data, or another --layout"
    )


def _fits(sizes: Sequence[int | None], shape: Sequence[int]) -> bool:
    return len(sizes) == len(shape) and all(size in (None, own) for size, own in zip(sizes, shape, strict=True))


def _scores(path: Path, session: Any) -> str:
    """The output that holds the scores: the only float one, or the one called "logits"."""
    outputs = session.get_outputs()
    floats = [output for output in outputs if output.type in FLOATS]
    named = [output for output in floats if output.name == LOGITS]
    if len(named or floats) == 1:
        return str((named or floats)[0].name)
    raise InputError(
        f"{path}: expected a classifier with one output of floats, or one called {LOGITS}; got {_names(outputs)}"
    )


def _session(path: Path, file: FileLogits, x: Tensor) -> tuple[FileLogits, tuple[str, ...]]:
    """Does it run, and on more than one image? Some files leave the batch open and hold a batch of one inside."""
    try:
        file(x[: file.piece if file.exact else 1])
    except Exception as error:  # onnxruntime's exceptions share no base class of their own
        raise InputError(f"{path}: onnxruntime cannot run it on an image: {_line(error)}") from error
    if file.exact:
        return file, (f"the file takes {file.piece} images at a time",)
    try:
        if file.shape_of(x[:1].expand(3, *x.shape[1:]))[:1] == (3,):
            return file, ()
    except Exception:  # as above
        pass
    file.piece, file.exact = 1, True
    return file, ("the file leaves its batch open, and runs on one image at a time only",)


def _classes(path: Path, file: FileLogits, x: Tensor) -> int:
    """K, read off an answer. Raises `InputError` where the answer is none of a classifier."""
    batch = file.piece if file.exact else 2
    shape = file.shape_of(x[:1].expand(batch, *x.shape[1:]))
    sizes = [size for size in shape[1:] if size != 1] if shape and shape[0] == batch else list(shape)
    if len(sizes) != 1 or (shape[0] != batch and batch != 1):
        raise InputError(
            f"{path}: expected a classifier, which answers {batch} images with {batch} rows of two scores or more; "
            f'its output "{file.output}" is {_times(shape)}'
        )
    return int(sizes[0])


@torch.no_grad()
def _agree(twin: Behind, probes: Tensor, expected: Tensor) -> tuple[float, str]:
    """The largest difference, and a sentence. Raises `InputError` where twin and file are not the same function."""
    try:
        logits = twin(probes)
    except (RuntimeError, ValueError, IndexError, KeyError, TypeError) as error:
        raise InputError(f"its torch twin does not run: {_line(error)}") from error
    found = logits.softmax(1) if twin.twin.softmax else logits
    if found.shape != expected.shape:
        raise InputError(f"its torch twin answers {_times(found.shape)}, the file {_times(expected.shape)}")
    gaps, real = (found - expected).abs(), len(probes) - _RANDOM
    what = f"on {len(probes)} inputs, {real} of them real, the file image by image and the twin in one batch"
    if not twin.twin.rounds:
        share = float(gaps.max()) / max(float(expected.abs().max()), 1e-12)
        text = f"{what}: largest difference {share:.2g} of the largest output (allowed {_SAME:g})"
        if not share <= _SAME:
            raise InputError(f"its torch twin is another function {text}")
        if not twin.twin.softmax:
            return float(gaps.max()), text
        clear = expected > _CLEAR
        gap = float((logits.log_softmax(1)[clear] - expected[clear].log()).abs().max())
        return max(gap, _TIED), text
    spread = max(float(expected.max() - expected.min()), 1e-12)
    mean, same = float(gaps.mean()), float((found.argmax(1) == expected.argmax(1))[:real].float().mean())
    text = (
        f"{what}; it rounds on the way: mean difference {mean / spread:.2g} of the outputs' spread (allowed "
        f"{_ROUNDED:g}), the same class for {same:.0%} of the real ones (at least {_TOP1:.0%})"
    )
    if not (mean <= _ROUNDED * spread and same >= _TOP1):
        raise InputError(f"its torch twin is another function {text}")
    return float(gaps.max()), text


def _names(entries: Sequence[Any]) -> str:
    return ", ".join(f'"{entry.name}" {entry.type} {_times(entry.shape)}' for entry in entries)


def _times(sizes: Sequence[Any]) -> str:
    return "[" + ", ".join(str(size) for size in sizes) + "]"


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
