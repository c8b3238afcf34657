"""One gradient through the torch twin of a separable network's file: process time and memory, by precision.

    OMP_NUM_THREADS=1 python -m benchmarks.twin

A WRN-10-1 for 32x32x3 with two kernels per input channel, 256 images, one thread, best of three; `literal` runs every
node as it stands, without merged pairs. Memory is the growth of the process's peak, so the order of the rows matters.
"""

import resource
import tempfile
import time
from pathlib import Path

import onnx
import torch
from torch import nn
from torch.nn import functional as F

from stages.nn._onnx_tidy import fold_constants
from stages.nn.arch import Arch
from stages.nn.imported import Twin, imported
from stages.nn.layers.gdws_conv import fit
from stages.nn.to_onnx import export
from stages.seeding import generator
from stages.tuning import initial
from targets.passes import qdq_int8_cpu
from targets.passes.base import Kit

_SHAPE, _BATCH, _ROUNDS = (3, 32, 32), 256, 3


def main() -> None:
    torch.set_num_threads(1)
    x = torch.rand((_BATCH, *_SHAPE), generator=generator(0))
    for name, twin in _twins(x).items():
        before = _peak()
        seconds = min(_seconds(twin, x) for _ in range(_ROUNDS))
        print(f"{name:16s} {seconds:6.2f} s  {_peak() - before:6.0f} MiB more", flush=True)


def _twins(x: torch.Tensor) -> dict[str, nn.Module]:
    net = initial(Arch(builder="wrn", input_shape=_SHAPE, classes=10), 0)
    convolutions = [(path, layer) for path, layer in net.named_modules() if isinstance(layer, nn.Conv2d)]
    for path, layer in convolutions[1:]:
        if layer.kernel_size == (3, 3):
            net.set_submodule(path, fit(layer, [2] * layer.in_channels))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.onnx")
        export(net, _SHAPE, path)
        graph = path.read_bytes()
        int8 = qdq_int8_cpu.lower(onnx.load_model_from_string(graph), {}, Kit(x[:64].numpy(), Path(folder)))
    literal = onnx.load_model_from_string(graph)
    fold_constants(literal)
    return {
        "float32": imported(graph),
        "float32 literal": Twin(literal).eval(),
        "int8": imported(int8.SerializeToString()),
    }


def _seconds(twin: nn.Module, x: torch.Tensor) -> float:
    x = x.clone().requires_grad_()
    start = time.process_time()
    torch.autograd.grad(F.cross_entropy(twin(x), torch.zeros(len(x), dtype=torch.int64)), x)
    return time.process_time() - start


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
