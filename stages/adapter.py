"""Between images in pixels and a file that wants them otherwise: normalised, stretched, channels last or flat."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from stages.method import InputError
from stages.nn.imported import Twin

Layout = Literal["nchw", "nhwc"]
FLOATS = {"tensor(float)": np.float32, "tensor(double)": np.float64, "tensor(float16)": np.float16}


@dataclass(frozen=True, slots=True)
class Form:
    """How the file wants its images: z = (x - mean) / std per channel, or x stretched to `pixels`, in a layout."""

    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    pixels: tuple[float, float] | None = None
    layout: Layout | None = None


class Adapter(nn.Module):
    """Images [B, C, H, W] in [0, 1] -> what the file takes, [B, ...]; differentiable."""

    mean: Tensor
    std: Tensor

    def __init__(self, form: Form, layout: Layout, image: Sequence[int], wanted: Sequence[int]) -> None:
        super().__init__()
        low, high = form.pixels or (0.0, 1.0)
        mean, std = form.mean or (0.0,), form.std or (1.0,)
        for name, values in (("--mean", mean), ("--std", std)):
            if len(values) not in (1, image[0]):
                raise InputError(f"{name}: expected 1 or {image[0]} numbers, one per channel, got {len(values)}")
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1))
        self.low, self.span = low, high - low
        self.normal = form.mean is not None or form.std is not None
        self.last = layout == "nhwc"
        turned = (*image[1:], image[0]) if self.last else tuple(image)
        self.shape = None if turned == tuple(wanted) else tuple(wanted)

    def forward(self, x: Tensor) -> Tensor:
        if self.normal:
            x = (x - self.mean) / self.std
        if self.span != 1.0:
            x = x * self.span
        if self.low:
            x = x + self.low
        x = x.permute(0, 2, 3, 1) if self.last else x
        return x if self.shape is None else x.reshape(-1, *self.shape)


class FileLogits(nn.Module):
    """What the file answers, [B, K] float32, without gradients; in pieces of the batch that it was made for."""

    def __init__(self, adapter: Adapter, session: Any, output: str, piece: int, exact: bool) -> None:
        super().__init__()
        self.adapter, self.session, self.output = adapter, session, output
        self.piece, self.exact = piece, exact
        entry = session.get_inputs()[0]
        self.input, self.dtype = entry.name, FLOATS[entry.type]

    def forward(self, x: Tensor) -> Tensor:
        ready = self._ready(x)
        answers = [self._ask(ready[at : at + self.piece]) for at in range(0, len(ready), self.piece)]
        return torch.from_numpy(np.concatenate(answers).astype(np.float32, copy=False))

    def one_by_one(self, x: Tensor) -> Tensor:
        """The same, every image on its own, filled up with copies of itself where the file wants more."""
        return torch.cat([self(image)[:1] for image in torch.split(x, 1)])

    def shape_of(self, x: Tensor) -> tuple[int, ...]:
        """The shape of what the file answers to all of x at once."""
        return self._run(self._ready(x)).shape  # type: ignore[no-any-return]

    @torch.no_grad()
    def _ready(self, x: Tensor) -> Any:
        return self.adapter(x.detach()).numpy().astype(self.dtype, copy=False)

    def _run(self, ready: Any) -> Any:
        return np.asarray(self.session.run([self.output], {self.input: ready})[0])

    def _ask(self, part: Any) -> Any:
        short = self.piece - len(part) if self.exact else 0
        whole = np.concatenate([part, np.repeat(part[-1:], short, 0)]) if short else part
        return self._run(whole).reshape(len(whole), -1)[: len(part)]


class Behind(nn.Module):
    """The twin behind the adapter: images [B, C, H, W] in [0, 1] -> logits [B, K]."""

    def __init__(self, adapter: Adapter, twin: Twin) -> None:
        super().__init__()
        self.adapter, self.twin = adapter, twin

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.twin(self.adapter(x))
        return z if z.dim() == 2 else z.flatten(1)
