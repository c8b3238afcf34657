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

    TEMPER_DATA=../shared/data OMP_NUM_THREADS=1 python -m benchmarks.verify_spec --trained [--timeout 60]

asks networks that are trained for minutes (once, then kept in runs/benchmarks/specs) about images at fixed eps, and
about costs of encounters: what is true nobody knows. Wrong is `unsat` where a search of `--search` seconds afterwards
finds a witness, or `sat` without one that onnxruntime confirms. A family without its data is skipped, with the reason.
"""

import argparse
import os
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import torch
from torch import Tensor

from benchmarks import spec_convs, spec_nets, spec_trained
from benchmarks.spec_command import WORDS, Said, best, put
from benchmarks.spec_family import Families, Family
from benchmarks.spec_graphs import FAMILIES
from benchmarks.spec_nets import Net
from stages.bounds.base import Box
from stages.bounds.ibp import IBP
from stages.data.base import to_float
from stages.method import InputError
from stages.seeding import generator
from stages.task import Task
from stages.verification.model import Model

Array = npt.NDArray[np.float32]
# Families of `--trained`; every file of them is named here, and nowhere else.
TRAINED: Families = {**spec_trained.FAMILIES, **spec_convs.FAMILIES}


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
    parser.add_argument("--trained", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    makers: dict[str, Callable[[int], Net]] = {**_trained(), **FAMILIES}
    there = list(TRAINED if options.trained else makers)
    for name in filter(None, options.families.split(",")):
        if name not in there:
            parser.error(f"--families {name}: expected some of {', '.join(there)}")
    if options.trained:
        _trained_table(options)
        return
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


def _trained_table(options: argparse.Namespace) -> None:
    chosen = [name for name in options.families.split(",") if name] or list(TRAINED)
    print("| family | asked | unsat | sat | unknown (of them met by the search) | wrong | seconds, median and most |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name in chosen:
        try:
            family = TRAINED[name]()
        except InputError as error:
            print(f"| {name} | skipped: {error} |", flush=True)
            continue
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"{name}.onnx"
            onnx.save(family.model, path)
            _trained_row(name, path, family, options)


def _trained_row(name: str, path: Path, family: Family, options: argparse.Namespace) -> None:
    words, times, met, wrong = dict.fromkeys(WORDS, 0), list[float](), 0, 0
    for question in family.questions:
        model = Model(path, len(question.low))
        said = put(path, question.name, question.text(), options.timeout)
        times.append(said.seconds)
        x = said.inside(question.low, question.high)
        if said.word != "sat":
            box = torch.from_numpy(question.low), torch.from_numpy(question.high)
            rng = generator(options.seed, "benchmark", question.name)
            x = best(model.net, *box, question.room, rng, options.search, enough=0.0)
        found = x is not None and float(question.room(torch.from_numpy(model.outputs(x)).double()[None])) >= 0
        met += said.word == "unknown" and found
        wrong += said.word not in WORDS or (said.word == "sat" and not found) or (said.word == "unsat" and found)
        words[said.word] = words.get(said.word, 0) + 1
    print(
        f"| {name} | {len(times)} | {words['unsat']} | {words['sat']} | {words['unknown']} ({met}) | {wrong} "
        f"| {statistics.median(times):.1f}, {max(times):.1f} |",
        flush=True,
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
        said = put(path, ask.name, ask.text, options.timeout)
        good = said.word in WORDS and not (said.word == "unsat" and ask.known == "sat")
        good &= said.word != "sat" or (ask.known != "unsat" and _holds(model, ask, said))
        yield ask, said.word, good, said.seconds


def _row(name: str, answers: list[tuple[Ask, str, bool, float]], sums: dict[str, int]) -> None:
    by: dict[tuple[str, str], int] = defaultdict(int)
    for ask, word, good, _ in answers:
        by[ask.known, word] += 1
        by["wrong", ""] += not good
    sat, unsat = (sum(ask.known == known for ask, *_ in answers) for known in ("sat", "unsat"))
    times = [seconds for *_, seconds in answers]
    open_ = ", ".join(str(by["open", word]) for word in WORDS)
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
    point = best(model.net, *box, _top(row), rng, options.search)
    most = _value(model, point, row)
    spread = most - middle
    above = -float(IBP().lower(model.net, Box(box[0][None], box[1][None]), -row.double()[None]))
    asks = [("easy", most - 0.05 * spread, "sat"), ("hard", most - 0.005 * spread, "sat")]
    asks += [("open", most + 0.1 * spread, "open"), ("safe", above + 0.1 * spread, "unsat")]
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
        point = best(model.net, *box, _top(row), rng, options.search / 3, enough=0.0)
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


def _top(row: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda y: (y @ row.T).amax(1)


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


def _holds(model: Model, ask: Ask, said: Said) -> bool:
    """Whether the witness lies in the box, and onnxruntime's answer to it is what was asked for."""
    x = said.inside(ask.low, ask.high)
    return x is not None and bool((ask.row.astype(np.float64) @ model.outputs(x)).max() >= ask.least)


if __name__ == "__main__":
    main()
