"""Expected tight bounds (ETB) beside interval bounds (IBP): how much narrower they are, and how often they are wrong.

    TEMPER_DATA=../shared/data OMP_NUM_THREADS=1 python -m benchmarks.etb --images 50 --blocks 5

The plainly trained network of `attack_nets` and the two of `certified_mnist`, the first MNIST test images, all nine
leads z_y - z_k of each. The range that is known to be reached comes from random corners, random points and sign
steps up and down every lead by itself; the true range can only be wider, so a violation that is counted is certain
and one that is not may still be there. "IBP / ETB" and "ETB / reached" are medians of ratios of widths.
"""

import argparse
import time

import torch
from torch import Tensor, nn

from benchmarks import attack_nets, certified_mnist
from stages.bounds.base import Box, lead_rows
from stages.bounds.crown import Crown
from stages.bounds.etb import ETB
from stages.bounds.ibp import IBP
from stages.evaluate import frozen
from stages.nn.fold import fold
from stages.seeding import generator
from stages.threat import Threat

_STEPS, _RANDOM, _BATCH = 10, 100, 50
_NETS = ("plain", "certified_0.1", "certified_0.3")
_HEAD = (
    "net", "eps", "form", "IBP / ETB", "CROWN / ETB", "ETB / reached", "leads that leave it", "images with one",
    "images called robust", "of these broken", "proved by CROWN", "ETB s", "IBP s",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100, help="the first N test images (100)")
    parser.add_argument("--blocks", type=int, default=10, help="of these for the block-wise form, which is slow (10)")
    parser.add_argument("--nets", default=",".join(_NETS), metavar="NAME,...", help=f"of {', '.join(_NETS)} (all)")
    parser.add_argument("--eps", default="0.02,0.1", metavar="E,...", help="radii (0.02,0.1)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    test = certified_mnist.data().test
    x, y = test.floats(slice(0, args.images)), test.labels[: args.images]
    print("| " + " | ".join(_HEAD) + " |\n" + "| --- " * len(_HEAD) + "|")
    for name in args.nets.split(","):
        with frozen(_net(name)) as model:
            right = model(x).argmax(1) == y
            for eps in map(float, args.eps.split(",")):
                _row(name, model, x[right], y[right], eps, ETB())
                _row(name, model, x[right][: args.blocks], y[right][: args.blocks], eps, ETB(form="blocks"))


def _net(name: str) -> nn.Module:
    kind, _, eps = name.partition("_")
    return certified_mnist.net(float(eps)) if eps else fold(attack_nets.net(kind))


def _row(name: str, net: nn.Module, x: Tensor, y: Tensor, eps: float, method: ETB) -> None:
    threat, parts, seconds = Threat(norm="linf", eps=eps), [], [0.0, 0.0]
    for at in range(0, len(x), _BATCH):
        box, rows = Box.around(x[at : at + _BATCH], threat), lead_rows(net, x[at : at + _BATCH], y[at : at + _BATCH])
        start = time.process_time()
        low, high = method.estimate(net, box, rows)
        seconds[0] += time.process_time() - start
        start = time.process_time()
        ibp = _both(IBP(), net, box, rows)
        seconds[1] += time.process_time() - start
        crown = _both(Crown(), net, box, rows)
        parts.append(torch.stack([low, high, *ibp, *crown, *_reached(net, box, rows)]))
    low, high, ibp_low, ibp_high, crown_low, crown_high, least, most = torch.cat(parts, 1)
    for sound_low, sound_high in ((ibp_low, ibp_high), (crown_low, crown_high)):
        if bool((least < sound_low).any()) or bool((most > sound_high).any()):
            raise SystemExit(f"{name}, eps {eps:g}: a point lies outside sound bounds; this is a bug")
    width = high - low
    outside = (least < low) | (most > high)
    called = (low > 0).all(1)
    cells = [
        name,
        f"{eps:g}",
        method.form,
        f"{float(((ibp_high - ibp_low) / width).median()):.3g}",
        f"{float(((crown_high - crown_low) / width).median()):.3g}",
        f"{float((width / (most - least)).median()):.3g}",
        f"{int(outside.sum())} of {outside.numel()}",
        f"{int(outside.any(1).sum())} of {len(outside)}",
        f"{int(called.sum())}",
        f"{int((called & (least < 0).any(1)).sum())}",
        f"{int((crown_low > 0).all(1).sum())}",
        *(f"{spent:.1f}" for spent in seconds),
    ]
    print("| " + " | ".join(cells) + " |", flush=True)


def _both(certifier: IBP | Crown, net: nn.Module, box: Box, rows: Tensor) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        found = certifier.lower(net, box, torch.cat([rows, -rows], 1)).double()
    return found[:, : rows.shape[1]], -found[:, rows.shape[1] :]


def _reached(net: nn.Module, box: Box, rows: Tensor) -> tuple[Tensor, Tensor]:
    """[B, R] each: the least and the largest lead that was met, in float64."""
    rng, span = generator(0, "etb"), box.high - box.low
    least = torch.full(rows.shape[:2], float("inf"), dtype=torch.float64)
    most = -least

    def met(point: Tensor) -> None:
        nonlocal least, most
        with torch.no_grad():
            leads = torch.einsum("brk,bk->br", rows.double(), net(point).double())
        least, most = torch.minimum(least, leads), torch.maximum(most, leads)

    for i in range(_RANDOM):
        share = torch.rand(box.low.shape, generator=rng)
        met((box.low + span * (share.round() if i % 2 else share)).clamp(box.low, box.high))
    for r in range(rows.shape[1]):
        for sign in (-1.0, 1.0):
            point = (box.low + box.high) / 2
            for step in range(_STEPS):
                point = point.detach().requires_grad_()
                with torch.enable_grad():
                    (slope,) = torch.autograd.grad(torch.einsum("bk,bk->", rows[:, r], net(point)), point)
                size = span * (0.5 if step < 3 else 0.15)
                point = (point.detach() + sign * size * slope.sign()).clamp(box.low, box.high)
                met(point)
    return least, most


if __name__ == "__main__":
    main()
