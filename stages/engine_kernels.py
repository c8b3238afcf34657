"""Where onnxruntime computes something else than a file's nodes say, so that bounds on the nodes prove nothing of it.

Nothing documents these; 1.31 was seen
- to make one Q/DQ pair, with codes of its own, of two in a row;
- to round float biases to codes, and float weights to codes of one scale for all of them, in layers that read codes and
  whose result becomes codes;
- to run a softmax of codes by tables, with 1 / scale of its result rounded down to a whole number;
- to round what a product reads to codes, block by block, where its weights are codes and nothing else about it is;
- to form the variance in GroupNormalization as mean x^2 - (mean x)^2. That loses it where it is small beside the mean,
  and then gives anything, or NaN; the mean of (x - mean x)^2, which bounds cover, does not. Layer and instance
  normalisation take the differences, as nodes of their own or fused from others. So whatever normalises is asked:
  entries of 1000 +- 0.001, whose squares agree in all 24 bits of float32.

What it makes of codes is read off the graph that it runs (`engine_graph`). A float bias b goes to

    b' = s round(b / s),   s = s_image s_weights (of the channel),

all in float32 and half to even. That can be written into the file, and bounds then are about that file: as onnxruntime
makes the very same graph of both, operation by operation and bit by bit of every constant, nothing is assumed.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Any

import numpy as np
import onnx
import onnx.inliner
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper

from stages.engine_graph import alike, as_run, floats, mixed, without_idle
from targets.runtime.ort import OrtEngine

NORMS = {"LayerNormalization": {}, "InstanceNormalization": {}, "GroupNormalization": {"num_groups": 1}}
_ENTRIES, _EPS = 64, 1e-5
_WEIGHTED = frozenset({"Conv", "ConvTranspose", "Gemm"})
_NOTHING = frozenset({"Identity", "Dropout"})
_MOVES = _NOTHING | {"Flatten", "MaxPool", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze"}
# What onnxruntime may take away, or bring to the other side of codes, where it does nothing.
_LIGHT = _MOVES | {"Add", "Cast", "Clip", "Div", "Mul", "Pad", "Relu", "Sub"}
_OTHER = {
    "QLinearSoftmax": "onnxruntime's softmax of codes is not to its nodes (Softmax {}); keep the softmax in float32",
    "MatMulNBits": "onnxruntime makes codes of its own of what a product with weights of codes reads (MatMul or Gemm "
    "{}); put a Q/DQ pair right in front of it, or leave its weights in float32",
}
_CODES, _VALUES = "QuantizeLinear", "DequantizeLinear"


def spelled_out(model: onnx.ModelProto) -> tuple[onnx.ModelProto, str | None]:
    """The file with what onnxruntime makes of its biases written into it (the file itself where that is nothing), and
    what else it does that the nodes do not say, with a way out; None where bounds on those nodes hold for it."""
    if model.functions:
        whole = onnx.inliner.inline_local_functions(model)
        meant, told = spelled_out(whole)
        return model if meant is whole else meant, told
    graph = _Graph.of(model)
    told = next(_found(graph), None)
    if told is not None or not graph.kinds & {_CODES, _VALUES}:
        return model, told
    told = next(_twice(graph, _Graph.of(without_idle(model))), None)
    if told is not None:
        return model, told
    run = as_run(model)
    for node in run.graph.node:
        if node.op_type in _OTHER:
            return model, _OTHER[node.op_type].format(f'"{node.name}" giving "{node.output[0]}"')
    return _with_codes(model, graph, run)


@dataclass(frozen=True, slots=True)
class _Graph:
    """Nodes, what made each value, constants by name, and the values that change with the image or may stem from codes
    by what can be done to codes."""

    nodes: tuple[NodeProto, ...]
    makers: dict[str, NodeProto]
    fixed: dict[str, TensorProto]
    kinds: frozenset[str]
    moving: set[str]
    coded: set[str]

    @staticmethod
    def of(model: onnx.ModelProto) -> "_Graph":
        nodes = tuple(model.graph.node)
        fixed = {tensor.name: tensor for tensor in model.graph.initializer}
        fixed |= {node.output[0]: node.attribute[0].t for node in nodes if node.op_type == "Constant"}
        moving, coded = {value.name for value in model.graph.input} - fixed.keys(), set[str]()
        for node in nodes:
            if not moving.isdisjoint(node.input):
                moving.update(node.output)
            if node.op_type == _VALUES or (node.op_type in _LIGHT and not coded.isdisjoint(node.input)):
                coded.update(node.output)
        makers = {name: node for node in nodes for name in node.output}
        return _Graph(nodes, makers, fixed, frozenset(node.op_type for node in nodes), moving, coded)

    def maker(self, name: str, past: frozenset[str]) -> NodeProto | None:
        """The node that made a value, past those of some kinds."""
        node = self.makers.get(name)
        while node is not None and node.op_type in past:
            node = self.makers.get(node.input[0])
        return node

    def held(self, name: str) -> NDArray[Any] | None:
        """A constant, past nodes that do nothing."""
        while name not in self.fixed and name in self.makers and self.makers[name].op_type in _NOTHING:
            name = self.makers[name].input[0]
        return numpy_helper.to_array(self.fixed[name]) if name in self.fixed else None

    def step(self, node: NodeProto) -> tuple[object, ...]:
        """Scale and zero point of a node as bytes; None for what is no constant."""
        held = [self.held(name) for name in node.input[1:]]
        return tuple(None if one is None else (str(one.dtype), one.tobytes()) for one in held)

    def row(self, name: str) -> bool:
        """Whether a value may be a bias: a row of floats, the same for all images. A mask of attention has several."""
        held = self.held(name)
        if held is None:
            return name not in self.moving and name not in self.coded
        return held.dtype == np.float32 and prod(held.shape[:-1]) == 1


def _found(graph: _Graph) -> Iterator[str]:
    for node in graph.nodes:
        here = f'{node.op_type} giving "{node.output[0]}"'
        scale = graph.held(node.input[1]) if node.op_type in (_CODES, _VALUES) else None
        if scale is not None and not bool((np.isfinite(scale) & (scale > 0)).all()):
            yield f"the scale of a {here} is not finite and above 0; leave masks of -inf, and their sums, in float32"
    fused = {"LayerNormalization"} if {"ReduceMean", "Sqrt"} <= graph.kinds else set[str]()
    for kind in sorted((graph.kinds | fused) & NORMS.keys()):
        if loses_variance(kind):
            out = "update it" if kind == "LayerNormalization" else "export to opset 20 or older, or update it"
            yield f"this onnxruntime's {kind} loses the variance where it is small beside the mean; {out}"


def _twice(graph: _Graph, after: _Graph) -> Iterator[str]:
    """Pairs that read values of another pair, and those whose codes are gone `after` the pairs in a row were joined."""
    left = {after.step(node) for node in after.nodes if node.op_type == _CODES}
    for node in graph.nodes:
        if node.op_type == _CODES and node.input[0] in graph.moving:
            before, step = graph.maker(node.input[0], _NOTHING), graph.step(node)
            own = before is None or before.op_type != _VALUES or (None not in step and graph.step(before) == step)
            if step not in left or not own:
                where = f'{_CODES} giving "{node.output[0]}"'
                yield f"onnxruntime makes one Q/DQ pair of two in a row ({where}); leave one of them out"


@dataclass(frozen=True, slots=True)
class _Layer:
    """A product whose image may be codes; `adds` reads its bias, of that name if it has one."""

    product: NodeProto
    adds: NodeProto
    bias: str

    def told(self, name: str) -> str:
        node = self.adds if name == self.bias else self.product
        return f'{node.op_type} giving "{node.output[0]}"'


def _layers(graph: _Graph) -> Iterator[_Layer]:
    for node in graph.nodes:
        if node.op_type in _WEIGHTED and node.input[0] in graph.coded:
            yield _Layer(node, node, node.input[2] if len(node.input) > 2 else "")
        for bias, other in (node.input, reversed(node.input)) if node.op_type == "Add" else ():
            product = graph.maker(other, _MOVES)
            found = product is not None and product.op_type == "MatMul" and product.input[0] in graph.coded
            if product is not None and found and graph.row(bias):
                yield _Layer(product, node, bias)


def _with_codes(model: onnx.ModelProto, graph: _Graph, run: onnx.ModelProto) -> tuple[onnx.ModelProto, str | None]:
    """The file with the codes of those biases that the graph that runs does not read any more."""
    layers, before, after = tuple(_layers(graph)), floats(model), floats(run)
    for layer in layers:
        if _gone(layer.product.input[1], graph, before, after):
            return model, (
                f"onnxruntime makes its float weights codes of one scale ({layer.told(layer.product.input[1])}); store "
                "them as codes, or leave the values in front of it or behind it without codes"
            )
    changed = [layer for layer in layers if layer.bias and _gone(layer.bias, graph, before, after)]
    if not changed:
        return model, None
    made = onnx.ModelProto()
    made.CopyFrom(model)
    if not (all(_spell(made, graph, layer) for layer in changed) and alike(as_run(made), run)):
        return model, (
            f"onnxruntime rounds the float bias to codes ({changed[0].told(changed[0].bias)}); store it as int32 codes "
            "behind a DequantizeLinear whose scale is that of the image times that of the weights"
        )
    return made, None


def _gone(name: str, graph: _Graph, before: Counter[bytes], after: Counter[bytes]) -> bool:
    """Whether floats that do not change with the image have fewer readers than in the file. Zeros are codes too."""
    held = graph.held(name)
    if held is None:
        return name not in graph.moving and name not in graph.coded
    entries = mixed(held)
    return held.dtype == np.float32 and bool(entries) and after[entries] < before[entries]


def _spell(made: onnx.ModelProto, graph: _Graph, layer: _Layer) -> bool:
    """Put the codes of a bias into a copy of the file; whether bias and scales are constants."""
    pairs = [graph.maker(name, _LIGHT) for name in layer.product.input[:2]]
    scales = [graph.held(pair.input[1]) for pair in pairs if pair is not None and pair.op_type == _VALUES]
    bias = graph.held(layer.bias)
    if bias is None or len(scales) < 2 or scales[0] is None or scales[1] is None:
        return False
    scale = np.asarray(scales[0] * scales[1])
    with np.errstate(all="ignore"):  # whether these are the codes is for the graph that runs to say
        codes = np.round(bias.reshape(-1) / scale).astype(np.int32)
    name = f"{layer.adds.output[0]}.bias"
    ends = [f"{name}.codes", f"{name}.scale"]
    made.graph.initializer.extend(map(numpy_helper.from_array, (codes, scale), ends))
    node = next(node for node in made.graph.node if node.output[0] == layer.adds.output[0])
    node.input[[*node.input].index(layer.bias)] = name
    made.graph.node.insert(0, helper.make_node(_VALUES, ends, [name], **({"axis": 0} if scale.ndim else {})))
    return True


@cache
def loses_variance(kind: str = "LayerNormalization") -> bool:
    """Whether the probe's answer is further from the exact one than differences of float32 numbers explain."""
    wanted = np.random.default_rng(0).normal(size=(8, 1, _ENTRIES)) * 1e-3 + 1e3
    x = wanted.astype(np.float32)
    apart = x.astype(np.float64) - x.mean(2, keepdims=True, dtype=np.float64)
    exact = apart / np.sqrt((apart**2).mean(2, keepdims=True) + _EPS)
    return not bool(np.abs(OrtEngine(probe(kind))(x) - exact).max() < 0.1)


def probe(kind: str = "LayerNormalization") -> bytes:
    """One normalisation of [N, 1, 64]."""
    entries = _ENTRIES if kind == "LayerNormalization" else 1
    constants = {"scale": np.ones(entries, np.float32), "shift": np.zeros(entries, np.float32)}
    node = helper.make_node(kind, ["input", *constants], ["logits"], epsilon=_EPS, **NORMS[kind])
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 1, _ENTRIES]) for name in ("input", "logits")]
    held = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph([node], "probe", ends[:1], ends[1:], held)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return bytes(model.SerializeToString())
