"""The torch twin of an ONNX classifier, so that the very graph that ships can be attacked by gradient.

Float graphs agree with onnxruntime to rounding. Quantised graphs are computed exactly as their Q/DQ nodes say, with
straight-through gradients; onnxruntime fuses them to integer kernels, whose requantisation may land on the other side
of a rounding tie, so single codes can differ by one. Graphs in half precision are computed in single precision on the
half-precision weights, rounding where the graph casts; gradients never are in half precision. Depthwise convolutions
that only a 1x1 convolution reads are computed with it as one dense convolution, where that is quicker to differentiate.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from stages.method import InputError
from stages.nn import _onnx_graph as read
from stages.nn._onnx_batch import freed
from stages.nn._onnx_ops import OPERATORS
from stages.nn._onnx_separable import merge
from stages.nn._onnx_tidy import fold_constants
from stages.seeding import generator

LOGITS = read.LOGITS
_SAME = 1e-4
_JUMPS = {"Ceil", "Equal", "Floor", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Mod", "Round", "Sign"}


@dataclass(frozen=True, slots=True)
class _Step:
    operator: str
    attributes: Mapping[str, Any]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    spent: tuple[str, ...]


class Twin(nn.Module):
    """Images [B, ...] -> the graph's output [B, ...], node by node. Constants are buffers, so nothing here trains.

    `rounds` says that it rounds on the way (Q/DQ nodes, half precision), so that a sum in another order may give
    another code; `softmax` that the file ends in one, which is left out here; `piece` that the graph works on exactly
    so many images at once, in which case longer batches go through it one piece after the other.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        super().__init__()
        graph = model.graph
        constants = {tensor.name for tensor in graph.initializer}
        self._input = next(value.name for value in graph.input if value.name not in constants)
        self._output = graph.output[0].name
        self._buffers_of: dict[str, str] = {}
        self._indices: dict[str, Tensor] = {}
        for number, tensor in enumerate(graph.initializer):
            value = read.constant(tensor)
            if value.dtype == torch.int64:
                # Shapes and indices: read on the CPU, whatever the device.
                self._indices[tensor.name] = value
            else:
                self._buffers_of[tensor.name] = f"constant{number}"
                self.register_buffer(f"constant{number}", value)
        self._steps = _steps(graph, read.opset(model))
        self._now: _Step | None = None
        self.rounds, self.softmax = read.rounds(model), False
        self.piece: int | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.piece is None:
            return self._through(x)
        short = -len(x) % self.piece
        whole = x if short == 0 else torch.cat([x, x[-1:].expand(short, *x.shape[1:])])
        return torch.cat([_batched(self._through(part), self.piece) for part in torch.split(whole, self.piece)])[
            : len(x)
        ]

    def at_work(self) -> str:
        """The node that is being computed, for messages about an operation in it."""
        return "" if self._now is None else f"node {self._now.operator} giving {self._now.outputs[0]}"

    def jumps(self) -> tuple[str, ...]:
        """Steps on the way from the image that are flat between jumps, as operator and result; Q/DQ pairs are not."""
        moving, found = {self._input}, []
        for step in self._steps:
            if moving.isdisjoint(step.inputs) or step.operator in ("Shape", "Size"):
                continue
            moving.update(step.outputs)
            if step.operator in _JUMPS:
                found.append(f'{step.operator} giving "{step.outputs[0]}"')
        return tuple(found)

    def _through(self, x: Tensor) -> Tensor:
        known = self._start(x)
        for step in self._steps:
            self._now = step
            _take(step, known)
        self._now = None
        y = known[self._output]
        # Asked for only where it changes something: a trace would hold it as an operation.
        return y if y.dtype == torch.float32 else y.to(torch.float32)

    def _start(self, x: Tensor) -> dict[str, Tensor]:
        known: dict[str, Tensor] = {self._input: x, **self._indices}
        return known | {name: self.get_buffer(buffer) for name, buffer in self._buffers_of.items()}

    @torch.no_grad()
    def free(self, shape: Sequence[int]) -> None:
        """Take any number of images where the graph was made for shape[0]: targets of Reshape are rewritten.

        `shape` is that of the input. What came of it is compared with the graph as it is, half by half; where the
        outputs are not the same, `piece` is set instead.
        """
        batch = shape[0]
        x = torch.rand(2 * batch, *shape[1:], generator=generator(0, "free batch"))
        halves = [_batched(self._through(half), batch) for half in torch.split(x, batch)]
        kept = self._steps, dict(self._indices)
        for rewrite in (False, True):  # a graph may be free already, and a target not to be told from shapes
            try:
                if rewrite:
                    self._steps = tuple(self._freed(x, batch))
                if _same(torch.cat(halves), self._through(x)):
                    return
            except (RuntimeError, IndexError):
                pass  # an operator found a shape that does not fit: then the graph knows its batch elsewhere too
        self._steps, self._indices = kept
        self.piece = batch

    @torch.no_grad()
    def settle(self, shape: Sequence[int]) -> None:
        """Make constants of the shapes that the graph computes for inputs [B, *shape], so that a trace can follow it.

        Where the outputs would not stay the same, everything is left as it was.
        """
        if not any(self._computed(step) for step in self._steps):
            return
        x = torch.rand(3, *shape, generator=generator(0, "settle"))
        kept = self._steps, dict(self._indices)
        try:
            before = self._through(x)
            self._steps = _needed(tuple(self._settled(x)), self._output, {*self._indices, *self._buffers_of})
            if self.piece is None and _same(before, self._through(x)):
                return
        except (RuntimeError, IndexError, KeyError):
            pass  # an operator found a shape that does not fit
        self._steps, self._indices = kept

    def _computed(self, step: _Step) -> bool:
        """Is it a change to a shape that the graph computes?"""
        return step.operator in ("Reshape", "Expand") and step.inputs[1] not in self._indices

    def _settled(self, x: Tensor) -> Iterator[_Step]:
        """The steps, every Reshape and Expand to a computed shape with that of one image as its target."""
        one, many = self._start(x[:1]), self._start(x)
        for number, step in enumerate(self._steps):
            found = step
            if self._computed(step):
                few, more = one[step.inputs[0]].shape, many[step.inputs[0]].shape
                target = one[step.inputs[1]].tolist()
                _take(step, one)
                sizes = (
                    freed(target, few, more, one[step.outputs[0]].shape, 1) if step.operator == "Reshape" else target
                )
                if sizes is not None:
                    name = f"settled{number}"
                    self._indices[name] = many[name] = one[name] = torch.tensor(sizes)
                    found = replace(step, inputs=(step.inputs[0], name), attributes={})
            else:
                _take(step, one)
            _take(found, many)
            yield found

    def _freed(self, x: Tensor, batch: int) -> Iterator[_Step]:
        """The steps, every Reshape with a target that keeps the images apart; walked with few and with many images."""
        small, large = self._start(x[:batch]), self._start(x)
        for number, step in enumerate(self._steps):
            found, target = step, self._indices.get(step.inputs[1]) if step.operator == "Reshape" else None
            if target is None:
                _take(step, small)
            else:
                few, many = small[step.inputs[0]].shape, large[step.inputs[0]].shape
                _take(step, small)
                sizes = freed(target.tolist(), few, many, small[step.outputs[0]].shape, batch)
                if sizes is not None and sizes != target.tolist():
                    name = f"target{number}"
                    self._indices[name] = large[name] = small[name] = torch.tensor(sizes)
                    found = replace(step, inputs=(step.inputs[0], name), attributes={})
            _take(found, large)
            yield found


