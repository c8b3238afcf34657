"""Networks in the shapes of the verification competition, specifications for them, and an oracle by enumeration."""

from collections.abc import Iterator, Sequence
from itertools import combinations, pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

Array = npt.NDArray[np.float64]
Layers = list[tuple[Array, Array]]
Constraint = tuple[Sequence[float], float]  # (weights of Y, bound): weights . Y <= bound


def layers(sizes: Sequence[int], seed: int) -> Layers:
    """Weights [in, out] and biases, float32 numbers held in float64."""
    rng = np.random.default_rng(seed)
    return [
        (
            rng.normal(0, np.sqrt(2 / a), (a, b)).astype(np.float32).astype(np.float64),
            rng.normal(0, 0.3, b).astype(np.float32).astype(np.float64),
        )
        for a, b in pairwise(sizes)
    ]


def mlp(path: Path, net: Layers, shape: Sequence[int | str], front: Sequence[Any] = (), act: str = "Relu") -> Path:
    """Flatten, then MatMul, Add and `act` in turn; `front` are (node, constants) that come before."""
    nodes, arrays, here = [], dict[str, npt.NDArray[Any]](), "input"
    for i, (operator, attributes, constant) in enumerate(front):
        inputs = [here] if constant is None else [here, f"k{i}"]
        if constant is not None:
            arrays[f"k{i}"] = np.asarray(constant)
        nodes.append(helper.make_node(operator, inputs, [f"f{i}"], f"front{i}", **attributes))
        here = f"f{i}"
    nodes.append(helper.make_node("Flatten", [here], ["flat"], "flat", axis=1))
    here = "flat"
    for i, (weight, bias) in enumerate(net):
        arrays[f"w{i}"], arrays[f"b{i}"] = weight.astype(np.float32), bias.astype(np.float32)
        nodes += [
            helper.make_node("MatMul", [here, f"w{i}"], [f"m{i}"], f"mul{i}"),
            helper.make_node("Add", [f"m{i}", f"b{i}"], [f"a{i}"], f"add{i}"),
        ]
        here = f"a{i}"
        if i < len(net) - 1:
            nodes.append(helper.make_node(act, [here], [f"r{i}"], f"act{i}"))
            here = f"r{i}"
    return saved(path, nodes, shape, here, [shape[0], net[-1][0].shape[1]], arrays)


def saved(
    path: Path,
    nodes: Sequence[Any],
    shape: Sequence[int | str],
    output: str,
    outputs: Sequence[int | str],
    arrays: dict[str, npt.NDArray[Any]],
    kind: int = TensorProto.FLOAT,
) -> Path:
    graph = helper.make_graph(
        list(nodes),
        "net",
        [helper.make_tensor_value_info("input", kind, list(shape))],
        [helper.make_tensor_value_info(output, kind, list(outputs))],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path


def spec(low: Sequence[float], high: Sequence[float], outputs: int, unsafe: str) -> str:
    """A box and, as it is, what marks the outputs unsafe."""
    lines = [f"(declare-const X_{i} Real)" for i in range(len(low))]
    lines += [f"(declare-const Y_{k} Real)" for k in range(outputs)]
    for i, (a, b) in enumerate(zip(low, high, strict=True)):
        lines += [f"(assert (>= X_{i} {a!r}))", f"(assert (<= X_{i} {b!r})) ; box"]
    return "\n".join([*lines, unsafe, ""])


def any_of(conjunctions: Sequence[Sequence[Constraint]]) -> str:
    """`(assert (or (and ...) ...))`."""
    return f"(assert (or {' '.join(f'(and {chr(10).join(map(_written, rows))})' for rows in conjunctions)}))"


def _written(row: Constraint) -> str:
    weights, bound = row
    terms = " ".join(f"(* {weight!r} Y_{k})" for k, weight in enumerate(weights))
    return f"(<= (+ {terms} 0) {bound!r})"


def reachable(net: Layers, low: Array, high: Array, rows: Sequence[Constraint], slack: float) -> bool:
    """Whether some x in the box has weights . f(x) <= bound + slack for all rows, by going through every pattern.

    For a pattern of active ReLUs the network is affine, and what is asked for is a polygon: it has a point if and only
    if some corner of it, a meeting of as many lines as there are inputs, keeps to all its sides.
    """
    n = len(low)
    box = [(np.eye(n)[i], high[i]) for i in range(n)] + [(-np.eye(n)[i], -low[i]) for i in range(n)]
    for sides, weight, bias in _pieces(net, n):
        asked = [(weight @ np.asarray(row), bound + slack - bias @ np.asarray(row)) for row, bound in rows]
        G = np.array([g for g, _ in (*box, *sides, *asked)])
        h = np.array([b for _, b in (*box, *sides, *asked)])
        picked = np.array(list(combinations(range(len(G)), n)))
        lines, ends = G[picked], h[picked]
        meet = np.abs(np.linalg.det(lines)) > 1e-12
        corners = np.linalg.solve(lines[meet], ends[meet][:, :, None])[:, :, 0]
        if (corners @ G.T <= h + 1e-9).all(1).any():
            return True
    return False


def _pieces(net: Layers, n: int) -> Iterator[tuple[list[tuple[Array, float]], Array, Array]]:
    """For every pattern: its sides g x <= h, and weights [n, K] and biases [K] of the network there."""
    widths = [len(bias) for _, bias in net[:-1]]
    for pattern in product((0.0, 1.0), repeat=sum(widths)):
        weight, bias, at = np.eye(n), np.zeros(n), 0
        sides = []
        for (w, b), width in zip(net[:-1], widths, strict=True):
            weight, bias = weight @ w, bias @ w + b
            on = np.array(pattern[at : at + width])
            at += width
            signs = 1 - 2 * on  # z <= 0 where off, -z <= 0 where on
            sides += [(signs[j] * weight[:, j], float(-signs[j] * bias[j])) for j in range(width)]
            weight, bias = weight * on, bias * on
        yield sides, weight @ net[-1][0], bias @ net[-1][0] + net[-1][1]
