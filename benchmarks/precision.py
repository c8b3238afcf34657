"""Images per second of one training step: plain float32, channels-last float32, channels-last bf16.

    OMP_NUM_THREADS=1 python -m benchmarks.precision

The rule of `stages/fitting/precision.py` rests on these numbers. Process time on one thread, best of several
interleaved rounds, so that a busy machine changes little.
"""

import time

import torch

from stages.fitting.precision import Mode, native, prepare
from stages.nn.arch import Arch
from stages.recipes.base import Recipe
from stages.recipes.fast import NoisyFGSM
from stages.recipes.natural import Natural
from stages.seeding import generator
from stages.threat import Threat
from stages.tuning import initial

_MODES: tuple[Mode, ...] = ("fp32", "fp32 channels-last", "bf16 channels-last")
_WRN = {"depths": [1, 1, 1], "widths": [1, 1, 1]}
_NETS = {
    "small_cnn, 28x28x1": Arch(builder="small_cnn", input_shape=(1, 28, 28), classes=10),
    "WRN-10-1, 32x32x3": Arch(builder="wrn", options=_WRN, input_shape=(3, 32, 32), classes=10),
    "mobilenet, 32x32x3": Arch(builder="mobilenet", input_shape=(3, 32, 32), classes=10),
}
_BATCH, _ROUNDS = 64, 5


def main() -> None:
    torch.set_num_threads(1)
    print(f"bf16 arithmetic on this processor: {native(torch.device('cpu'))}; batch {_BATCH}, 1 thread")
    print(f"{'':20s} {'recipe':8s} " + " ".join(f"{mode:>20s}" for mode in _MODES) + "  images/s")
    for name, arch in _NETS.items():
        nets = {mode: prepare(initial(arch, 0).train(), mode) for mode in _MODES}
        for recipe in (Natural(), NoisyFGSM()):
            best = dict.fromkeys(_MODES, float("inf"))
            for _ in range(_ROUNDS):
                for mode, net in nets.items():
                    best[mode] = min(best[mode], _seconds(net, recipe, arch))
            row = " ".join(f"{_BATCH / best[mode]:20,.0f}" for mode in _MODES)
            print(f"{name:20s} {recipe.kind:8s} {row}", flush=True)


def _seconds(net: torch.nn.Module, recipe: Recipe, arch: Arch) -> float:
    rng = generator(0)
    x = torch.rand((_BATCH, *arch.input_shape), generator=rng)
    y = torch.randint(0, 10, (_BATCH,), generator=rng)
    start = time.process_time()
    value, _ = recipe.loss(net, x, y, Threat(norm="linf", eps=8 / 255), rng, 0.0)
    value.backward()  # type: ignore[no-untyped-call]
    return time.process_time() - start


if __name__ == "__main__":
    main()
