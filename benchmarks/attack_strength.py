"""What each attack finds on an adversarially trained network, and what it finds for the same money as PGD.

    TEMPER_DATA=../shared/data OMP_NUM_THREADS=1 python -m benchmarks.attack_strength --images 100 --net relu

The network is `small_cnn`, or the same with SiLU for ReLU, trained here as the preset mnist03 trains (PGD-5 at linf
0.3, 12,000 images); weights are kept in runs/attack_strength/*.safetensors. Images are the first N of MNIST's test
part. The four members of the standard ensemble strike every image at their reference settings, so that the ensemble is
what all four of them leave.
"""

import argparse
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pipeline.core.measurement import wilson
from stages.attacks.ai_gan import AIGAN
from stages.attacks.apgd import APGD
from stages.attacks.base import Attack
from stages.attacks.fab import FAB
from stages.attacks.fgsm import FGSM
from stages.attacks.hidden import Hidden
from stages.attacks.krylov import Krylov
from stages.attacks.latent import Latent
from stages.attacks.pgd import PGD
from stages.attacks.square import Square
from stages.evaluate import correct, under_attack
from stages.finding import binomial_tail
from stages.fitting.optim import Fit
from stages.nn.arch import Arch
from stages.oracle import Oracle
from stages.recipes.at import AdversarialTraining
from stages.seeding import generator
from stages.task import Splits, Task, statistics
from stages.threat import Threat
from stages.tuning import initial, tune

THREAT = Threat(norm="linf", eps=0.3)
CACHE = Path("runs/attack_strength")
SEED = 0

ATTACKS: dict[str, Attack] = {
    "fgsm": FGSM(),
    "pgd, ce, 20 steps": PGD(steps=20),
    "pgd, margin, 20 steps": PGD(steps=20, loss="margin"),
    "apgd, ce, 100 steps": APGD(steps=100),
    "apgd, dlr at 9 targets, 100 steps": APGD(steps=100, loss="dlr", targets=9),
    "fab at 9 targets, 100 steps": FAB(steps=100, targets=9),
    "square, 5,000 queries": Square(queries=5000, stretch=False),
    "krylov, exact": Krylov(),
    "krylov, secant": Krylov(curvature="secant"),
    "hidden, all goals, margin steps after": Hidden(),
    "hidden, joint alone": Hidden(goals=("joint",), steps=20, finish=0),
    "hidden, disrupt alone": Hidden(goals=("disrupt",), steps=20, finish=0),
    "hidden, imitate alone": Hidden(goals=("imitate",), steps=20, finish=0),
    "latent": Latent(),
    "ai_gan, 1 target": AIGAN(radii=(0.3, 0.3), images=4000),
    "ai_gan, 9 targets": AIGAN(radii=(0.3, 0.3), images=4000, targets=9),
}
STANDARD = tuple(ATTACKS)[3:7]
JUDGED = tuple(name for name in ATTACKS if name.split(",")[0] in {"krylov", "hidden", "latent", "ai_gan"})


