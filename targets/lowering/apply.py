"""Lower a graph for a target: its passes in order, parity measured after each.

A target's page names, under `sections["export"]`,

    "precisions": {"int8": ["fold_constants", "qdq_int8_cpu"], "fp32": ["fold_constants"]}
    "attempts":   [{"precision": "int8"}, {"precision": "fp32"}]
    "runtime":    "onnxruntime" or "tensorrt", with "provider" where it is not the processor
    "machine":    `platform.machine()` of the device, where it is not this one

`attempts` choose a precision and nothing else; `precisions` maps it to passes. A pass is a name, or a table with
options: `{"pass": "qdq_int8_cpu", "keep": ["first", "last"]}`.

    kit = Kit(calibration, work)
    lowered = apply(model_bytes, passes_for(precisions, "int8"), kit)
    lowered.model, lowered.extras[".ort"], lowered.steps[-1].parity.top1
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from pipeline.core.errors import nearest
from targets.lowering.attach import attach
from targets.lowering.parity import Parity, between, logits_of
from targets.passes.base import Array, Kit, LoweringError, load

PassSpec = str | Mapping[str, Any]
Guard = Callable[[bytes], bytes]
"""A lowered network -> the graph of the detector that was fitted on it."""
# An exact pass may reorder floating-point sums; beyond this share of the largest logit it computes something else.
EXACT_SHARE = 1e-3
PROBES = 64
_ATTACH = "the detector"


@dataclass(frozen=True, slots=True)
class Step:
    """A pass that was applied, what it changed on the probe images, and how many nodes and bytes are left."""

    name: str
    parity: Parity
    nodes: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Lowered:
    """The lowered graph; files made beside it, by suffix; one step per pass; `parity` against the graph given.

    `network` is the same graph without the detector around it; where there is none, it is `model` itself.
    """

    model: bytes
    network: bytes
    extras: dict[str, bytes]
    steps: tuple[Step, ...]
    parity: Parity


def passes_for(precisions: Mapping[str, Sequence[PassSpec]], precision: str) -> Sequence[PassSpec]:
    """The passes of a precision. Raises `LoweringError` with the nearest name."""
    if precision not in precisions:
        raise LoweringError(f'this target offers no precision "{precision}"{nearest(precision, precisions)}')
    return precisions[precision]


def check_passes(passes: Sequence[PassSpec]) -> None:
    """Names and shapes of pass specs, without a graph: what a plan can know. Raises `LoweringError`."""
    for spec in passes:
        load(_parse(spec)[0])


def apply(
    model: bytes, passes: Sequence[PassSpec], kit: Kit, probe: Array | None = None, guard: Guard | None = None
) -> Lowered:
    """Run the passes in order. `probe` float32 [N, C, H, W] are the images parity is measured on (calibration's first).

    `guard` makes a detector's graph for the lowered network; it is attached (`attach.py`) before the first pass that is
    about the whole graph, at the end where none is. Raises `LoweringError` for an unknown pass or option, bytes that
    are no ONNX model, a graph that a pass refuses, a pass that says it is exact and is not, logits that are not finite,
    and a pass that would lower the network when the detector is around it already.
    """
    graph = _read(model)
    images = kit.calibration[:PROBES] if probe is None else probe
    first = before = logits_of(model, images)
    data = network = model
    steps = []
    todo: list[tuple[str, dict[str, Any]]] = [_parse(spec) for spec in passes]
    if guard is not None:
        todo = _with_guard(todo)
    for name, options in todo:
        if name == _ATTACH:
            assert guard is not None  # _with_guard put it there
            network, exact = data, True
            graph = attach(graph, onnx.load_from_string(guard(data)))
        else:
            module = load(name)
            graph, exact = module.lower(graph, options, kit), module.EXACT
        data = graph.SerializeToString(deterministic=True)
        after = logits_of(data, images)
        parity = between(before, after)
        _judge(name, parity, exact)
        steps.append(Step(name, parity, len(graph.graph.node), len(data)))
        before = after
    return Lowered(data, data if guard is None else network, dict(kit.extras), tuple(steps), between(first, before))


def _with_guard(todo: Sequence[tuple[str, dict[str, Any]]]) -> list[tuple[str, dict[str, Any]]]:
    whole = [load(name).WHOLE for name, _ in todo]
    first = whole.index(True) if True in whole else len(todo)
    if not all(whole[first:]):
        late = todo[first + whole[first:].index(False)][0]
        raise LoweringError(
            f'pass "{late}" comes after "{todo[first][0]}", but a detector lies between them; swap them'
        )
    return [*todo[:first], (_ATTACH, {}), *todo[first:]]


def prove(
    model: bytes,
    precisions: Mapping[str, Sequence[PassSpec]],
    kit: Kit,
    probe: Array | None = None,
    guard: Guard | None = None,
) -> dict[str, Lowered]:
    """Lower for every precision on offer, so that a refusal of any (NVIDIA's parser's, say) is found at once.

    Raises `LoweringError` naming the precision.
    """
    made = {}
    for precision, passes in precisions.items():
        fresh = Kit(kit.calibration, kit.work, None, kit.note)
        try:
            made[precision] = apply(model, passes, fresh, probe, guard)
        except LoweringError as error:
            raise LoweringError(f"precision {precision}: {error}") from error
    return made


def _parse(spec: PassSpec) -> tuple[str, dict[str, Any]]:
    if isinstance(spec, str):
        return spec, {}
    if not isinstance(spec, Mapping) or not isinstance(spec.get("pass"), str):
        raise LoweringError(f'expected the name of a pass or a table with "pass", got {spec!r}')
    return spec["pass"], {key: value for key, value in spec.items() if key != "pass"}


def _read(model: bytes) -> onnx.ModelProto:
    try:
        graph = onnx.load_from_string(model)
        onnx.checker.check_model(graph)
    except (DecodeError, onnx.checker.ValidationError) as error:
        raise LoweringError(f"not an ONNX model: {error}") from error
    inputs, outputs = [i.name for i in graph.graph.input], [o.name for o in graph.graph.output]
    if inputs != ["input"] or outputs != ["logits"]:
        raise LoweringError(f'expected one input "input" and one output "logits", got {inputs} and {outputs}')
    return graph


def _judge(name: str, parity: Parity, exact: bool) -> None:
    if not parity.gap < float("inf"):
        raise LoweringError(f'pass "{name}": the logits are no longer finite numbers')
    if exact and parity.gap > EXACT_SHARE * max(1.0, parity.scale):
        raise LoweringError(
            f'pass "{name}": changed a logit by {parity.gap:.3g}, and a pass that says it is exact may not'
        )
