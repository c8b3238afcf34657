"""The table of ONNX operators that a torch twin can have."""

from collections.abc import Callable, Sequence
from functools import reduce

import torch
from torch import Tensor
from torch.nn import functional as F

from stages.nn import _onnx_resize as sizes
from stages.nn import _onnx_shapes as shapes
from stages.nn import _onnx_values as values
from stages.nn import _onnx_windows as windows
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


def _einsum(a: Attributes, *parts: Tensor) -> Tensor:
    return torch.einsum(a["equation"].decode(), *parts)


def _mean(_: Attributes, *parts: Tensor) -> Tensor:
    return reduce(torch.add, parts) / len(parts)


OPERATORS: dict[str, Operator] = {
    "Abs": _plain(torch.abs),
    "Add": _plain(torch.add),
    "And": _plain(torch.logical_and),
    "Asinh": _plain(torch.asinh),
    "Atan": _plain(torch.atan),
    "AveragePool": windows.average_pool,
    "BatchNormalization": values.batch_norm,
    "Cast": shapes.cast,
    "Ceil": _plain(torch.ceil),
    "Celu": values.celu,
    "Clip": values.clip,
    "Concat": shapes.concat,
    "ConstantOfShape": shapes.constant_of_shape,
    "Conv": windows.conv,
    "ConvTranspose": windows.conv_transpose,
    "Cos": _plain(torch.cos),
    "Cosh": _plain(torch.cosh),
    "CumSum": shapes.running_sum,
    "DepthToSpace": shapes.depth_to_space,
    "DequantizeLinear": values.dequantize_linear,
    "Div": _plain(_divide),
    "Dropout": shapes.identity,
    "Einsum": _einsum,
    "Elu": values.elu,
    "Equal": _plain(torch.eq),
    "Erf": _plain(torch.erf),
    "Exp": _plain(torch.exp),
    "Expand": shapes.expand,
    "Flatten": shapes.flatten,
    "Floor": _plain(torch.floor),
    "Gather": shapes.gather,
    "GatherElements": shapes.gather_elements,
    "GatherND": shapes.gather_nd,
    "Gelu": values.gelu,
    "Gemm": values.gemm,
    "GlobalAveragePool": windows.global_average_pool,
    "GlobalMaxPool": windows.global_max_pool,
    "Greater": _plain(torch.gt),
    "GreaterOrEqual": _plain(torch.ge),
    "GroupNormalization": values.group_norm,
    "HardSigmoid": values.hard_sigmoid,
    "HardSwish": values.hard_swish,
    "Identity": shapes.identity,
    "InstanceNormalization": values.instance_norm,
    "LRN": values.local_response_norm,
    "LayerNormalization": values.layer_norm,
    "LeakyRelu": values.leaky_relu,
    "Less": _plain(torch.lt),
    "LessOrEqual": _plain(torch.le),
    "Log": _plain(torch.log),
    "LogSoftmax": values.log_softmax,
    "LpNormalization": values.lp_norm,
    "MatMul": _plain(torch.matmul),
    "Max": _many(torch.maximum),
    "MaxPool": windows.max_pool,
    "Mean": _mean,
    "Min": _many(torch.minimum),
    "Mish": _plain(F.mish),
    "Mod": _modulo,
    "Mul": _plain(torch.mul),
    "Neg": _plain(torch.neg),
    "Not": _plain(torch.logical_not),
    "Or": _plain(torch.logical_or),
    "PRelu": _plain(lambda x, slope: torch.relu(x) - slope * torch.relu(-x)),
    "Pad": shapes.pad,
    "Pow": _plain(torch.pow),
    "QuantizeLinear": values.quantize_linear,
    "Range": shapes.range_,
    "Reciprocal": _plain(torch.reciprocal),
    "ReduceL1": values.reduction(lambda x, axes, keep: x.abs().sum(axes, keep), torch.abs),
    "ReduceL2": values.reduction(lambda x, axes, keep: x.square().sum(axes, keep).sqrt(), torch.abs),
    "ReduceLogSum": values.reduction(lambda x, axes, keep: x.sum(axes, keep).log(), torch.log),
    "ReduceLogSumExp": values.reduction(torch.logsumexp, lambda x: x),
    "ReduceMax": values.reduction(torch.amax, lambda x: x),
    "ReduceMean": values.reduction(torch.mean, lambda x: x),
    "ReduceMin": values.reduction(torch.amin, lambda x: x),
    "ReduceProd": values.reduction(values.product, lambda x: x),
    "ReduceSum": values.reduction(torch.sum, lambda x: x),
    "ReduceSumSquare": values.reduction(lambda x, axes, keep: x.square().sum(axes, keep), torch.square),
    "Relu": _plain(torch.relu),
    "Reshape": shapes.reshape,
    "Resize": sizes.resize,
    "Round": _plain(torch.round),
    "ScatterND": shapes.scatter_nd,
    "Selu": values.selu,
    "Shape": shapes.shape,
    "Sigmoid": _plain(torch.sigmoid),
    "Sign": _plain(torch.sign),
    "Sin": _plain(torch.sin),
    "Sinh": _plain(torch.sinh),
    "Size": shapes.size,
    "Slice": shapes.slice_,
    "Softmax": values.softmax,
    "Softplus": _plain(F.softplus),
    "Softsign": _plain(F.softsign),
    "SpaceToDepth": shapes.space_to_depth,
    "Split": shapes.split,
    "Sqrt": _plain(torch.sqrt),
    "Squeeze": shapes.squeeze,
    "Sub": _plain(torch.sub),
    "Sum": _many(torch.add),
    "Swish": values.swish,
    "Tan": _plain(torch.tan),
    "Tanh": _plain(torch.tanh),
    "ThresholdedRelu": values.thresholded_relu,
    "Tile": shapes.tile,
    "Transpose": shapes.transpose,
    "Trilu": shapes.trilu,
    "Unsqueeze": shapes.unsqueeze,
    "Upsample": sizes.upsample,
    "Where": shapes.where,
    "Xor": _plain(torch.logical_xor),
}


def objection(operator: str, attributes: Attributes, constants: Sequence[Tensor | None]) -> str | None:
    """Why a node has no twin although its operator is in the table; None where it has one.

    `constants` holds the node's inputs in order, None for those that are computed.
    """
    if operator == "BatchNormalization" and attributes.get("training_mode", 0):
        return "it is in training mode; export the network in eval mode"
    if operator == "Dropout" and len(constants) > 2 and (constants[2] is None or bool(constants[2])):
        return "it is in training mode; export the network in eval mode"
    if operator == "BatchNormalization" and not attributes.get("spatial", 1):
        return "it normalises every pixel on its own (spatial is 0), which newer opsets do not know"
    if operator == "Cast" and not shapes.castable(attributes["to"]):
        return f"ONNX type {attributes['to']}; expected a float, an integer of 32 or 64 bits, or a bool"
    if operator == "ScatterND" and attributes.get("reduction", b"none") != b"none":
        return f'it reduces by "{attributes["reduction"].decode()}"; expected none'
    if operator in {"Resize", "Upsample"}:
        return sizes.objection(attributes)
    if operator in {"QuantizeLinear", "DequantizeLinear"} and attributes.get("block_size", 0):
        return "it has one scale per block; quantise per tensor or per channel"
    if operator == "QuantizeLinear" and len(constants) > 2:
        zero = constants[2]
        if zero is None or zero.dtype not in values.RANGES:
            return "expected a constant zero point of 8 or 16 bits"
    return None
