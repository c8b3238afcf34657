"""What `verify-spec` answers on networks in the competition's forms, against what is known of each instance.

    TEMPER_DATA=../shared/data OMP_NUM_THREADS=1 python -m benchmarks.verify_spec [--timeout 60] [--families a,b]

Every network is asked, over its box, whether a value v of the outputs can be as large as t: an output, or what one
output has over another. A search from other starts than the command's, longer than its own (`--search` seconds), finds
the largest value v*; v0 is the median at random points. What is asked:

    sat     t = v* - 0.05 (v* - v0); and, harder, t = v* - 0.005 (v* - v0): the point found is a witness
    unsat   t above the bound of interval arithmetic, by a tenth of v* - v0
    open    t = v* + 0.1 (v* - v0): most likely not reached, but nobody has proved it

Trained networks of images are asked whether any other class can come out on top, at eps 1.1 and 1.5 times the smallest
at which the search found one (sat), and at half of it (open). Wrong is `unsat` where a witness is known, or `sat`
without one that onnxruntime confirms inside the box, or `sat` where the bound forbids it. One network per family and
`--seed`.
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import torch
from torch import Tensor, nn

from benchmarks import spec_nets
from benchmarks.spec_graphs import FAMILIES
from benchmarks.spec_nets import Net
from stages.bounds.base import Box
from stages.bounds.ibp import IBP
from stages.data.base import to_float
from stages.seeding import generator
from stages.task import Task
from stages.verification.model import Model

Array = npt.NDArray[np.float32]
_STARTS, _STEPS = 256, 60
_WORDS = ("sat", "unsat", "unknown")


@dataclass(frozen=True, slots=True)
class Ask:
    """One instance: its specification, and `sat`, `unsat` or `open`, as far as known."""

    name: str
    text: str
    known: str
    low: Array
    high: Array
    row: Array  # [U, K]; met where some entry of row @ y is at least its threshold
    least: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--timeout", type=float, default=60.0)
    parser.add_argument("--search", type=float, default=6.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--families", default="")
    options = parser.parse_args()
    torch.set_num_threads(1)
    makers: dict[str, Callable[[int], Net]] = {**_trained(), **FAMILIES}
    chosen = [name for name in options.families.split(",") if name] or list(makers)
    print(
        "| family | asked | sat found | unsat proved | open: sat, unsat, unknown | wrong | seconds, median and most |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- |")
    sums: dict[str, int] = defaultdict(int)
    with tempfile.TemporaryDirectory() as folder:
        for name in chosen:
            _row(name, list(_answers(Path(folder), name, makers[name](options.seed), options)), sums)
    print(
        f"\n{sums['asked']} asked; {sums['found']} of {sums['sat']} found, {sums['proved']} of {sums['unsat']} proved, "
        f"{sums['wrong']} wrong"
    )


def _trained() -> dict[str, Callable[[int], Net]]:
    return {
        "acas_xu": spec_nets.acas_xu,
        "mnist_fc": partial(spec_nets.mnist_fc, images=_digits),
        "eran_sigmoid": partial(spec_nets.eran_sigmoid, images=_digits),
    }


def _digits(seed: int) -> tuple[Array, Callable[[torch.Generator], tuple[Tensor, Tensor]]]:
    """One test image [784], and batches of training images with their labels."""
    splits = Task.model_validate({"data": {"kind": "mnist"}, "threat": {"norm": "linf", "eps": 0.1}}).open(
        Path(os.environ["TEMPER_DATA"])
    )
    x, y = to_float(splits.train.images[:10_000]).flatten(1), splits.train.labels[:10_000]

    def draw(rng: torch.Generator) -> tuple[Tensor, Tensor]:
        picked = torch.randint(len(x), (128,), generator=rng)
        return x[picked], y[picked]

    return to_float(splits.test.images[seed : seed + 1]).flatten().numpy(), draw


def _answers(folder: Path, name: str, net: Net, options: argparse.Namespace) -> Iterator[tuple[Ask, str, bool, float]]:
    path = folder / f"{name}.onnx"
    onnx.save(net.model, path)
    model = Model(path, len(net.centre))
    rng = generator(options.seed, "benchmark", name)
    asks = (
        _images(name, model, net, rng, options)
        if name in {"mnist_fc", "eran_sigmoid"}
        else _values(name, model, net, rng, options)
    )
    for ask in asks:
        spec, out = folder / f"{ask.name}.vnnlib", folder / f"{ask.name}.txt"
        spec.write_text(ask.text)
        argv = [sys.executable, "-m", "pipeline", "verify-spec", str(path), str(spec), "--witness", str(out)]
        start = time.monotonic()
        done = subprocess.run([*argv, "--timeout", str(options.timeout)], capture_output=True, text=True, check=False)
        seconds = time.monotonic() - start
        word = done.stdout.strip()
        good = word in _WORDS and not (word == "unsat" and ask.known == "sat")
        good &= word != "sat" or (ask.known != "unsat" and _holds(model, ask, out))
        said = done.stderr.strip().splitlines()[-1] if done.stderr else ""
        print(f"{ask.name} ({ask.known}): {word} after {seconds:.1f} s; {said[:200]}", file=sys.stderr, flush=True)
        yield ask, word, good, seconds


def _row(name: str, answers: list[tuple[Ask, str, bool, float]], sums: dict[str, int]) -> None:
    by: dict[tuple[str, str], int] = defaultdict(int)
    for ask, word, good, _ in answers:
        by[ask.known, word] += 1
        by["wrong", ""] += not good
    sat, unsat = (sum(ask.known == known for ask, *_ in answers) for known in ("sat", "unsat"))
    times = [seconds for *_, seconds in answers]
    open_ = ", ".join(str(by["open", word]) for word in _WORDS)
    print(
        f"| {name} | {len(answers)} | {by['sat', 'sat']} of {sat} | {by['unsat', 'unsat']} of {unsat} | {open_} "
        f"| {by['wrong', '']} | {statistics.median(times):.1f}, {max(times):.1f} |",
        flush=True,
    )
    for key, value in (
        ("asked", len(answers)),
        ("sat", sat),
        ("found", by["sat", "sat"]),
        ("unsat", unsat),
        ("proved", by["unsat", "unsat"]),
        ("wrong", by["wrong", ""]),
    ):
        sums[key] += value


def _values(name: str, model: Model, net: Net, rng: torch.Generator, options: argparse.Namespace) -> Iterator[Ask]:
    low, high = net.centre - net.radius, net.centre + net.radius
    row = torch.zeros(1, model.classes)
    row[0, 0] = 1.0
    if model.classes > 1:
        row[0, 1] = -1.0
    box = torch.from_numpy(low), torch.from_numpy(high)
    with torch.no_grad():
        middle = float((model.net(_random(*box, 512, rng)) @ row.T).median())
    point = _best(model.net, *box, row, rng, options.search)
    best = _value(model, point, row)
    spread = best - middle
    above = -float(IBP().lower(model.net, Box(box[0][None], box[1][None]), -row.double()[None]))
    asks = [("easy", best - 0.05 * spread, "sat"), ("hard", best - 0.005 * spread, "sat")]
    asks += [("open", best + 0.1 * spread, "open"), ("safe", above + 0.1 * spread, "unsat")]
    for kind, least, known in asks:
        term = "Y_0" if model.classes == 1 else "(- Y_0 Y_1)"
        text = _spec(low, high, model.classes, f"(assert (>= {term} {least!r}))")
        yield Ask(f"{name}_{kind}", text, known, low, high, row.numpy(), least)


def _images(name: str, model: Model, net: Net, rng: torch.Generator, options: argparse.Namespace) -> Iterator[Ask]:
    label = int(model.outputs(net.centre).argmax())
    row = torch.eye(model.classes)[[k for k in range(model.classes) if k != label]]
    row[:, label] = -1.0
    centre = torch.from_numpy(net.centre)
    works, fails = 0.5, 0.0
    for _ in range(6):
        eps = (works + fails) / 2
        box = (centre - eps).clamp(0, 1), (centre + eps).clamp(0, 1)
        point = _best(model.net, *box, row, rng, options.search / 3, enough=0.0)
        works, fails = (eps, fails) if _value(model, point, row) >= 0 else (works, eps)
    for kind, eps, known in (("near", 1.1 * works, "sat"), ("far", 1.5 * works, "sat"), ("open", works / 2, "open")):
        low, high = (centre - eps).clamp(0, 1).numpy(), (centre + eps).clamp(0, 1).numpy()
        others = " ".join(f"(and (>= Y_{k} Y_{label}))" for k in range(model.classes) if k != label)
        yield Ask(
            f"{name}_{kind}",
            _spec(low, high, model.classes, f"(assert (or {others}))"),
            known,
            low,
            high,
            row.numpy(),
            0.0,
        )


def _best(
    net: nn.Module,
    low: Tensor,
    high: Tensor,
    row: Tensor,
    rng: torch.Generator,
    seconds: float,
    enough: float = torch.inf,
) -> Array:
    """The point of the largest value that descents with Adam from random points and corners met in the time."""
    end, best, found = time.monotonic() + seconds, -torch.inf, (low + high) / 2
    while time.monotonic() < end and best < enough:
        share = torch.rand(_STARTS, len(low), generator=rng)
        share[::4] = share[::4].round()
        share.requires_grad_()
        optimiser = torch.optim.Adam([share], 0.03)
        for _ in range(_STEPS):
            x = low + share.clamp(0, 1) * (high - low)
            value = (net(x) @ row.T).amax(1)
            top, place = value.detach().nan_to_num(-torch.inf).max(0)
            if float(top) > best:
                best, found = float(top), x[place].detach().clamp(low, high)
            optimiser.zero_grad()
            (-value.sum()).backward()
            optimiser.step()
            with torch.no_grad():
                share.clamp_(0, 1)
            if time.monotonic() > end or best >= enough:
                break
    return found.numpy()


def _random(low: Tensor, high: Tensor, count: int, rng: torch.Generator) -> Tensor:
    return low + torch.rand(count, len(low), generator=rng) * (high - low)


def _value(model: Model, x: Array, row: Tensor) -> float:
    return float((torch.from_numpy(model.outputs(x)).double() @ row.T.double()).max())


def _spec(low: Array, high: Array, outputs: int, unsafe: str) -> str:
    lines = [f"(declare-const X_{i} Real)" for i in range(len(low))] + [
        f"(declare-const Y_{k} Real)" for k in range(outputs)
    ]
    for i, (a, b) in enumerate(zip(low.tolist(), high.tolist(), strict=True)):
        lines += [f"(assert (<= X_{i} {b!r}))", f"(assert (>= X_{i} {a!r}))"]
    return "\n".join([*lines, unsafe, ""])


def _holds(model: Model, ask: Ask, out: Path) -> bool:
    """Whether the witness lies in the box, and onnxruntime's answer to it is what was asked for."""
    found = re.findall(r"\(X_\d+ ([^)]+)\)", out.read_text()) if out.is_file() else []
    x = np.array([float(value) for value in found])
    if x.shape != ask.low.shape or (x != x.astype(np.float32)).any() or (x < ask.low).any() or (x > ask.high).any():
        return False
    return bool((ask.row.astype(np.float64) @ model.outputs(x.astype(np.float32))).max() >= ask.least)


if __name__ == "__main__":
    main()
