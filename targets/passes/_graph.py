"""Small questions about ONNX graphs, and one canonical way to write them."""

import onnx

from targets.passes.base import LoweringError

STANDARD = ("", "ai.onnx")


def clean(model: onnx.ModelProto, producer: str) -> onnx.ModelProto:
    """Drop notes, stored shapes and unused opsets, and name every node, so that equal graphs have equal bytes.

    Raises `LoweringError` where a node is not standard ONNX: a parser other than onnxruntime's would refuse it.
    """
    foreign = sorted({f"{n.domain}::{n.op_type}" for n in model.graph.node if n.domain not in STANDARD})
    if foreign:
        raise LoweringError(f"{producer}: the graph holds nodes outside standard ONNX: {', '.join(foreign)}")
    opsets = [entry for entry in model.opset_import if entry.domain in STANDARD]
    made = onnx.ModelProto()
    made.CopyFrom(model)
    del made.opset_import[:], made.metadata_props[:], made.graph.value_info[:], made.functions[:]
    made.opset_import.extend(opsets)
    made.producer_name, made.producer_version = "temper", ""
    made.doc_string = made.graph.doc_string = ""
    taken = {node.name for node in made.graph.node}
    for i, node in enumerate(made.graph.node):
        node.doc_string = ""
        del node.metadata_props[:]
        if not node.name:
            name = f"{node.op_type}_{i}"
            while name in taken:
                name += "_"
            node.name = name
            taken.add(name)
    _sort(made)
    onnx.checker.check_model(made)
    return made


def _sort(model: onnx.ModelProto) -> None:
    """Nodes after what they read, in place, otherwise in the order they had."""
    known = {i.name for i in model.graph.input} | set(constants(model)) | {""}
    waiting, sorted_nodes = list(model.graph.node), []
    while waiting:
        ready = next((node for node in waiting if known.issuperset(node.input)), None)
        if ready is None:
            raise LoweringError(f'the graph has a cycle, or node "{waiting[0].name}" reads what nobody makes')
        waiting.remove(ready)
        sorted_nodes.append(ready)
        known.update(ready.output)
    del model.graph.node[:]
    model.graph.node.extend(sorted_nodes)


def constants(model: onnx.ModelProto) -> dict[str, onnx.TensorProto]:
    """Initialisers by name."""
    return {tensor.name: tensor for tensor in model.graph.initializer}


def consumers(model: onnx.ModelProto, name: str) -> list[onnx.NodeProto]:
    return [node for node in model.graph.node if name in node.input]


def normalised(model: onnx.ModelProto) -> str:
    """The tensor that holds the normalised image: what comes out of the affine nodes right behind the input.

    Follows single consumers through Sub, Div, Add and Mul with a constant; the input itself where there is none.
    """
    fixed, name = constants(model), str(model.graph.input[0].name)
    while True:
        readers = consumers(model, name)
        if len(readers) != 1 or readers[0].op_type not in ("Sub", "Div", "Add", "Mul"):
            return name
        if any(other != name and other not in fixed for other in readers[0].input):
            return name
        name = str(readers[0].output[0])


def weighted(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """The nodes that multiply by stored weights, in the graph's order: Conv, Gemm and MatMul with a constant."""
    fixed = set(constants(model))
    found = [node for node in model.graph.node if node.op_type in ("Conv", "Gemm", "MatMul")]
    return [node for node in found if any(name in fixed for name in node.input)]


def prune(model: onnx.ModelProto) -> None:
    """Drop nodes and initialisers that no output needs, in place."""
    while True:
        needed = {name for node in model.graph.node for name in node.input} | {o.name for o in model.graph.output}
        idle = [node for node in model.graph.node if not any(name in needed for name in node.output)]
        for node in idle:
            model.graph.node.remove(node)
        if not idle:
            break
    for tensor in [t for t in model.graph.initializer if t.name not in needed]:
        model.graph.initializer.remove(tensor)
