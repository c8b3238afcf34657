"""An exported graph with nothing in it but the network: constants computed, stray text removed, bytes repeatable."""

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, numpy_helper
from onnx.reference import ReferenceEvaluator

_PRODUCER = "temper"
_RANDOM = {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Bernoulli", "Multinomial"}


def tidy(model: ModelProto) -> bytes:
    """Constants folded, documentation, metadata and producer stripped, checked; serialised deterministically."""
    fold_constants(model)
    strip(model)
    onnx.checker.check_model(model, full_check=True)
    data: bytes = model.SerializeToString(deterministic=True)
    return data


def fold_constants(model: ModelProto) -> None:
    """Replace every node that depends on initialisers alone by its value, and drop initialisers nobody reads.

    The exporters stop folding where tensors are large; a compressed layer that arranges its weights in the forward pass
    would ship that work to the device.
    """
    graph = model.graph
    values = {tensor.name: tensor for tensor in graph.initializer}
    outputs = {output.name for output in graph.output}
    kept = []
    for node in graph.node:
        known = all(name in values for name in node.input if name)
        found = None
        if known and not outputs.intersection(node.output) and not _has_subgraph(node) and node.op_type not in _RANDOM:
            found = _evaluate(model, node, {name: values[name] for name in node.input if name})
        if found is None:
            kept.append(node)
        else:
            values |= found
    read = {name for node in kept for name in node.input} | outputs
    if len(kept) == len(graph.node) and read.issuperset(values):
        return  # copying large weights takes seconds
    del graph.node[:], graph.initializer[:]
    graph.node.extend(kept)
    graph.initializer.extend(tensor for name, tensor in values.items() if name in read)


def strip(model: ModelProto) -> None:
    """Remove what names the machine, the exporter or the source lines (stack traces among them)."""
    graph = model.graph
    model.producer_name, model.producer_version, model.domain, model.model_version = _PRODUCER, "", "", 0
    model.doc_string = graph.doc_string = ""
    graph.name = "network"
    # Shapes inside the graph are inferred again by whoever reads it; the exporters' carry metadata of their own.
    del model.metadata_props[:], graph.metadata_props[:], graph.value_info[:]
    for part in (*graph.node, *graph.initializer, *graph.input, *graph.output):
        part.doc_string = ""
        del part.metadata_props[:]


def _evaluate(
    model: ModelProto, node: NodeProto, known: dict[str, onnx.TensorProto]
) -> dict[str, onnx.TensorProto] | None:
    """The node's values, or None where the evaluator cannot tell them: of Q/DQ it knows the newest opsets alone.

    A node that is kept is computed by whoever runs the graph, who has better words for one that is wrong.
    """
    graph = onnx.helper.make_graph(
        [node], "constant", [], [onnx.ValueInfoProto(name=name) for name in node.output if name], list(known.values())
    )
    alone = onnx.helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
    try:
        results = ReferenceEvaluator(alone).run(None, {})
    except Exception:  # numpy's own, of many classes
        return None
    names = [name for name in node.output if name]
    return {
        name: numpy_helper.from_array(np.asarray(value, order="C"), name)
        for name, value in zip(names, results, strict=True)
    }


def _has_subgraph(node: NodeProto) -> bool:
    return any(attribute.type == onnx.AttributeProto.GRAPH for attribute in node.attribute)
