"""The families of `benchmarks.verify_spec` that have random weights, one function each."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from onnx import numpy_helper

from benchmarks.spec_nets import Graph, Net

Array = npt.NDArray[np.float64]
i64 = np.int64


def _image(g: Graph, *shape: int) -> Array:
    """A smooth image in [0, 1]."""
    coarse = g.rng.uniform(0, 1, (*shape[:-2], shape[-2] // 4, shape[-1] // 4))
    return coarse.repeat(4, -1).repeat(4, -2)


def tiny(seed: int) -> Net:
    """As test_nano: one number in, without a batch."""
    g = Graph([1], seed, 9)
    x = g("Relu", g("Add", g("MatMul", "input", g.weight(1, 4, fan=1)), g.rng.normal(0, 1, 4)))
    return g.net(g("MatMul", x, g.weight(4, 1, fan=4)), np.zeros(1), 1.0)


def oval21(seed: int) -> Net:
    g = Graph([1, 3, 32, 32], seed, 9, listed=True)
    x = g("Relu", g.conv("input", 3, 8, 4, 2, pads=[1] * 4))
    x = g("Relu", g.conv(x, 8, 16, 4, 2, pads=[1] * 4))
    return g.net(g.chain(g("Flatten", x), [1024, 100, 10], gemm=True), _image(g, 1, 3, 32, 32), 2 / 255)


def sri_resnet(seed: int) -> Net:
    """Normalised by constant nodes, residual blocks, Reshape to a constant shape of one image."""
    g = Graph([1, 3, 16, 16], seed, 11)
    mean, std = (numpy_helper.from_array(np.full((1, 3, 1, 1), v, np.float32)) for v in (0.45, 0.25))
    x = g("Div", g("Sub", "input", g("Constant", value=mean)), g("Constant", value=std))
    x = g("Relu", g.conv(x, 3, 8, 3, 2))
    for _ in range(2):
        x = g("Relu", g("Add", g.conv(g("Relu", g.conv(x, 8, 8)), 8, 8), x))
    return g.net(g.chain(g("Reshape", x, np.array([1, 512], i64)), [512, 50, 10]), _image(g, 1, 3, 16, 16), 2 / 255)


def cifar100_resnet(seed: int) -> Net:
    """Convolutions with batch normalisation, projection shortcuts, pooling to one pixel, many classes."""
    g = Graph(["batch_size", 3, 16, 16], seed, 12)
    x = g("Relu", g.norm(g.conv("input", 3, 8), 8))
    for a, b in ((8, 8), (8, 16)):
        y = g("Relu", g.norm(g.conv(x, a, b, 3, 2), b))
        x = g("Relu", g("Add", g.norm(g.conv(y, b, b), b), g.norm(g.conv(x, a, b, 1, 2), b)))
    x = g("Flatten", g("AveragePool", x, kernel_shape=[4, 4], strides=[4, 4]))
    return g.net(g.chain(x, [16, 20], gemm=True), _image(g, 1, 3, 16, 16), 2 / 255)


def marabou_cifar10(seed: int) -> Net:
    """As a converter from NHWC writes it: Transpose in front of and behind the convolutions, an open batch."""
    g = Graph(["unk__1", 16, 16, 3], seed, 9)
    x = g("Transpose", "input", perm=[0, 3, 1, 2])
    x = g("Relu", g.conv(x, 3, 8, 3, 2))
    x = g("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2])
    x = g("Reshape", g("Transpose", x, perm=[0, 2, 3, 1]), np.array([-1, 128], i64))
    return g.net(g.chain(x, [128, 64, 10]), _image(g, 1, 3, 16, 16).transpose(0, 2, 3, 1), 0.012)


def cifar_biasfield(seed: int) -> Net:
    """Sixteen parameters of a field that a first layer makes an image of."""
    g = Graph([1, 16], seed, 12)
    x = g("Reshape", g("Clip", g.dense("input", 16, 768), 0.0, 1.0), np.array([1, 3, 16, 16], i64))
    x = g("Relu", g.norm(g.conv(x, 3, 8, 3, 2), 8))
    x = g("Relu", g.norm(g.conv(x, 8, 8, 3, 2), 8))
    return g.net(g.chain(g("Flatten", x), [128, 10], gemm=True), np.zeros(16), 0.06)


def lindex(seed: int) -> Net:
    g = Graph(["n", 1], seed, 11)
    return g.net(g.chain("input", [1, 64, 64, 64, 1]), np.full(1, 0.5), 0.05)


def _mscn(g: Graph, x: str) -> str:
    """Sets of rows, each through a net of its own, averaged under a mask, joined; all cut out of one array."""
    parts = []
    for first, rows in ((0, 3), (3, 8)):
        part = g("Slice", x, np.array([first], i64), np.array([first + rows], i64), np.array([1], i64))
        mask = g("Slice", part, np.array([13], i64), np.array([14], i64), np.array([2], i64))
        data = g("Slice", part, np.array([0], i64), np.array([13], i64), np.array([2], i64))
        y = g("Relu", g.dense(g("Relu", g.dense(data, 13, 32)), 32, 32))
        total = g("ReduceSum", g("Mul", y, mask), np.array([1], i64), keepdims=0)
        parts.append(g("Div", total, g("ReduceSum", mask, np.array([1], i64), keepdims=0)))
    return str(g("Sigmoid", g.chain(g("Concat", *parts, axis=1), [64, 32, 1])))


def _queries(g: Graph, copies: int) -> tuple[Array, Array]:
    """Rows of numbers of which few move, and a mask of ones in the last column, which stays."""
    centre, radius = g.rng.uniform(0, 1, (1, 11, 14)), np.zeros((1, 11, 14))
    centre[..., 13], radius[:, 3:9, 11] = 1.0, 0.3
    return np.concatenate([centre] * copies, 1), np.concatenate([radius] * copies, 1)


def mscn(seed: int) -> Net:
    g = Graph([1, 11, 14], seed, 13)
    return g.net(_mscn(g, "input"), *_queries(g, 1))


def mscn_dual(seed: int) -> Net:
    """Two copies of one net on two queries, one subtracted from the other."""
    g = Graph([1, 22, 14], seed, 13)
    state, outs = g.rng.bit_generator.state, []
    for copy in range(2):
        g.rng.bit_generator.state = state
        half = g("Slice", "input", np.array([11 * copy], i64), np.array([11 * copy + 11], i64), np.array([1], i64))
        outs.append(_mscn(g, half))
    return g.net(g("Sub", *outs), *_queries(g, 2))


def pensieve(seed: int) -> Net:
    """Rows cut out by Gather, some through convolutions of one dimension, joined."""
    g = Graph([1, 6, 8], seed, 11)
    parts = []
    for row in range(6):
        x = g("Gather", "input", np.array(row, i64), axis=1)
        if row in (2, 3, 4):
            y = g("Conv", g("Unsqueeze", x, axes=[1]), g.weight(16, 1, 4, fan=4), g.rng.normal(0, 0.1, 16))
            parts.append(g("Flatten", g("Relu", y)))
        else:
            last = g("Slice", x, np.array([-1], i64), np.array([2**31 - 1], i64), np.array([1], i64))
            parts.append(g("Relu", g.dense(last, 1, 16)))
    radius = np.zeros((6, 8))
    radius[2:4] = 0.25
    return g.net(g.chain(g("Concat", *parts, axis=1), [288, 64, 6], gemm=True), np.full((6, 8), 0.5), radius)


def lunarlander(seed: int) -> Net:
    g = Graph([1, 8], seed, 9, listed=True)
    return g.net(g.chain("input", [8, 64, 64, 4], gemm=True), g.rng.uniform(-0.5, 0.5, 8), 0.1)


def dubins(seed: int) -> Net:
    g = Graph(["batch", 8], seed, 13)
    return g.net(g.chain("input", [8, 128, 128, 8]), g.rng.uniform(-0.5, 0.5, 8), 0.05)


def collins_rul(seed: int) -> Net:
    """Convolutions along time with dropout left in the graph, one value out."""
    g = Graph([1, 1, 20, 20], seed, 11)
    x = "input"
    for a, b in ((1, 8), (8, 8)):
        weight = g.weight(b, a, 10, 1, fan=10 * a)
        x = g("Conv", x, weight, g.rng.normal(0, 0.1, b), kernel_shape=[10, 1], pads=[5, 0, 4, 0], strides=[1, 1])
        x = g("Dropout", g("Relu", x), ratio=0.2)
    return g.net(g.chain(g("Flatten", x, axis=1), [3200, 64, 1], gemm=True), _image(g, 1, 1, 20, 20), 0.02)


def reach_prob_density(seed: int) -> Net:
    g = Graph([1, 3], seed, 12)
    return g.net(g.chain("input", [3, 64, 64, 64, 10]), np.zeros(3), 0.3)


def tll(seed: int) -> Net:
    """Affine pieces, least and largest of them by ReLUs: min(a, b) = (a + b - |a - b|) / 2, all in matrices."""
    g = Graph([1, 2], seed, 13)
    x, width = g.dense("input", 2, 32), 32
    while width > 1:
        half = width // 2
        first, second = np.eye(width)[:, :half], np.eye(width)[:, half:]
        spread = np.concatenate([first - second, second - first, first + second, -first - second], 1)
        sign = -0.5 if width > 4 else 0.5
        gather = np.concatenate([np.eye(half) * s for s in (sign, sign, 0.5, -0.5)])
        x = g("MatMul", g("Relu", g("MatMul", x, spread)), gather)
        width = half
    return g.net(g("Reshape", x, np.array([1, 1], i64)), np.zeros(2), 2.0)


def dist_shift(seed: int) -> Net:
    """A generator and a classifier in one graph; of the input most numbers are fixed."""
    g = Graph([1, 72], seed, 12)
    latent = g("Slice", "input", np.array([64], i64), np.array([72], i64), np.array([1], i64))
    image = g("Slice", "input", np.array([0], i64), np.array([64], i64), np.array([1], i64))
    code = g.chain(g("Concat", g.chain(image, [64, 32, 8]), latent, axis=1), [16, 64, 64], "Relu")
    return g.net(g.chain(g("Sigmoid", code), [64, 32, 10]), np.full(72, 0.5), np.r_[np.zeros(64), np.full(8, 0.6)])


def ml4acopf(seed: int) -> Net:
    """Power flow at the end of a network: products of voltages, sines and cosines of differences of angles."""
    g = Graph([1, 8], seed, 13)
    out = g.chain("input", [8, 64, 8])
    bus, angle = g("Split", out, np.array([4, 4], i64), axis=1, outputs=2)
    volts = g("Add", g("Mul", g("Sigmoid", bus), 0.12), 0.94)
    turn = g("Sub", angle, g("Gather", angle, np.array([1, 2, 3, 0], i64), axis=1))
    pair = g("Mul", volts, g("Gather", volts, np.array([1, 2, 3, 0], i64), axis=1))
    active = g("Mul", pair, g("Sin", turn))
    other = g("Sub", g("Pow", volts, 2.0), g("Mul", pair, g("Cos", turn)))
    return g.net(g("Concat", active, g("Neg", other), axis=1), np.zeros(8), 0.1)


def vit(seed: int) -> Net:
    """Patches by a convolution, a class token, attention by MatMul and Softmax, batch normalisation."""
    g, d, heads = Graph([1, 3, 16, 16], seed, 13), 16, 2
    x = g("Reshape", g.conv("input", 3, d, 4, 4, pads=[0] * 4), np.array([0, d, 16], i64))
    x = g("Concat", g.rng.normal(0, 0.3, (1, 1, d)), g("Transpose", x, perm=[0, 2, 1]), axis=1)
    x = g("Add", x, g.rng.normal(0, 0.1, (1, 17, d)))
    q, k, v = (g("Reshape", g.dense(x, d, d), np.array([0, 17, heads, d // heads], i64)) for _ in range(3))
    q, v = (g("Transpose", t, perm=[0, 2, 1, 3]) for t in (q, v))
    scores = g("Mul", g("MatMul", q, g("Transpose", k, perm=[0, 2, 3, 1])), float((d // heads) ** -0.5))
    mixed = g("Transpose", g("MatMul", g("Softmax", scores, axis=-1), v), perm=[0, 2, 1, 3])
    x = g("Add", x, g.dense(g("Reshape", mixed, np.array([0, 17, d], i64)), d, d))
    normal = g("Transpose", g.norm(g("Transpose", x, perm=[0, 2, 1]), d), perm=[0, 2, 1])
    x = g("Add", x, g.dense(g("Relu", g.dense(normal, d, 32)), 32, d))
    return g.net(g.dense(g("ReduceMean", x, axes=[1], keepdims=0), d, 10), _image(g, 1, 3, 16, 16), 2 / 255)


def cgan(seed: int) -> Net:
    """A generator of transposed convolutions and a critic."""
    g = Graph([1, 5], seed, 11)
    x = g("Reshape", g.dense("input", 5, 128), np.array([-1, 32, 2, 2], i64))
    for a, b in ((32, 16), (16, 3)):
        weight = g.weight(a, b, 4, 4, fan=4 * a)
        x = g("ConvTranspose", x, weight, g.rng.normal(0, 0.1, b), kernel_shape=[4, 4], strides=[2, 2], pads=[1] * 4)
        x = g("Relu", g.norm(x, b)) if b > 3 else g("Tanh", x)
    x = g("LeakyRelu", g.conv(x, 3, 8, 3, 2), alpha=0.2)
    return g.net(g.dense(g("Flatten", x), 128, 1), np.zeros(5), 0.15)


def cgan_upsample(seed: int) -> Net:
    """The same with images made larger by repeating pixels: Upsample of opset 9, scales as an initialiser."""
    g = Graph([1, 5], seed, 9)
    x = g("Reshape", g.dense("input", 5, 128), np.array([-1, 32, 2, 2], i64))
    for a, b in ((32, 16), (16, 3)):
        x = g.conv(g("Upsample", x, np.array([1, 1, 2, 2], np.float32), mode="nearest"), a, b)
        x = g("Relu", g.norm(x, b)) if b > 3 else g("Tanh", x)
    x = g("LeakyRelu", g.conv(x, 3, 8, 3, 2), alpha=0.2)
    return g.net(g.dense(g("Flatten", x), 128, 1), np.zeros(5), 0.15)


def traffic_signs(seed: int) -> Net:
    """Signs in place of activations: flat between jumps."""
    g = Graph(["unk__1", 16, 16, 3], seed, 13)
    x = g.norm(g.conv(g("Transpose", "input", perm=[0, 3, 1, 2]), 3, 8), 8)
    x = g("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2])
    x = g.norm(g.conv(g("Sign", x), 8, 8), 8)
    x = g("Reshape", g("Transpose", g("Sign", x), perm=[0, 2, 3, 1]), np.array([-1, 512], i64))
    return g.net(g.dense(x, 512, 10), _image(g, 1, 3, 16, 16).transpose(0, 2, 3, 1), 0.02)


def safenlp(seed: int) -> Net:
    g = Graph(["batch", 30], seed, 12)
    return g.net(g.chain("input", [30, 128, 2]), g.rng.normal(0, 0.3, 30), 0.1)


def linearizenn(seed: int) -> Net:
    """Several nets on one input, their answers joined and summed with weights."""
    g = Graph([1, 4], seed, 12)
    parts = [g.chain("input", [4, 20, 20, 3], gemm=True) for _ in range(4)]
    return g.net(g.dense(g("Concat", *parts, "input", axis=1), 16, 2), np.zeros(4), 0.3)


def metaroom(seed: int) -> Net:
    g = Graph([1, 3, 16, 28], seed, 12)
    x = g("Relu", g.conv("input", 3, 8, 5, 2))
    x = g("Relu", g.conv(x, 8, 8, 3, 2))
    return g.net(g.chain(g("Flatten", x), [224, 64, 20], gemm=True), _image(g, 1, 3, 16, 28), 0.01)


def lsnc(seed: int) -> Net:
    """A controller, the system's next state and a function of Lyapunov of both, in one graph."""
    g = Graph([1, 4], seed, 13)
    action = g("Clip", g.chain("input", [4, 8, 1], "LeakyRelu", alpha=0.01), -1.0, 1.0)
    step = g("MatMul", "input", 0.1 * g.weight(4, 4, fan=8))
    after = g("Add", g("Add", "input", step), g("MatMul", action, 0.1 * g.weight(1, 4, fan=1)))
    matrix = g.weight(4, 4, fan=4)
    axis = np.array([1], i64)
    grades = [g("ReduceSum", g("Pow", g("MatMul", x, matrix), 2.0), axis, keepdims=1) for x in ("input", after)]
    return g.net(g("Concat", g("Sub", grades[1], g("Mul", grades[0], 0.99)), grades[0], axis=1), np.full(4, 0.4), 0.3)


