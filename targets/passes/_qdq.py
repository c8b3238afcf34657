"""Static int8 with explicit Quantize/Dequantize nodes: what both recipes share.

    q(x) = clip(round(x / s) + z, lo, hi),   x' = s (q - z)

Activations get one scale per tensor, from the range seen on the calibration images (min-max: an attacked image lies at
the edge of what is seen, and a range that clips its tail would hide it); weights one scale per output channel.

Scores of attention stay in float32 from the product that makes them through the softmax, whose result has codes for the
product that reads it. onnxruntime runs a softmax of codes by tables of which nothing is proved
(`stages.engine_kernels`), and one scale for scores and their mask, -inf or -1e9, would leave nothing of the scores.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.quant_utils import add_pre_process_metadata

from targets.passes._graph import clean, consumers, normalised, prune, weighted
from targets.passes.base import Array, Kit, LoweringError

_BATCH = 32
KEEP = ("first", "last")
_PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul", "Einsum")


class _Reader(CalibrationDataReader):  # type: ignore[misc]
    """Calibration images in batches, in the order given."""

    def __init__(self, name: str, kit: Kit) -> None:
        self._name, self._kit, self._done = name, kit, 0

    def get_next(self) -> dict[str, Array] | None:
        total = len(self._kit.calibration)
        if self._kit.on_step is not None:
            self._kit.on_step(min(self._done, total), total)
        if self._done >= total:
            return None
        start, self._done = self._done, self._done + _BATCH
        return {self._name: self._kit.calibration[start : self._done]}


def quantise(
    model: onnx.ModelProto,
    kit: Kit,
    activations: QuantType,
    operators: Sequence[str],
    keep: Sequence[str],
    extra: Mapping[str, Any],
    reduce_range: bool = False,
) -> onnx.ModelProto:
    """The graph with Q/DQ nodes around `operators`; `keep` names nodes that stay in float32.

    "first" and "last" in `keep` stand for the first and the last node with weights. The range of the normalised image
    is taken from the pixel range [0, 1] itself, not from the calibration images, so no pixel is ever clipped.
    Raises `LoweringError` where nothing is left to quantise or a kept node is not there.
    """
    kept = _kept(model, keep)
    if not [node for node in weighted(model) if node.name not in kept]:
        raise LoweringError("int8: no Conv, Gemm or MatMul with stored weights is left to quantise")
    source, target = kit.work / "before_int8.onnx", kit.work / "after_int8.onnx"
    marked = onnx.ModelProto()
    marked.CopyFrom(model)
    add_pre_process_metadata(marked)
    onnx.save(marked, source)
    low, high = _pixel_range(model)
    scores = _scores(model)
    # Scores beside a mask of -inf have no scale; the quantiser computes one for them all the same, and does not use it.
    with _quiet(), np.errstate(invalid="ignore"):
        quantize_static(
            source,
            target,
            _Reader(model.graph.input[0].name, kit),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=list(operators),
            per_channel=True,
            reduce_range=reduce_range,
            activation_type=activations,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=sorted(kept | scores),
            calibrate_method=CalibrationMethod.MinMax,
            extra_options={
                **extra,
                "TensorQuantOverrides": {normalised(model): [{"rmin": np.float32(low), "rmax": np.float32(high)}]},
            },
        )
    made = onnx.load(target)
    _read_values(made, scores)
    return clean(made, "int8")


def _scores(model: onnx.ModelProto) -> set[str]:
    """The nodes that a softmax alone sees, and itself: what scales and masks scores, but not the products behind."""
    found: set[str] = set()
    for node in reversed(model.graph.node):
        readers = [reader.name for name in node.output for reader in consumers(model, name)]
        inside = bool(readers) and node.op_type not in _PRODUCTS and found.issuperset(readers)
        if node.op_type == "Softmax" or (inside and model.graph.output[0].name not in node.output):
            found.add(node.name)
    return found


def _read_values(model: onnx.ModelProto, names: set[str]) -> None:
    """Let nodes read the values themselves where they read the result of a Q/DQ pair, in place."""
    makers = {name: node for node in model.graph.node for name in node.output}
    for node in model.graph.node:
        for i, name in enumerate(node.input if node.name in names else ()):
            values = makers.get(name)
            codes = makers.get(values.input[0]) if values is not None and values.op_type == "DequantizeLinear" else None
            if codes is not None and codes.op_type == "QuantizeLinear":
                node.input[i] = codes.input[0]
    prune(model)


def _kept(model: onnx.ModelProto, keep: Sequence[str]) -> set[str]:
    nodes, found = weighted(model), {node.name for node in model.graph.node}
    kept = set()
    for name in keep:
        if name in KEEP:
            if nodes:
                kept.add(nodes[0 if name == "first" else -1].name)
        elif name in found:
            kept.add(name)
        else:
            raise LoweringError(f'int8: keep: the graph has no node "{name}"; give node names, "first" or "last"')
    return kept


def _pixel_range(model: onnx.ModelProto) -> tuple[float, float]:
    """Smallest and largest value of the normalised image over all images in [0, 1]: affine, so at black or white."""
    name = normalised(model)
    if name == model.graph.input[0].name:
        return 0.0, 1.0
    tapped = onnx.ModelProto()
    tapped.CopyFrom(model)
    tapped.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    session = onnxruntime.InferenceSession(tapped.SerializeToString(), providers=["CPUExecutionProvider"])
    shape = [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim][1:]
    ends = np.stack([np.zeros(shape, np.float32), np.ones(shape, np.float32)])
    seen = session.run([name], {model.graph.input[0].name: ends})[0]
    return float(seen.min()), float(seen.max())


@contextmanager
def _quiet() -> Iterator[None]:
    """The quantiser writes advice to the root logger; what matters of it is an exception anyway."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
