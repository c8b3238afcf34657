"""The standard ensemble beside pyautoattack, torchattacks and Foolbox on the same networks and images, in one run.

    pip install --no-deps pyautoattack foolbox torchattacks eagerpy
    TEMPER_DATA=../shared/data OMP_NUM_THREADS=1 python -m benchmarks.attacks [--images 200] [--nets plain,certified]

Every row runs in a process of its own, one after the other, on one thread: CPU seconds (user and system) of the attack
alone, what share of them the network's own passes take, how many passes an image went through forward and backward,
and by how much the process grew. Robust sets are compared image by image with pyautoattack's. "exact" leaves out what
interval bounds prove: images, and target classes; "no shortcuts" attacks everything. Ours attack as `audit` does:
gradients from the folded torch twin, answers from its ONNX file; making those two is on no clock. A second table is of
a gate's verdict before all images have one, a third sets the cost of one iteration against one forward and one backward
pass of the same twin. Peers that are not installed are left out, and said to be.
"""

import argparse
import contextlib
import importlib
import importlib.util
import io
import json
import resource
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.attack_nets import NAMES, THREAT, data, net
from benchmarks.attack_rows import (
    BATCH,
    CONFIDENCE,
    EXACT,
    LIMIT,
    NEEDS,
    REFERENCE,
    ROWS,
    SEED,
    Clock,
    Verdict,
    gate,
    ours,
    proved,
    theirs,
)
from stages.attacks.apgd import APGD
from stages.attacks.base import Attack
from stages.attacks.fab import FAB
from stages.attacks.pgd import PGD
from stages.attacks.square import Square
from stages.evaluate import correct
from stages.nn._torchvision import torchvision
from stages.seeding import generator
from stages.threat import Threat

OUT = Path("runs/benchmarks/attacks.json")
GATE = "ours, a gate's verdict"
_STEPS = "-"
ITERATIONS: dict[str, tuple[Attack, int, bool]] = {
    "PGD": (PGD(steps=20), 21, True),
    "APGD-CE": (APGD(steps=20), 21, True),
    "APGD-T": (APGD(steps=20, loss="dlr", targets=1), 21, True),
    "FAB-T": (FAB(steps=20, targets=1), 20, True),
    "Square": (Square(queries=200, stretch=False), 200, False),
}
"""Attack, how often it asks the network, and whether it asks for gradients."""

Result = dict[str, Any]


def images(count: int) -> tuple[Tensor, Tensor]:
    """The first test images, float [N, 1, 28, 28], and their labels."""
    test = data().test
    return test.floats(slice(0, count)), test.labels[:count]


def measure(name: str, kind: str, count: int) -> Result:
    """One row, in this process."""
    torch.set_num_threads(1)
    x, y = images(count)
    clock = (ours if name.startswith("ours") else theirs)(net(kind))
    _warm(name, clock, x, y)
    row: Callable[[Clock, Tensor, Tensor], Tensor | Verdict] = gate if name == GATE else ROWS[name]
    clock.seconds, clock.forward, clock.backward = 0.0, 0, 0
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        found = row(clock, x, y)
    seconds = time.process_time() - start
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    spent = {"seconds": seconds, "own": clock.seconds / seconds, "grown": grown}
    passes = {"forward": clock.forward / count, "backward": clock.backward / count}
    said = asdict(found) if isinstance(found, Verdict) else {"robust": found.tolist()}
    return {**said, **spent, **passes}


def _warm(name: str, clock: Clock, x: Tensor, y: Tensor) -> None:
    """Imports and first passes, which no row pays for."""
    if name in NEEDS:
        torchvision()
        importlib.import_module(NEEDS[name])
    else:
        proved(clock.net, x[:1], y[:1])
    correct(clock, x, y)


def iterations(kind: str, count: int) -> dict[str, float]:
    """CPU time per question over that of the bare passes on the same batch, nobody leaving; best of interleaved rounds.

    All on the torch twin. pyautoattack's APGD on cross-entropy stands beside ours, where it is installed.
    """
    torch.set_num_threads(1)
    twin = ours(net(kind)).net
    x, y = images(count)
    x = x[correct(twin, x, y)]
    with torch.no_grad():
        y = twin(x).argmax(1)
    still = Threat(norm="linf", eps=1e-6)

    def strike(attack: Attack) -> Callable[[], object]:
        return lambda: attack.perturb(twin, x, y, still, generator(SEED))

    tasks = {name: strike(attack) for name, (attack, _, _) in ITERATIONS.items()}
    counts = {name: (asks, slopes) for name, (_, asks, slopes) in ITERATIONS.items()}
    if importlib.util.find_spec("pyautoattack"):
        from pyautoattack.autopgd_base import APGDAttack

        peer = APGDAttack(twin, n_iter=20, norm="Linf", eps=still.eps, seed=SEED, device="cpu")
        tasks["pyautoattack's APGD-CE"], counts["pyautoattack's APGD-CE"] = lambda: peer.perturb(x, y), (21, True)
    floors = {True: lambda: _slopes(twin, x), False: lambda: _answers(twin, x)}
    best: dict[str | bool, float] = {}
    for _ in range(5):
        for task, run, times in [
            *((name, run, 1) for name, run in tasks.items()),
            *((k, v, 10) for k, v in floors.items()),
        ]:
            start = time.process_time()
            for _ in range(times):
                run()
            best[task] = min(best.get(task, float("inf")), (time.process_time() - start) / times)
    return {name: best[name] / asks / best[slopes] for name, (asks, slopes) in counts.items()}


