"""What the dense form saves where gradients are wanted: one layer, forward and backward with respect to the images.

    OMP_NUM_THREADS=1 python -m benchmarks.separable

Milliseconds of process time on one thread, best of interleaved rounds, for a 3x3 convolution with g kernels per input
channel; batch 32. The bound in `stages/nn/_separable.py` rests on these numbers.
"""

import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from stages.fitting.precision import layout
from stages.nn.layers.gdws_conv import fit, folded
from stages.seeding import generator

_SIZES = ((16, 32), (32, 16), (64, 8), (64, 32), (128, 16), (256, 8))
_BATCH, _ROUNDS = 32, 5
_FORMATS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}


def main() -> None:
    torch.set_num_threads(1)
    print(f"{'channels @ side':>16s} {'g':>2s} {'memory':>14s} {'separable':>10s} {'dense':>10s}  ms")
    for channels, side in _SIZES:
        for kernels in (1, 2, 4):
            for name, memory in _FORMATS.items():
                layer = fit(nn.Conv2d(channels, channels, 3, padding=1), [kernels] * channels).requires_grad_(False)
                dense = layout(folded(layer), memory).requires_grad_(False)
                layout(layer, memory)
                x = torch.rand(_BATCH, channels, side, side, generator=generator(0)).contiguous(memory_format=memory)
                forms: tuple[Callable[[Tensor], Tensor], ...] = (partial(layer._separably, pads=1), dense)
                best = [
                    min(column) for column in zip(*([_ms(f, x) for f in forms] for _ in range(_ROUNDS)), strict=True)
                ]
                print(
                    f"{channels:>11d} @ {side:2d} {kernels:2d} {name:>14s} {best[0]:10.2f} {best[1]:10.2f}", flush=True
                )


def _ms(form: Callable[[Tensor], Tensor], x: Tensor) -> float:
    x = x.detach().requires_grad_()
    start = time.process_time()
    torch.autograd.grad(form(x).sum(), x)
    return 1e3 * (time.process_time() - start)


if __name__ == "__main__":
    main()
