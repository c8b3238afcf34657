"""An MNIST network of ours trained for proofs: what each method proves of it, in the order that theory demands.

    TEMPER_DATA=../shared/data OMP_NUM_THREADS=1 python -m benchmarks.certified_mnist --images 500

Two networks of one architecture (Wong and Kolter 2018, small), trained by interval bounds: for eps 0.1 at 0.15, for eps
0.3 at 0.35; trained once, then read from runs/benchmarks/certified. IBP, CROWN-IBP and CROWN judge every image that is
read rightly; alpha-CROWN and branch and bound, whose answers are never below CROWN's, those that CROWN leaves open
and 20 of the others. The order must hold image by image: what IBP proves CROWN-IBP proves, and so on to branch and
bound, and nothing that is proved is broken; where it does not the status is 1. Of CROWN-IBP and CROWN it is expected
rather than proved: CROWN only tightens boxes, but its slopes may turn with them.
"""

import argparse
import os
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.attack_nets import ARCH, interval_loss
from pipeline.core.measurement import wilson
from stages.attacks.pgd import PGD
from stages.bounds.alpha_crown import AlphaCrown
from stages.bounds.base import Certifier
from stages.bounds.branch_and_bound import BranchAndBound
from stages.bounds.crown import Crown
from stages.bounds.crown_ibp import CrownIBP
from stages.bounds.ibp import IBP
from stages.evaluate import correct, frozen, under_attack
from stages.fitting.loop import fit
from stages.fitting.optim import Fit
from stages.nn import checkpoint
from stages.nn.arch import Model
from stages.nn.fold import fold
from stages.task import Splits, Task
from stages.threat import Threat
from stages.tuning import initial

FOLDER = Path("runs/benchmarks/certified")
TRAINED_AT = {0.1: 0.15, 0.3: 0.35}
_TRAIN, _EPOCHS = 20_000, 20
_AGAIN = 20
_PGD = PGD(steps=100, restarts=3, loss="margin")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=500, help="the first N test images (500)")
    parser.add_argument("--seconds", type=float, default=30.0, help="of branch and bound, for each image (30)")
    parser.add_argument("--batch", type=int, default=25, help="images in one call of a certifier (25)")
    parser.add_argument("--eps", default="0.1,0.3", metavar="E,...", help="of 0.1 and 0.3 (both)")
    parser.add_argument("--dear", default="alpha_crown,branch_and_bound", metavar="NAME,...", help="of these (both)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    complete = BranchAndBound(seconds=args.seconds)
    dear = [method for method in (AlphaCrown(), complete) if method.kind in args.dear.split(",")]
    sound = [_rows(float(eps), args.images, dear, args.batch) for eps in args.eps.split(",")]
    raise SystemExit(0 if all(sound) else 1)


def data() -> Splits:
    """MNIST under the folder that TEMPER_DATA names."""
    root = Path(os.environ.get("TEMPER_DATA", "../shared/data"))
    return Task.load({"data": {"kind": "mnist"}, "threat": {"norm": "linf", "eps": 0.1}}).open(root)


def net(eps: float) -> nn.Module:
    """The network for one eps, trained where it is not stored yet."""
    folder = FOLDER / f"{eps:g}"
    if not (folder / checkpoint.WEIGHTS).is_file():
        split, start = data().train, time.process_time()
        settings = {"epochs": _EPOCHS, "batch": 100, "optimiser": "adam", "lr": 1e-3, "weight_decay": 0.0}
        config = Fit.load({**settings, "precision": "fp32"})
        made = fit(
            initial(ARCH, 0), split.images[:_TRAIN], split.labels[:_TRAIN], interval_loss(TRAINED_AT[eps]), config, 0
        )
        folder.mkdir(parents=True, exist_ok=True)
        checkpoint.save(Model(ARCH, made), folder)
        spent = time.process_time() - start
        print(f"trained at eps {TRAINED_AT[eps]:g} on {_TRAIN} images for {_EPOCHS} epochs: {spent:.0f} s")
    return fold(checkpoint.load(folder / checkpoint.ARCH, folder / checkpoint.WEIGHTS).net.eval())


def _rows(eps: float, images: int, dear: Sequence[Certifier], batch: int) -> bool:
    test, threat = data().test, Threat(norm="linf", eps=eps)
    x, y = test.floats(slice(0, images)), test.labels[:images]
    with frozen(net(eps)) as model:
        print(f"\neps {eps:g}\n| | share | 95 % | of {len(x)} | asked about | CPU s | s each |\n{'| --- ' * 7}|")
        start = time.process_time()
        right = correct(model, x, y)
        _print("clean", right, time.process_time() - start, len(x))
        start = time.process_time()
        held, _ = under_attack(model, _PGD, x, y, threat, 0)
        _print(f"PGD, {_PGD.steps} steps x {_PGD.restarts}", held, time.process_time() - start, int(right.sum()))
        IBP().margins(model, x[:1], y[:1], threat)  # the network is followed once, which is not IBP's to pay
        chain: list[tuple[str, Tensor]] = []
        cheap: tuple[Certifier, ...] = (IBP(), CrownIBP(), Crown())
        for method in cheap:
            proved, spent = _proved(model, x, y, right, threat, method, batch)
            _print(method.kind, proved, spent, int(right.sum()))
            chain.append((method.kind, proved))
        by_crown = chain[-1][1]
        asked = right & ~by_crown
        asked[by_crown.nonzero().flatten()[:_AGAIN]] = True
        for method in dear:
            proved, spent = _proved(model, x, y, asked, threat, method, batch)
            _print(method.kind, proved | (by_crown & ~asked), spent, int(asked.sum()))
            chain.append((method.kind, proved | (by_crown & ~asked)))
    unsettled = held & ~chain[-1][1]
    print(f"neither proved nor broken: {int(unsettled.sum())} of {len(x)}")
    wrong = [
        f"{int((first & ~second).sum())} images that {one} has, {other} has not"
        for (one, first), (other, second) in pairwise((*chain, ("PGD", held)))
        if bool((first & ~second).any())
    ]
    print("; ".join(wrong) or "the order holds for every image")
    return not wrong


def _proved(
    model: nn.Module, x: Tensor, y: Tensor, asked: Tensor, threat: Threat, method: Certifier, batch: int
) -> tuple[Tensor, float]:
    proved, rows = torch.zeros_like(asked), asked.nonzero().flatten()
    start = time.process_time()
    for part in rows.split(batch):
        with torch.no_grad():
            proved[part] = method.margins(model, x[part], y[part], threat) > 0
    return proved, time.process_time() - start


def _print(name: str, hits: Tensor, seconds: float, over: int) -> None:
    count, total = int(hits.sum()), len(hits)
    low, high = wilson(count, total)
    cells = (name, f"{count / total:.3f}", f"[{low:.3f}, {high:.3f}]", str(count), str(over), f"{seconds:.1f}")
    print(f"| {' | '.join(cells)} | {seconds / over:.2g} |", flush=True)


if __name__ == "__main__":
    main()
