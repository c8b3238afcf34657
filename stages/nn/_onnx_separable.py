"""Depthwise convolutions and the 1x1 convolutions that directly follow them, as the dense convolutions they equal.

For the torch twin of a graph, whose backward passes are what costs time; the file itself stays as it is. With nothing
between the two, no Q/DQ pair in particular,

    Q[:, c] = sum over atoms k of channel c: p_k D_k^T,    b = b_P + P b_D.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, numpy_helper

from stages.nn._separable import dense_is_quicker


@dataclass(frozen=True, slots=True)
class _Branch:
    """One depthwise convolution and what the 1x1 convolution after it makes of it.

    The image that it reads, of `width` channels; of every atom the input channel [G], kernel [G, K, K], shift [G] and
    column [G, M].
    """

    image: str
    width: int
    channels: NDArray[np.int64]
    kernels: NDArray[np.float64]
    shifts: NDArray[np.float64]
    node: NodeProto
    columns: NDArray[np.float64]

    def alike(self, other: "_Branch") -> bool:
        mine, theirs = ((b.image, b.width, b.kernels.shape[1:], _geometry(b.node)) for b in (self, other))
        return mine == theirs


def merge(model: ModelProto) -> None:
    """Replace, in place, every such pair for which `dense_is_quicker`; constants are initialisers already.

    As GDWS layers are exported, the 1x1 convolution may read several depthwise ones through a concatenation, pairs may
    be added up, and depthwise convolutions may read repeated channels through a gather. Weights are multiplied in
    float64 and rounded to float32 once.
    """
    graph = model.graph
    if all(node.op_type != "Conv" or _attribute(node, "group", 1) == 1 for node in graph.node):
        return  # inferring the shapes of a large graph takes seconds
    seen = _Graph(
        values={tensor.name: tensor for tensor in graph.initializer},
        made={name: node for node in graph.node for name in node.output},
        uses=Counter([name for node in graph.node for name in node.input] + [out.name for out in graph.output]),
        widths=_widths(model),
    )
    # From the end, so that a sum is seen before its terms.
    for node in reversed(graph.node):
        found = seen.pairs(node)
        if found is not None and _worth(found[0]):
            _densify(graph, node, *found)
    _sweep(graph)


@dataclass(frozen=True, slots=True)
class _Graph:
    values: Mapping[str, onnx.TensorProto]
    made: Mapping[str, NodeProto]
    uses: Mapping[str, int]
    widths: Mapping[str, int]

    def pairs(self, node: NodeProto) -> tuple[list[_Branch], NDArray[np.float64]] | None:
        """The pairs whose sum a node computes, and the bias [M]; None where it computes something else."""
        if node.op_type == "Add":
            terms = [self.pairs(self.made[name]) if self._private(name) else None for name in node.input]
            sums = [term for term in terms if term is not None]
            return ([b for term in sums for b in term[0]], sums[0][1] + sums[1][1]) if len(sums) == 2 else None
        weight = self._weight(node)
        if weight is None or set(weight.shape[2:]) != {1} or not _plain(node) or not self._private(node.input[0]):
            return None
        before = self.made[node.input[0]]
        joined = before.op_type == "Concat" and _attribute(before, "axis", 0) == 1
        branches: list[_Branch] = []
        columns = weight.reshape(len(weight), -1).T
        for name in before.input if joined else [node.input[0]]:
            branch = self._branch(name, columns)
            if branch is None:
                return None
            columns = columns[len(branch.channels) :]
            branches.append(branch)
        return branches, self._bias(node, len(weight))

    def _private(self, name: str) -> bool:
        """Computed for one reader alone."""
        return name in self.made and self.uses[name] == 1

    def _branch(self, name: str, columns: NDArray[np.float64]) -> _Branch | None:
        node = self.made.get(name)
        weight = self._weight(node) if node is not None and self._private(name) else None
        if node is None or weight is None or weight.shape[1] != 1 or _attribute(node, "group", 1) != len(weight):
            return None
        image, width = node.input[0], len(weight)
        channels = np.arange(width)
        gather = self.made.get(image)
        if gather is not None and gather.op_type == "Gather" and _attribute(gather, "axis", 0) == 1:
            indices = self.values.get(gather.input[1])
            if indices is not None and len(indices.dims) == 1 and gather.input[0] in self.widths:
                image, width = gather.input[0], self.widths[gather.input[0]]
                channels = numpy_helper.to_array(indices).astype(np.int64) % width
        shifts = self._bias(node, len(weight))
        return _Branch(image, width, channels, weight[:, 0], shifts, node, columns[: len(weight)])

    def _weight(self, node: NodeProto) -> NDArray[np.float64] | None:
        """The kernel of a convolution with constant weights; None for anything else."""
        constant = node.op_type == "Conv" and all(name in self.values for name in node.input[1:] if name)
        return _array(self.values[node.input[1]]) if constant else None

    def _bias(self, node: NodeProto, size: int) -> NDArray[np.float64]:
        return _array(self.values[node.input[2]]) if len(node.input) > 2 and node.input[2] else np.zeros(size)


def _worth(branches: Sequence[_Branch]) -> bool:
    first, kernels = branches[0], sum(len(b.channels) for b in branches)
    area, outputs = int(np.prod(first.kernels.shape[1:])), first.columns.shape[1]
    return all(first.alike(b) for b in branches) and dense_is_quicker(first.width, outputs, kernels, area)


def _densify(graph: onnx.GraphProto, node: NodeProto, branches: Sequence[_Branch], bias: NDArray[np.float64]) -> None:
    first = branches[0]
    weight = np.zeros((first.width, len(bias), *first.kernels.shape[1:]))
    for branch in branches:
        np.add.at(weight, branch.channels, np.einsum("gm,g...->gm...", branch.columns, branch.kernels))
        bias = bias + branch.shifts @ branch.columns
    names = [f"{node.output[0]}.dense.{part}" for part in ("weight", "bias")]
    for name, array in zip(names, (weight.swapaxes(0, 1), bias), strict=True):
        graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(array, np.float32), name))
    attributes = [a for a in first.node.attribute if a.name != "group"]
    node.CopyFrom(onnx.helper.make_node("Conv", [first.image, *names], list(node.output), name=node.name))
    node.attribute.extend(attributes)


def _sweep(graph: onnx.GraphProto) -> None:
    """Drop what nobody reads any more."""
    outputs = {output.name for output in graph.output}
    kept: list[NodeProto] = []
    read = set(outputs)
    for node in reversed(graph.node):
        if read.intersection(node.output):
            kept.append(node)
            read.update(node.input)
    tensors = [tensor for tensor in graph.initializer if tensor.name in read]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(reversed(kept))
    graph.initializer.extend(tensors)


def _plain(node: NodeProto) -> bool:
    """One group, steps of one, no padding: a matrix at every pixel."""
    ones = {*_attribute(node, "strides", ()), *_attribute(node, "dilations", ()), _attribute(node, "group", 1)}
    return ones == {1} and not any(_attribute(node, "pads", ()))


def _geometry(node: NodeProto) -> list[tuple[str, Any]]:
    kept = [a for a in node.attribute if a.name in ("strides", "pads", "dilations", "auto_pad")]
    return sorted((a.name, str(onnx.helper.get_attribute_value(a))) for a in kept)


def _widths(model: ModelProto) -> dict[str, int]:
    """Channels of every tensor for which the standard's shape inference knows them."""
    inferred = onnx.shape_inference.infer_shapes(model).graph
    shapes = {v.name: v.type.tensor_type.shape.dim for v in (*inferred.value_info, *inferred.input)}
    return {name: dims[1].dim_value for name, dims in shapes.items() if len(dims) > 1 and dims[1].dim_value > 0}


def _attribute(node: NodeProto, name: str, default: Any) -> Any:
    return next((onnx.helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)


def _array(tensor: onnx.TensorProto) -> NDArray[np.float64]:
    values: NDArray[np.float64] = numpy_helper.to_array(tensor).astype(np.float64)
    return values