def yolo(seed: int) -> Net:
    g = Graph(["batch", 3, 20, 20], seed, 11)
    x = g("LeakyRelu", g.conv("input", 3, 8, 3, 2), alpha=0.1)
    x = g("AveragePool", x, kernel_shape=[2, 2], strides=[2, 2])
    x = g("Add", x, g("LeakyRelu", g.norm(g.conv(x, 8, 8), 8), alpha=0.1))
    x = g("Reshape", g.conv(x, 8, 5, 1, pads=[0] * 4), np.array([1, -1], i64))
    return g.net(x, _image(g, 1, 3, 20, 20), 1 / 255)


def relusplitter(seed: int) -> Net:
    """ReLUs split in two: w x + b = (w x + b + t) - t on either side of zero, in Gemm and Relu."""
    g = Graph([1, 12], seed, 13)
    weight, bias, after = g.weight(12, 32, fan=12), g.rng.normal(0, 0.1, 32), g.weight(32, 16, fan=32)
    twice = g("Gemm", "input", np.concatenate([weight, -weight], 1), np.r_[bias, -bias])
    whole = g("MatMul", g("Relu", twice), np.concatenate([np.eye(32), -np.eye(32)]))
    x = g("Relu", g("MatMul", g("Relu", whole), after))
    return g.net(g.dense(x, 16, 5), np.zeros(12), 0.2)


def soundness(seed: int) -> Net:
    """Tanh behind convolutions, of which gradients vanish."""
    g = Graph(["n", 1, 5, 5], seed, 13)
    x = g("Tanh", g("Mul", g.conv("input", 1, 8), 3.0))
    x = g("Tanh", g("Mul", g.conv(x, 8, 8), 3.0))
    return g.net(g.chain(g("Flatten", x), [200, 32, 2], "Tanh"), np.zeros(25), 0.3)


FAMILIES: dict[str, Callable[[int], Net]] = {
    made.__name__: made
    for made in (
        *(tiny, oval21, sri_resnet, cifar100_resnet, marabou_cifar10, cifar_biasfield, lindex, mscn, mscn_dual),
        *(pensieve, lunarlander, dubins, collins_rul, reach_prob_density, tll, dist_shift, ml4acopf, vit, cgan),
        *(cgan_upsample, traffic_signs, safenlp, linearizenn, metaroom, lsnc, yolo, relusplitter, soundness),
    )
}