def imported(
    source: Path | bytes,
    shape: Sequence[int] | None = None,
    output: str | None = None,
    before_softmax: bool = False,
    free: bool = True,
) -> Twin:
    """The twin of an ONNX file, or of its bytes, in eval mode.

    `shape` is that of one input without the batch, for files that leave it open. Of several outputs it takes the one of
    that name, else the one called "logits". With `before_softmax` a softmax at the end is left out. Without `free` the
    graph stays as it is, for an input of just its shape. Raises `InputError` for what is not ONNX, has other than one
    image in and one array of logits out, or holds an operator without a twin (naming it, its node, and what to do).
    """
    where = str(source) if isinstance(source, Path) else "the ONNX graph"
    model = read.loaded(source, where, output)
    softmax = before_softmax and read.without_softmax(model)
    read.readable(model, where)
    fold_constants(model)
    read.unobjectionable(model, where)
    merge(model)
    twin = Twin(model).eval()
    twin.softmax = softmax
    known = read.declared(model.graph, shape)
    if known is not None and free:
        try:
            twin.free(known)
        except (RuntimeError, ValueError, IndexError, KeyError, TypeError) as error:
            raise InputError(f"{where}: its torch twin does not run on {known}: {error}") from error
    return twin


def _steps(graph: onnx.GraphProto, opset: int) -> tuple[_Step, ...]:
    last = {name: position for position, node in enumerate(graph.node) for name in (*node.input, *node.output)}
    keep = {graph.output[0].name, *(tensor.name for tensor in graph.initializer)}
    return tuple(
        _Step(
            operator=node.op_type,
            attributes=read.attributes(node, opset),
            inputs=tuple(node.input),
            outputs=tuple(node.output),
            spent=tuple(_last_uses(node, position, last, keep)),
        )
        for position, node in enumerate(graph.node)
    )


def _needed(steps: Sequence[_Step], output: str, constants: set[str]) -> tuple[_Step, ...]:
    """The steps that lead to the output, each with what nobody reads after it."""
    wanted, kept = {output}, list[_Step]()
    for step in reversed(steps):
        if wanted.intersection(step.outputs):
            wanted.update(step.inputs)
            kept.append(step)
    kept.reverse()
    last = {name: position for position, step in enumerate(kept) for name in (*step.inputs, *step.outputs)}
    keep = {output, "", *constants}
    return tuple(
        replace(step, spent=tuple(sorted({name for name in step.inputs if last[name] == position} - keep)))
        for position, step in enumerate(kept)
    )


def _take(step: _Step, known: dict[str, Tensor]) -> None:
    """One node: its results join what is known, and what nobody reads any more leaves."""
    results = OPERATORS[step.operator](step.attributes, *(known[name] if name else None for name in step.inputs))
    known.update(zip(step.outputs, (results,) if isinstance(results, Tensor) else results, strict=False))
    for name in step.spent:
        del known[name]


def _batched(y: Tensor, batch: int) -> Tensor:
    """A graph made for one image may answer without a batch."""
    return y if y.dim() > 1 and y.shape[0] == batch else y.reshape(batch, -1)


def _same(one: Tensor, other: Tensor) -> bool:
    scale = float(one.abs().max()) if one.isfinite().all() else 1.0
    return one.shape == other.shape and torch.allclose(one, other, rtol=0, atol=_SAME * scale, equal_nan=True)


def _last_uses(node: onnx.NodeProto, position: int, last: Mapping[str, int], keep: set[str]) -> Sequence[str]:
    """What nobody reads after this node, so that its memory can go."""
    return sorted({name for name in node.input if name and last[name] == position} - keep)
