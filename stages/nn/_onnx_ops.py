"""The table of ONNX operators that a torch twin can have."""

from collections.abc import Callable, Sequence
from functools import reduce

import torch
from torch import Tensor
from torch.nn import functional as F

from stages.nn import _onnx_shapes as shapes
from stages.nn import _onnx_values as values
from stages.nn._onnx_values import Attributes

Operator = Callable[..., Tensor | tuple[Tensor, ...]]


def _plain(function: Callable[..., Tensor]) -> Operator:
    """A torch function that reads no attributes."""
    return lambda _, *inputs: function(*inputs)


def _many(function: Callable[[Tensor, Tensor], Tensor]) -> Operator:
    """A function of two, applied along any number of inputs."""
    return lambda _, *inputs: reduce(function, inputs)


def _divide(left: Tensor, right: Tensor) -> Tensor:
    return left / right if left.is_floating_point() else torch.div(left, right, rounding_mode="trunc")


def _modulo(a: Attributes, left: Tensor, right: Tensor) -> Tensor:
    return torch.fmod(left, right) if a.get("fmod", 0) else torch.remainder(left, right)


OPERATORS: dict[str, Operator] = {
    "Abs": _plain(torch.abs),
    "Add": _plain(torch.add),
    "And": _plain(torch.logical_and),
    "AveragePool": values.average_pool,
    "BatchNormalization": values.batch_norm,
    "Cast": shapes.cast,
    "Clip": values.clip,
    "Concat": shapes.concat,
    "ConstantOfShape": shapes.constant_of_shape,
    "Conv": values.conv,
    "DequantizeLinear": values.dequantize_linear,
    "Div": _plain(_divide),
    "Dropout": shapes.identity,
    "Elu": values.elu,
    "Equal": _plain(torch.eq),
    "Erf": _plain(torch.erf),
    "Exp": _plain(torch.exp),
    "Expand": shapes.expand,
    "Flatten": shapes.flatten,
    "Gather": shapes.gather,
    "GatherElements": shapes.gather_elements,
    "Gelu": values.gelu,
    "Gemm": values.gemm,
    "GlobalAveragePool": values.global_average_pool,
    "Greater": _plain(torch.gt),
    "HardSigmoid": values.hard_sigmoid,
    "HardSwish": values.hard_swish,
    "Identity": shapes.identity,
    "LayerNormalization": values.layer_norm,
    "LeakyRelu": values.leaky_relu,
    "Less": _plain(torch.lt),
    "Log": _plain(torch.log),
    "LogSoftmax": values.log_softmax,
    "MatMul": _plain(torch.matmul),
    "Max": _many(torch.maximum),
    "MaxPool": values.max_pool,
    "Min": _many(torch.minimum),
    "Mod": _modulo,
    "Mul": _plain(torch.mul),
    "Neg": _plain(torch.neg),
    "Not": _plain(torch.logical_not),
    "PRelu": _plain(lambda x, slope: torch.where(x < 0, slope * x, x)),
    "Pad": shapes.pad,
    "Pow": _plain(torch.pow),
    "QuantizeLinear": values.quantize_linear,
    "Range": shapes.range_,
    "Reciprocal": _plain(torch.reciprocal),
    "ReduceL2": values.reduce_l2,
    "ReduceMax": values.reduce_max,
    "ReduceMean": values.reduce_mean,
    "ReduceSum": values.reduce_sum,
    "Relu": _plain(torch.relu),
    "Reshape": shapes.reshape,
    "Shape": shapes.shape,
    "Sigmoid": _plain(torch.sigmoid),
    "Slice": shapes.slice_,
    "Softmax": values.softmax,
    "Softplus": _plain(F.softplus),
    "Split": shapes.split,
    "Sqrt": _plain(torch.sqrt),
    "Squeeze": shapes.squeeze,
    "Sub": _plain(torch.sub),
    "Sum": _many(torch.add),
    "Tanh": _plain(torch.tanh),
    "Tile": shapes.tile,
    "Transpose": shapes.transpose,
    "Unsqueeze": shapes.unsqueeze,
    "Where": shapes.where,
}


def objection(operator: str, attributes: Attributes, constants: Sequence[Tensor | None]) -> str | None:
    """Why a node has no twin although its operator is in the table; None where it has one.

    `constants` holds the node's inputs in order, None for those that are computed.
    """
    if operator == "BatchNormalization" and attributes.get("training_mode", 0):
        return "it is in training mode; export the network in eval mode"
    if operator == "Dropout" and len(constants) > 2 and (constants[2] is None or bool(constants[2])):
        return "it is in training mode; export the network in eval mode"
    automatic = attributes.get("auto_pad", b"NOTSET").decode()
    if automatic not in {"NOTSET", "VALID"}:
        return f"auto_pad is {automatic}; export with explicit pads"
    if operator == "AveragePool" and max(attributes.get("dilations", [1])) > 1:
        return "its window has holes (dilations above 1)"
    if operator == "Cast" and not shapes.castable(attributes["to"]):
        return f"ONNX type {attributes['to']}; expected a float, an integer of 32 or 64 bits, or a bool"
    if operator in {"QuantizeLinear", "DequantizeLinear"} and attributes.get("block_size", 0):
        return "it has one scale per block; quantise per tensor or per channel"
    if operator == "QuantizeLinear" and len(constants) > 2:
        zero = constants[2]
        if zero is None or zero.dtype not in values.RANGES:
            return "expected a constant zero point of type int8 or uint8"
    return None
