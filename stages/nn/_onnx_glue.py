"""Graphs with several inputs and outputs as graphs with one of each: everything in a row, in the graph's own order."""

from collections.abc import Iterator
from math import prod

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

from stages.method import InputError

_AS_INPUT = 13  # from this opset on Split reads its sizes


def glued(model: onnx.ModelProto, opset: int) -> None:
    """In place: the inputs become parts of one [1, n], the outputs parts of one [1, K].

    Raises `InputError` for an input that is not float32 or leaves another size open than the first.
    """
    graph = model.graph
    constants = {tensor.name for tensor in graph.initializer}
    found = shapes(graph)
    before = list(_apart(graph, list(found), list(found.values()), opset))
    after = list(_together(graph, [value.name for value in graph.output]))
    nodes = [*before, *graph.node, *after]
    kept = [value for value in graph.input if value.name in constants]
    del graph.node[:], graph.input[:], graph.output[:]
    graph.node.extend(nodes)
    whole = helper.make_tensor_value_info("glued.in", TensorProto.FLOAT, [1, sum(map(prod, found.values()))])
    graph.input.extend([whole, *kept])
    graph.output.append(helper.make_tensor_value_info("glued.out", TensorProto.FLOAT, [1, None]))


def shapes(graph: onnx.GraphProto) -> dict[str, list[int]]:
    """The shape of every input, with a batch of one where that is open. Raises `InputError` as `glued` does."""
    constants = {tensor.name for tensor in graph.initializer}
    return {value.name: _shape(value) for value in graph.input if value.name not in constants}


def _apart(graph: onnx.GraphProto, names: list[str], sides: list[list[int]], opset: int) -> Iterator[NodeProto]:
    sizes = [prod(shape) for shape in sides]
    parts = [f"glued.in.{i}" for i in range(len(names))]
    if len(names) == 1:
        parts = ["glued.in"]
    elif opset >= _AS_INPUT:
        graph.initializer.append(numpy_helper.from_array(np.array(sizes), "glued.sizes"))
        yield helper.make_node("Split", ["glued.in", "glued.sizes"], parts, "glued.split", axis=1)
    else:
        yield helper.make_node("Split", ["glued.in"], parts, "glued.split", axis=1, split=sizes)
    for i, (name, part, shape) in enumerate(zip(names, parts, sides, strict=True)):
        graph.initializer.append(numpy_helper.from_array(np.array(shape), f"glued.shape.{i}"))
        yield helper.make_node("Reshape", [part, f"glued.shape.{i}"], [name], f"glued.reshape.{i}")


def _together(graph: onnx.GraphProto, names: list[str]) -> Iterator[NodeProto]:
    graph.initializer.append(numpy_helper.from_array(np.array([1, -1]), "glued.row"))
    for i, name in enumerate(names):
        yield helper.make_node("Reshape", [name, "glued.row"], [f"glued.out.{i}"], f"glued.flat.{i}")
    rows = [f"glued.out.{i}" for i in range(len(names))]
    yield helper.make_node("Concat", rows, ["glued.out"], "glued.join", axis=1)


def _shape(value: onnx.ValueInfoProto) -> list[int]:
    kind = value.type.tensor_type
    sizes = [dim.dim_value for dim in kind.shape.dim]
    sizes[:1] = [max(size, 1) for size in sizes[:1]]
    if kind.elem_type != TensorProto.FLOAT or min(sizes, default=1) < 1:
        found = TensorProto.DataType.Name(kind.elem_type).lower()
        raise InputError(f'input "{value.name}" is {found} {sizes}; expected float and fixed sizes beside other inputs')
    return sizes