@dataclass(frozen=True)
class Run:
    """Which images survived, and what was spent on each that was attacked; passes count every forward and backward."""

    survived: Tensor
    queries: Tensor
    gradients: Tensor
    seconds: float

    @property
    def most(self) -> tuple[int, int]:
        """Gradients, and passes (queries and gradients), of the example that cost most: one that was not broken."""
        return int(self.gradients.max()), int((self.queries + self.gradients).max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--net", choices=("relu", "silu"), action="append")
    options = parser.parse_args()
    torch.set_num_threads(1)
    splits = _open()
    x, y = splits.test.floats(slice(0, options.images)), splits.test.labels[: options.images]
    for name in options.net or ("relu", "silu"):
        net = _network(name, splits)
        right = correct(net, x, y)
        print(f"\n{name}: first {len(x)} test images, linf 0.3, seed {SEED}; clean {_share(right)}\n", flush=True)
        runs = _table(net, splits, x, y, right)
        _judge(net, x, y, right, runs)


def _table(net: nn.Module, splits: Splits, x: Tensor, y: Tensor, right: Tensor) -> dict[str, Run]:
    runs: dict[str, Run] = {}
    taught: dict[str, Attack] = {}
    for name, attack in ATTACKS.items():
        if attack.kind not in taught:
            taught[attack.kind], spent = _prepared(net, splits, attack)
            if spent:
                print(f"{attack.kind}: {spent}", flush=True)
        # What is learnt does not depend on how many targets a strike tries.
        ready = taught[attack.kind].model_copy(update=dict(attack)) if isinstance(attack, AIGAN | Latent) else attack
        runs[name] = _run(net, ready, x, y)
        print(f"# {name}: {runs[name].seconds:.1f} s", file=sys.stderr, flush=True)
    broken = {name: right & ~run.survived for name, run in runs.items()}
    standard = torch.stack([broken[name] for name in STANDARD]).any(0)
    print("\n| attack | robust | gradients | queries | seconds | missed by pgd, margin | by standard | by all others |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for name, run in runs.items():
        others = torch.stack([rows for other, rows in broken.items() if other != name]).any(0)
        new = [broken[name] & ~other for other in (broken["pgd, margin, 20 steps"], standard, others)]
        spent = [float(amount[right].double().mean()) for amount in (run.gradients, run.queries)]
        row = [_share(run.survived), *(f"{amount:.0f}" for amount in spent), f"{run.seconds:.1f}"]
        print(f"| {name} | {' | '.join(row)} | {' | '.join(str(int(rows.sum())) for rows in new)} |")
    together = torch.stack(list(broken.values())).any(0)
    for name, rows in (("standard ensemble", standard), ("all together", together)):
        print(f"| {name} | {_share(right & ~rows)} | | | | | {int((rows & ~standard).sum())} | |", flush=True)
    return runs


def _judge(net: nn.Module, x: Tensor, y: Tensor, right: Tensor, runs: dict[str, Run]) -> None:
    """Each of ours beside PGD with as many gradients for an unbroken example, or as many passes where it uses none.

    p is that of the two-sided exact McNemar test against PGD on the margin.
    """
    head = ["attack", "gradients, passes", "robust", "pgd of equal cost", "ce", "margin"]
    print(f"\n| {' | '.join([*head, 'broken by pgd, margin, alone', 'by it alone', 'p'])} |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for name in JUDGED:
        gradients, passes = runs[name].most
        steps = gradients or max(1, passes // 2)
        restarts = max(1, round(steps / 20))
        plain = {
            loss: _run(net, PGD.load({"steps": steps // restarts, "restarts": restarts, "loss": loss}), x, y)
            for loss in ("ce", "margin")
        }
        mine, other = runs[name].survived, plain["margin"].survived
        only_pgd, only_mine = int((mine & ~other & right).sum()), int((other & ~mine & right).sum())
        p = min(1.0, 2 * binomial_tail(max(only_pgd, only_mine), only_pgd + only_mine))
        print(
            f"| {name} | {gradients}, {passes} | {_share(mine)} | {restarts} x {steps // restarts} steps | "
            f"{_share(plain['ce'].survived)} | {_share(other)} | {only_pgd} | {only_mine} | {p:.2g} |",
            flush=True,
        )


def _run(net: nn.Module, attack: Attack, x: Tensor, y: Tensor) -> Run:
    oracle, start = Oracle.of(net, len(x)), time.process_time()
    survived, _ = under_attack(oracle, attack, x, y, THREAT, SEED)
    return Run(survived, oracle.spent.queries, oracle.spent.gradients, time.process_time() - start)


def _prepared(net: nn.Module, splits: Splits, attack: Attack) -> tuple[Attack, str]:
    """The attack, taught on the training images; what that cost, in words, where it cost anything."""
    passes = 0

    def counted(batch: Tensor) -> Tensor:
        nonlocal passes
        passes += len(batch) * (1 + int(torch.is_grad_enabled()))
        z: Tensor = net(batch)
        return z

    train, start = splits.train, time.process_time()
    data = ((train.floats(slice(at, at + 256)), train.labels[at : at + 256]) for at in range(0, len(train), 256))
    ready = attack.prepare(counted, data, generator(SEED, "prepare", attack.kind))
    seconds = time.process_time() - start
    return ready, f"prepared in {seconds:.0f} s, {passes:,} passes" if passes else ""


def _share(rows: Tensor) -> str:
    low, high = wilson(int(rows.sum()), len(rows))
    return f"{float(rows.double().mean()):.3f} [{low:.3f}, {high:.3f}]"


def _open() -> Splits:
    task = Task.load({"data": "mnist", "threat": THREAT.dump(), "train_samples": 12_000, "holdout": 0.05})
    return task.open(Path(os.environ["TEMPER_DATA"]))


def _network(name: str, splits: Splits) -> nn.Module:
    """Trained, or read from where it was kept."""
    mean, std = statistics(splits.train)
    arch = Arch(builder="small_cnn", input_shape=(1, 28, 28), classes=10, mean=mean, std=std)
    net = initial(arch, 0)
    if name == "silu":
        for path, module in list(net.named_modules()):
            if isinstance(module, nn.ReLU):
                net.set_submodule(path, nn.SiLU())
    kept = CACHE / f"{name}.safetensors"
    if not kept.exists():
        recipe, fit = AdversarialTraining(steps=5, step=0.4, ramp=0.6), Fit(lr=0.03, epochs=15)
        net = tune(net, recipe, fit, splits.train, THREAT, 0, CACHE / "fit" / name)
        CACHE.mkdir(parents=True, exist_ok=True)
        save_file({key: value.contiguous() for key, value in net.state_dict().items()}, kept)
    net.load_state_dict(load_file(kept))
    return net.eval().requires_grad_(False)


if __name__ == "__main__":
    main()