def _slopes(net: Callable[[Tensor], Tensor], x: Tensor) -> None:
    point = x.clone().requires_grad_()
    torch.autograd.grad(net(point).sum(), point)


def _answers(net: Callable[[Tensor], Tensor], x: Tensor) -> None:
    with torch.no_grad():
        net(x)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--nets", default=",".join(NAMES))
    parser.add_argument("--rows", default=";".join([GATE, *ROWS]), help="names of rows, separated by semicolons")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    kinds = options.nets.split(",")
    if options.one:
        one = iterations if options.one == _STEPS else lambda kind, count: measure(options.one, kind, count)
        print(json.dumps(one(kinds[0], options.images)))
        return
    for kind in kinds:
        net(kind)
    wanted = [row for row in options.rows.split(";") if _installed(row)]
    steps = {kind: _apart(_STEPS, kind, options.images) for kind in kinds}
    results: dict[str, dict[str, Result]] = {kind: {} for kind in kinds}
    for row in wanted:
        for kind in kinds:
            results[kind][row] = _apart(row, kind, options.images)
            settings = {"images": options.images, "seed": SEED, "batch": BATCH, "threat": THREAT.dump()}
            OUT.write_text(json.dumps({**settings, "nets": results, "steps": steps}))
    print("\n\n".join([table(results), gate_table(results), step_table(steps)]))


def _installed(row: str) -> bool:
    there = row not in NEEDS or importlib.util.find_spec(NEEDS[row]) is not None
    if not there:
        print(f"{row}: left out, {NEEDS[row]} is not installed", flush=True)
    return there


def _apart(row: str, kind: str, count: int) -> Result:
    command = [sys.executable, "-m", "benchmarks.attacks", "--one", row, "--nets", kind, "--images", str(count)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{row} on {kind} failed:\n{done.stderr}")
    result: Result = json.loads(done.stdout.splitlines()[-1])
    print(f"# {kind}: {row}: {result.get('seconds', 0):.1f} s", file=sys.stderr, flush=True)
    return result


def table(results: dict[str, dict[str, Result]]) -> str:
    """Robust accuracy, which images differ from pyautoattack, CPU seconds and their ratio, and where they went."""
    head = ["net", "attack", "robust", "also broken", "not broken", "CPU s", "ratio", "own passes"]
    head += ["forward", "backward", "MiB"]
    lines = [_line(head), _line(["---"] * len(head))]
    for kind, rows in results.items():
        reference = rows.get(REFERENCE)
        lines += [_line([kind, name, *_cells(one, reference)]) for name, one in rows.items() if name != GATE]
    sums = {row: sum(rows[row]["seconds"] for rows in results.values()) for row in next(iter(results.values()))}
    for row, seconds in sums.items():
        ratio = f"{seconds / sums[REFERENCE]:.2f}" if REFERENCE in sums else ""
        lines.append(_line(["all", row, "", "", "", f"{seconds:.1f}", ratio, "", "", "", ""]))
    return "\n".join(lines)


def _cells(one: Result, reference: Result | None) -> list[str]:
    mine, theirs = one["robust"], (reference or one)["robust"]
    also = [str(i) for i, (a, b) in enumerate(zip(mine, theirs, strict=True)) if b and not a]
    left = [str(i) for i, (a, b) in enumerate(zip(mine, theirs, strict=True)) if a and not b]
    return [
        f"{sum(mine) / len(mine):.3f}",
        *(" ".join(which) if len(which) <= 6 else f"{len(which)} images" for which in (also, left)),
        *_costs(one, reference),
        f"{one['grown']:.0f}",
    ]


def _costs(one: Result, reference: Result | None) -> list[str]:
    ratio = f"{one['seconds'] / reference['seconds']:.2f}" if reference else ""
    return [f"{one['seconds']:.1f}", ratio, f"{one['own']:.0%}", f"{one['forward']:.0f}", f"{one['backward']:.0f}"]


def gate_table(results: dict[str, dict[str, Result]]) -> str:
    """The verdict, beside the one that exact mode's robust accuracy gives when every image has its own."""
    head = [f"net, gate at {LIMIT:g}, {CONFIDENCE:.0%}", "needed", "stand", "open", "verdict", "of all images"]
    lines = [_line([*head, "CPU s", "ratio", "own passes", "forward", "backward"]), _line(["---"] * 11)]
    for kind, rows in results.items():
        if GATE in rows:
            one, full = rows[GATE], rows.get(EXACT)
            said = [str(one["needed"]), f"{one['low']} to {one['high']}", str(one["open"]), _verdict(one["met"])]
            true = _verdict(sum(full["robust"]) >= one["needed"]) if full else ""
            lines.append(_line([kind, *said, true, *_costs(one, rows.get(REFERENCE))]))
    return "\n".join(lines)


def _verdict(met: bool) -> str:
    return "passed" if met else "refused"


def step_table(steps: dict[str, dict[str, float]]) -> str:
    """Rows are attacks, columns networks."""
    kinds = list(steps)
    lines = [_line(["one iteration, in bare passes", *kinds]), _line(["---"] * (1 + len(kinds)))]
    names = next(iter(steps.values()))
    return "\n".join([*lines, *(_line([name, *(f"{steps[kind][name]:.2f}" for kind in kinds)]) for name in names)])


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
