"""What `verify-spec` answers on networks that others published, against known answers and beside another verifier.

    TEMPER_DATA=../shared/data OMP_NUM_THREADS=1 python -m benchmarks.verify_published FOLDER [--timeout 60]
        [--beside 'COMMAND {net} {spec} {timeout}']

FOLDER is searched, with the folders below it, for

    instances.csv                        lines `network,specification,seconds` as in the verification competition, paths
                                         from that folder; a fourth column may hold the known answer
    ACASXU_run2a_2_2_batch_2000.onnx     asked properties 1 to 5 and 7 to 10 of Katz et al. 2017 (Reluplex, appendix),
                                         inputs scaled as in the competition. Properties 1, 3 and 4 are known to hold on
                                         it, and 2 to fail; of the others, stated for other networks, nothing is known
    mnist_relu_3_50.onnx, mnist_300_200_100.onnx, convSmallRELU__Point.onnx
                                         asked whether another class can reach the label's output around the first test
                                         images that they get right, the last two on pixels standardised as in training

None of these files is ours, so none is here; the first is an example inside the verifier vibecheck-nn 1.1.0, the last
three are test files in the sources of DNNV 0.6.0. Both are packages that anyone can install.

`--beside` asks another verifier the same; the last line of its output that is one of the competition's words counts.
Wrong is what contradicts the known answer, and where both commands answer differently at least one of them is wrong:
such lines say `CONTRADICTION`. One process at a time; the seconds are those of the whole command.
"""

import argparse
import csv
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime as ort

from benchmarks.spec_family import opened, right, robust
from stages.method import InputError

_SAID = {"sat": "sat", "unsat": "unsat", "unknown": "unknown", "timeout": "unknown"}
_GRACE = 60.0  # seconds beyond the time limit after which a command is stopped
_OURS = f"{shlex.quote(sys.executable)} -m pipeline verify-spec {{net}} {{spec}} --timeout {{timeout}}"

# Boxes of the five scaled inputs.
_FAR = ((0.6, 0.679857769), (-0.5, 0.5), (-0.5, 0.5), (0.45, 0.5), (-0.5, -0.45))
_AHEAD = ((-0.303531156, -0.298552812), (-0.009549297, 0.009549297))
_WIDE = ((-0.328422877, 0.679857769), (-0.499999896, 0.499999896), (-0.499999896, 0.499999896))
_BOXES = {
    1: _FAR,
    2: _FAR,
    3: (*_AHEAD, (0.493380324, 0.5), (0.3, 0.5), (0.3, 0.5)),
    4: (*_AHEAD, (0.0, 0.0), (0.318181818, 0.5), (0.083333333, 0.166666667)),
    5: (
        (-0.324274257, -0.321785084),
        (0.031830989, 0.063661977),
        (-0.499999896, -0.499204121),
        (-0.5, -0.227272727),
        (-0.5, -0.166666667),
    ),
    7: (*_WIDE, (-0.5, 0.5), (-0.5, 0.5)),
    8: (_WIDE[0], (-0.499999896, -0.375), (-0.015915494, 0.015915494), (-0.045454545, 0.5), (0.0, 0.5)),
    9: (
        (-0.295233916, -0.212261512),
        (-0.063661977, -0.022281692),
        (-0.499999896, -0.498408347),
        (-0.5, -0.454545455),
        (-0.5, -0.375),
    ),
    10: (
        (0.268978427, 0.679857769),
        (0.11140846, 0.499999896),
        (-0.499999896, -0.498408347),
        (0.227272727, 0.5),
        (0, 0.5),
    ),
}
_HOLDS = {1: "unsat", 2: "sat", 3: "unsat", 4: "unsat"}
# Mean and deviation of the inputs, sizes in pixels, number of images.
_DIGITS: dict[str, tuple[float, float, tuple[float, ...], int]] = {
    "mnist_relu_3_50": (0.0, 1.0, (0.015, 0.03), 6),
    "mnist_300_200_100": (0.1307, 0.3081, (0.01, 0.025), 5),
    "convSmallRELU__Point": (0.1307, 0.3081, (0.03, 0.06, 0.1), 6),
}


