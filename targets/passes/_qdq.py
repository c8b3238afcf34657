"""Static int8 with explicit Quantize/Dequantize nodes: what both recipes share.

    q(x) = clip(round(x / s) + z, lo, hi),   x' = s (q - z)

Activations get one scale per tensor, from the range seen on the calibration images (min-max: an attacked image lies at
the edge of what is seen, and a range that clips its tail would hide it); weights one scale per output channel.
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

from targets.passes._graph import clean, normalised, weighted
from targets.passes.base import Array, Kit, LoweringError

_BATCH = 32
KEEP = ("first", "last")


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
    with _quiet():
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
            nodes_to_exclude=sorted(kept),
            calibrate_method=CalibrationMethod.MinMax,
            extra_options={
                **extra,
                "TensorQuantOverrides": {normalised(model): [{"rmin": np.float32(low), "rmax": np.float32(high)}]},
            },
        )
    return clean(onnx.load(target), "int8")


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
