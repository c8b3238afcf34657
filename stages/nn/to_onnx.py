"""A network as an ONNX file: the last line of torch on the way to a device."""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

import onnx
import torch
from torch import nn

from stages.method import InputError
from stages.nn import _atomic
from stages.nn._onnx_tidy import tidy
from stages.nn.fold import fold

INPUT, OUTPUT, BATCH = "input", "logits", "batch"
_LOGGERS = ("torch.onnx", "torch.export", "torch._dynamo", "onnxscript", "onnx_ir")


def export(
    net: nn.Module,
    input_shape: tuple[int, int, int],
    path: Path,
    opset: int = 20,
    exporter: Literal["dynamo", "legacy"] = "dynamo",
) -> None:
    """Write `net` in eval mode as float32: "input" [batch, C, H, W] in pixels -> "logits" [batch, classes].

    The batch is symbolic, the weights lie inside the file, batch normalisations are folded where `stages/nn/fold.py`
    can. Equal networks give equal bytes, in any process and folder: names of source files, stack traces and versions
    are removed. "legacy" is torch's older exporter, kept for networks that the newer one cannot trace. The file appears
    whole or not at all. Raises `InputError` where the exporter gives up, with its reason.
    """
    twin = fold(net).cpu().float()
    twin.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]  # missing in torch's own stubs
    with torch.no_grad(), _quiet():
        # Two images, since exporters take a batch of one for a constant.
        example = torch.zeros(2, *input_shape)
        try:
            model = _dynamo(twin, example, opset) if exporter == "dynamo" else _legacy(twin, example, opset)
        except (torch.onnx.OnnxExporterError, RuntimeError) as error:
            other = "legacy" if exporter == "dynamo" else "dynamo"
            raise InputError(
                f'{type(net).__name__} cannot be exported to ONNX by the {exporter} exporter; try exporter="{other}"; '
                f"its reason: {error}"
            ) from error
    _atomic.write(path, tidy(model))


def _dynamo(net: nn.Module, example: torch.Tensor, opset: int) -> onnx.ModelProto:
    program = torch.onnx.export(
        net,
        (example,),
        dynamo=True,
        verbose=False,
        input_names=[INPUT],
        output_names=[OUTPUT],
        dynamic_shapes=({0: torch.export.Dim(BATCH, min=1)},),
        opset_version=opset,
        external_data=False,
    )
    assert program is not None  # it is None only where a file was asked for
    return program.model_proto


def _legacy(net: nn.Module, example: torch.Tensor, opset: int) -> onnx.ModelProto:
    return _traced(net, {INPUT: (example, BATCH)}, {OUTPUT: BATCH}, opset)


def traced(
    module: nn.Module,
    inputs: Mapping[str, tuple[torch.Tensor, str]],
    outputs: Mapping[str, str],
    opset: int = 20,
) -> bytes:
    """A module of several tensors as ONNX; `inputs` name an example and its symbolic first axis, `outputs` the axis.

    By torch's older exporter: the newer one takes most of a minute for a graph that repeats a step thirteen times.
    """
    with torch.no_grad(), _quiet():
        return tidy(_traced(module.eval(), inputs, outputs, opset))


def _traced(
    module: nn.Module, inputs: Mapping[str, tuple[torch.Tensor, str]], outputs: Mapping[str, str], opset: int
) -> onnx.ModelProto:
    buffer = io.BytesIO()
    torch.onnx.export(
        module,
        tuple(example for example, _ in inputs.values()),
        buffer,  # type: ignore[arg-type]  # torch takes a file object here, its annotation does not
        dynamo=False,
        input_names=list(inputs),
        output_names=list(outputs),
        dynamic_axes={
            **{name: {0: axis} for name, (_, axis) in inputs.items()},
            **{name: {0: axis} for name, axis in outputs.items()},
        },
        opset_version=opset,
    )
    return onnx.load_model_from_string(buffer.getvalue())


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No warnings, no log lines below errors: the exporters report their own internals. Exceptions pass."""
    levels = {name: logging.getLogger(name).level for name in _LOGGERS}
    try:
        for name in _LOGGERS:
            logging.getLogger(name).setLevel(logging.ERROR)
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