@dataclass(frozen=True, slots=True)
class Asked:
    family: str
    network: Path
    spec: Path
    seconds: float
    known: str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--timeout", type=float, default=60.0)
    parser.add_argument("--beside", default="")
    options = parser.parse_args()
    asked_of: dict[str, list[tuple[str, float]]] = defaultdict(list)
    other_of: dict[str, list[tuple[str, float]]] = defaultdict(list)
    wrong = 0
    with tempfile.TemporaryDirectory() as scratch:
        for asked in _instances(options.folder, Path(scratch), options.timeout):
            word, seconds = _put(_OURS, asked)
            asked_of[asked.family].append((word, seconds))
            line = f"{asked.family} {asked.spec.stem}: {word} after {seconds:.1f} s"
            if options.beside:
                other, seconds = _put(options.beside, asked)
                other_of[asked.family].append((other, seconds))
                line += f", the other: {other} after {seconds:.1f} s"
                line += " CONTRADICTION" if {word, other} == {"sat", "unsat"} else ""
            if word not in ("unknown", asked.known or word):
                wrong += 1
                line += f" WRONG: known to be {asked.known}"
            print(line, file=sys.stderr, flush=True)
    if not asked_of:
        parser.error(f"{options.folder}: expected an instances.csv or one of the networks that --help names in it")
    print("| network | asked | ours: unsat, sat, unknown | seconds | the other: unsat, sat, unknown | seconds |")
    print("| --- | --- | --- | --- | --- | --- |")
    for family, answers in asked_of.items():
        print(f"| {family} | {len(answers)} | {_cells(answers)} | {_cells(other_of[family])} |")
    print(f"\n{sum(map(len, asked_of.values()))} asked, {wrong} wrong")


def _cells(answers: list[tuple[str, float]]) -> str:
    """How often each word, and the median and the most of the seconds."""
    if not answers:
        return "- | -"
    words, times = zip(*answers, strict=True)
    counts = ", ".join(str(words.count(word)) for word in ("unsat", "sat", "unknown"))
    return f"{counts} | {statistics.median(times):.1f}, {max(times):.1f}"


def _instances(folder: Path, scratch: Path, timeout: float) -> Iterator[Asked]:
    for table in sorted(folder.rglob("instances.csv")):
        with table.open(newline="") as lines:
            for network, spec, _, *known in csv.reader(lines):
                files = table.parent / network.strip(), table.parent / spec.strip()
                yield Asked(table.parent.name, *files, timeout, "".join(known[:1]).strip())
    for network in sorted(folder.rglob("ACASXU_run2a_2_2_batch_2000.onnx")):
        for number, box in _BOXES.items():
            spec = scratch / f"property_{number}.vnnlib"
            spec.write_text(_encounter(number, box))
            yield Asked("ACAS Xu 2-2", network, spec, timeout, _HOLDS.get(number, ""))
    for name in _DIGITS:
        for network in sorted(folder.rglob(f"{name}.onnx")):
            for path in _digits(name, network, scratch):
                yield Asked(name, network, path, timeout, "")


def _encounter(number: int, box: tuple[tuple[float, float], ...]) -> str:
    def least(k: int, *others: int) -> str:
        return "(and " + " ".join(f"(<= Y_{k} Y_{j})" for j in others or range(5) if j != k) + ")"

    def less(k: int) -> str:  # some other output is no larger than this one
        return " ".join(f"(and (<= Y_{j} Y_{k}))" for j in range(5) if j != k)

    unsafe = {
        1: "(>= Y_0 3.991125645861615)",
        2: "(and " + " ".join(f"(<= Y_{k} Y_0)" for k in range(1, 5)) + ")",
        3: least(0),
        4: least(0),
        5: f"(or {less(4)})",
        7: f"(or {least(3)} {least(4)})",
        8: f"(or {least(2, 0, 1)} {least(3, 0, 1)} {least(4, 0, 1)})",
        9: f"(or {less(3)})",
        10: f"(or {less(0)})",
    }[number]
    lines = [f"(declare-const {letter}_{i} Real)" for letter in "XY" for i in range(5)]
    for i, (low, high) in enumerate(box):
        lines += [f"(assert (>= X_{i} {low}))", f"(assert (<= X_{i} {high}))"]
    return "\n".join([*lines, f"(assert {unsafe})", ""])


def _digits(name: str, network: Path, scratch: Path) -> Iterator[Path]:
    mean, deviation, sizes, count = _DIGITS[name]
    try:
        splits = opened("mnist")
    except InputError as error:
        print(f"{name} skipped: {error}", file=sys.stderr)
        return
    session = ort.InferenceSession(network)
    feed = session.get_inputs()[0].name

    def answers(
        x: np.ndarray[tuple[int, ...], np.dtype[np.float32]],
    ) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
        standard = ((x - mean) / deviation).astype(np.float32)
        return np.concatenate([session.run(None, {feed: one[None]})[0] for one in standard])

    for place, image, label in right(splits, answers, count):
        for eps in sizes:
            question = robust(f"{name}_{place}_{eps}", image, label, 10, eps, 1 / deviation, mean)
            path = scratch / f"{question.name}.vnnlib"
            path.write_text(question.text())
            yield path


def _put(command: str, asked: Asked) -> tuple[str, float]:
    argv = [
        part.format(net=asked.network, spec=asked.spec, timeout=f"{asked.seconds:g}") for part in shlex.split(command)
    ]
    start = time.monotonic()
    try:
        done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=asked.seconds + _GRACE)
        said = [_SAID[line.strip()] for line in done.stdout.splitlines() if line.strip() in _SAID]
    except subprocess.TimeoutExpired:
        said = []
    return (said[-1] if said else "unknown"), time.monotonic() - start


if __name__ == "__main__":
    main()
