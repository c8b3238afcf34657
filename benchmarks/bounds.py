"""What bounds cost, against one forward pass, one backward pass and a formula for memory.

    TEMPER_DATA=../shared/data OMP_NUM_THREADS=1 python -m benchmarks.bounds [--nets "mnist certified,cifar10 residual"]

One thread, process time, medians of interleaved rounds: every method takes turns with the passes that it is compared
with, as a machine's pace changes by the minute. A forward pass is net(x) on 64 images without gradients; a row is one
backward pass from the logits (or from a value on the way) to the image by automatic differentiation of one function per
image, weights without gradients, the forward pass not counted; both in the quicker of the two memory layouts. Peak
memory is the growth of a fresh process. Networks are trained where they are not stored (`benchmarks.bounds_nets`).
"""

import argparse
import copy
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import onnx
import torch
from torch import Tensor, nn

from benchmarks.bounds_memory import growth
from benchmarks.bounds_nets import Case, case
from stages.bounds import _decide, _neurons, _sweep
from stages.bounds._backward import Chain
from stages.bounds._interval import UNITS
from stages.bounds._trace import Op, fill, trace
from stages.bounds.alpha_crown import AlphaCrown
from stages.bounds.base import Box, Certifier, lead_rows
from stages.bounds.crown import Crown
from stages.bounds.crown_forward import CrownForward
from stages.bounds.crown_ibp import CrownIBP
from stages.bounds.ibp import IBP
from stages.bounds.quantised import Quantised
from stages.method import InputError
from stages.nn.imported import imported
from stages.nn.to_onnx import export
from targets.passes import qdq_int8_cpu
from targets.passes.base import Kit

NETS = ("mnist certified", "mnist plain", "cifar10 residual", "cifar10 wrn-10-1")
METHODS: dict[str, tuple[Certifier, int, int]] = {  # with how many images, in how many rounds
    "ibp": (IBP(), 64, 15),
    "crown_ibp": (CrownIBP(), 64, 11),
    "crown": (Crown(), 64, 3),
    "alpha_crown": (AlphaCrown(), 2, 1),
}
_BATCH, _MOVING, _DOMAINS = 64, 8, 64
_SLOWEST = 200.0  # seconds that one bound of alpha-CROWN may be expected to take


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", default=",".join(NETS))
    parser.add_argument(
        "--peak", nargs=3, metavar=("NET", "METHOD", "IMAGES"), help="print the growth in MiB: pages, bytes"
    )
    asked = parser.parse_args()
    torch.set_num_threads(1)
    if asked.peak:
        here, certifier = case(asked.peak[0]), METHODS[asked.peak[1]][0]
        few, rows = _asked(here, 1)
        first = replace(few, high=few.low), rows
        print(*growth(here.net, certifier, first, _asked(here, int(asked.peak[2]))))
        return
    print(
        "auto_LiRPA, the peer: its last release in the package index (0.3) does not import beside torch 2; not timed."
    )
    for name in asked.nets.split(","):
        try:
            _report(name, case(name))
        except InputError as error:
            print(f"\n{name}: left out: {error}")


def _report(name: str, here: Case) -> None:
    passes = _passes(here)
    unit, row = _units(_rounds(passes, 9))
    accuracy = float((here.net(here.x).argmax(1) == here.y).float().mean())
    print(f"\n## {name}, eps {here.threat.eps:.4f}; accuracy {accuracy:.3f} on {len(here.x)} test images")
    print(f"forward pass {1 / unit:,.0f} images/s; one backward row {row / unit:.2f} forward passes")
    print(f"channels off in all of {_BATCH} images, layer by layer: {_off(here)}")
    print("| method | images | images/s | forward passes per image | peak MiB | live MiB | formula MiB | proved |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    spent: dict[str, list[float]] = {}
    units: dict[str, tuple[float, float]] = {}
    one = _expected(here, row)
    few = one * METHODS["crown"][1] > _SLOWEST
    for kind, (certifier, usual, rounds) in METHODS.items():
        images = 1 if few and "crown" in kind and kind != "crown_ibp" else usual
        wait = one * images * {"crown": 1, "alpha_crown": 70}.get(kind, 0)
        if wait > _SLOWEST:
            print(f"| {kind} | {images} | | | | | left out: whole rows would take about {wait:,.0f} s |")
            continue
        some, rows = _asked(here, images)
        found = certifier.lower(here.net, some, rows)
        times = _rounds({"once": lambda c=certifier, s=some, r=rows: c.lower(here.net, s, r), **passes}, rounds)
        spent[kind], units[kind] = [seconds / images for seconds in times["once"]], _units(times)
        seconds, unit = statistics.median(spent[kind]), units[kind][0]
        (peak, live), said = _peak(name, kind, images), _formula(here, kind, images)
        print(
            f"| {kind} | {images} | {1 / seconds:,.1f} | {seconds / unit:,.1f} ({_spread(spent[kind], unit)}) "
            f"| {peak:,.0f} | {live:,.0f} | {said} | {int((found > 0).all(1).sum())} |",
            flush=True,
        )
    for kind, seconds, what in _others(here, "crown" in spent and not few):
        print(f"| {kind} | {what} | {1 / seconds:,.1f} | {seconds / unit:,.1f} | | | |", flush=True)
    some, rows = _asked(here, _BATCH)
    real, rounded = (CrownIBP(arithmetic=kind).lower(here.net, some, rows) for kind in ("real", "float32"))
    print(f"CROWN-IBP: rounding takes {(real - rounded).median():.2g} of {real.median():.3g} (medians of bounds)\n")
    _targets(here, spent, units, 1 if few else METHODS["crown"][1])


def _targets(
    here: Case, spent: Mapping[str, list[float]], units: Mapping[str, tuple[float, float]], crowned: int
) -> None:
    rows = int(here.net(here.x[:1]).shape[1]) - 1
    print("| target | asked | measured | met |")
    print("| --- | --- | --- | --- |")
    _line("IBP against two forward passes", 3.0, spent["ibp"], 2 * units["ibp"][0])
    _line(f"CROWN-IBP against {rows} backward rows", 1.5, spent["crown_ibp"], rows * units["crown_ibp"][1])
    if "crown" in spent:
        open_, ends, floor, asked, times = _needs(here, crowned, rows)
        what = f"CROWN against one row for each of {open_:,.0f} open neurons an image, and the {rows}"
        _line(what, 1.5, times, floor)
        _line(f"the same against the {ends:,.0f} ends or more that it asks for", 1.5, times, asked)
    if "alpha_crown" in spent:
        _line("alpha-CROWN, 20 iterations, against CROWN", 70.0, spent["alpha_crown"], _alone(here))
    for kind, images in (("ibp", 64), ("crown_ibp", 64), ("crown", 64)):
        if kind not in spent or (kind == "crown" and crowned < images):
            continue
        certifier = METHODS[kind][0]
        few, many = _asked(here, images), _asked(here, 2 * images)
        both = _rounds(
            {
                "few": lambda c=certifier, a=few: c.lower(here.net, *a),
                "many": lambda c=certifier, a=many: c.lower(here.net, *a),
            },
            METHODS[kind][2],
        )
        ratio = statistics.median(both["many"]) / statistics.median(both["few"])
        print(f"| {kind} of {2 * images} images against {images} | about 2 | {ratio:.2f} | {_yes(ratio <= 2.5)} |")


def _line(what: str, most: float, times: list[float], unit: float) -> None:
    ratio = statistics.median(times) / unit
    print(f"| {what} | {most:g} | {ratio:.2f} ({_spread(times, unit)}) | {_yes(ratio <= most)} |")


def _yes(met: bool) -> str:
    return "yes" if met else "no"


def _spread(times: list[float], unit: float) -> str:
    return f"{min(times) / unit:,.2f} to {max(times) / unit:,.2f}"


def _asked(here: Case, images: int) -> tuple[Box, Tensor]:
    x, y = here.x[:images], here.y[:images]
    return Box.around(x, here.threat), lead_rows(here.net, x, y)


def _rounds(calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Process seconds of every call, one after the other in every round, without gradients."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    with torch.no_grad():
        for _ in range(rounds):
            for name, call in calls.items():
                start = time.process_time()
                call()
                times[name].append(time.process_time() - start)
    return times


def _passes(here: Case) -> dict[str, Callable[[], object]]:
    """A forward pass and one backward row from the logits, of `_BATCH` images, in either layout."""
    found: dict[str, Callable[[], object]] = {}
    for i, (net, x) in enumerate(_layouts(here)):
        found |= {f"forward {i}": lambda n=net, x=x: n(x), f"row {i}": _row(net, x, None)}
    return found


def _units(times: Mapping[str, list[float]]) -> tuple[float, float]:
    """Seconds an image of a forward pass and of a row, in the quicker layout each."""
    medians = {name: statistics.median(seconds) / _BATCH for name, seconds in times.items()}
    first, second = (min(t for name, t in medians.items() if name.startswith(what)) for what in ("forward", "row"))
    return first, second


def _layouts(here: Case) -> list[tuple[nn.Module, Tensor]]:
    x = here.x[:_BATCH]
    last = copy.deepcopy(here.net).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    found = [(here.net, x), (last, x.contiguous(memory_format=torch.channels_last))]
    try:
        trace(last, found[1][1])
    except InputError:
        return found[:1]  # some operations cannot be followed in that layout
    return found


def _row(net: nn.Module, x: Tensor, place: int | None) -> Callable[[], object]:
    """A backward pass to the image, from what the ReLU of that place reads or from the logits."""
    x = x.clone().requires_grad_()
    graph = trace(net, x)
    values = {**graph.constants(net), graph.input: x}
    with torch.enable_grad():
        for op in graph.ops:
            if op.result in graph.moving:
                values[op.result] = op.target(*fill(op.args, values), **fill(dict(op.kwargs), values))
    relus = [op.reads()[0] for op in graph.ops if op.kind == "relu"]
    end: Tensor = values[graph.output if place is None else relus[place]]
    with torch.no_grad():
        slopes = torch.ones_like(end)
    return lambda: torch.autograd.grad(end, x, slopes, retain_graph=True)


def _needs(here: Case, images: int, last: int) -> tuple[float, float, float, float, list[float]]:
    """Open neurons an image that CROWN bounds; ends asked for at least; seconds of one backward row for each and of the
    `last` from the logits; and CROWN's own, in the same rounds."""
    some, leads = _asked(here, images)
    counts: dict[str, tuple[float, float]] = {}
    with torch.no_grad():
        chain = Chain(here.net, some, UNITS["float32"], False)

        def count(op: Op) -> None:
            for name in chain.operands(op):
                if name in chain.fronts or chain.sharp.get(name) or name in chain.tight:
                    continue
                open_ = _open(chain, name)
                _sweep.tighten(chain, op, 2.0)
                counts[name] = open_ / images, (open_ + _open(chain, name)) / images

        _sweep.follow(chain, count)
    relus = [op.reads()[0] for op in chain.done if op.kind == "relu"]
    calls: dict[str, Callable[[], object]] = {"crown": lambda: Crown().lower(here.net, some, leads)}
    for i, (net, x) in enumerate(_layouts(here)):
        calls |= {f"{name} {i}": _row(net, x, relus.index(name)) for name in counts} | {f" {i}": _row(net, x, None)}
    times = _rounds(calls, 5)
    each = {
        name: min(statistics.median(t) for call, t in times.items() if call.rpartition(" ")[0] == name) / _BATCH
        for name in ("", *counts)
    }
    neurons, ends = (sum(pair[i] for pair in counts.values()) for i in (0, 1))
    once, asked = (sum(pair[i] * each[name] for name, pair in counts.items()) + last * each[""] for i in (0, 1))
    return neurons, ends, once, asked, [seconds / images for seconds in times["crown"]]


def _off(here: Case) -> str:
    """Of every ReLU over images, how many channels intervals put out, and how many there are."""
    with torch.no_grad():
        chain = Chain(here.net, _asked(here, _BATCH)[0], UNITS["float32"], False)
        _sweep.follow(chain)
    highs = [chain.values[op.result].high for op in chain.done if op.kind == "relu"]
    counts = [((high.amax((0, 2, 3)) <= 0).sum(), high.shape[1]) for high in highs if high.dim() == 4]
    return ", ".join(f"{int(off)} of {channels}" for off, channels in counts)


def _open(chain: Chain, name: str) -> float:
    box = chain.values[name]
    return float(((box.low < 0) & (box.high > 0)).sum())


def _expected(here: Case, row: float) -> float:
    """Seconds an image of two whole backward rows for every neuron that intervals leave open; CROWN takes less."""
    with torch.no_grad():
        chain = Chain(here.net, _asked(here, 1)[0], UNITS["float32"], False)
        _sweep.follow(chain)
    names = {name for op in chain.done if op.kind == "relu" for name in op.reads() if not chain.sharp.get(name)}
    return 2 * row * sum(_open(chain, name) for name in names)


def _alone(here: Case) -> float:
    """Seconds an image of CROWN on the images that alpha-CROWN is timed on."""
    images = METHODS["alpha_crown"][1]
    few = _asked(here, images)
    return statistics.median(_rounds({"crown": lambda: Crown().lower(here.net, *few)}, 3)["crown"]) / images


def _others(here: Case, splits: bool) -> list[tuple[str, float, str]]:
    """Name, seconds for one, and of what; branch and bound only where CROWN is quick enough."""
    found = []
    some, rows = _asked(here, 4)
    middle = (some.low + some.high) / 2
    moves = torch.zeros_like(middle, dtype=torch.bool)
    moves.flatten(1)[:, :: moves[0].numel() // _MOVING] = True
    thin = replace(some, low=torch.where(moves, some.low, middle), high=torch.where(moves, some.high, middle))
    times = _rounds({"once": lambda: CrownForward().lower(here.net, thin, rows)}, 3)["once"]
    found.append(("crown_forward", statistics.median(times) / 4, f"4, of which {_MOVING} pixels move"))
    domain = _domain(here) if splits else None
    if domain is not None:
        found.append(("branch_and_bound", domain, f"{_DOMAINS} domains of one image"))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.onnx")
        export(here.net, tuple(here.x.shape[1:]), path)  # type: ignore[arg-type]
        kit = Kit(here.x[64:128].numpy(), Path(folder))
        int8 = qdq_int8_cpu.lower(onnx.load_model_from_string(path.read_bytes()), {}, kit)
    twin = imported(int8.SerializeToString())
    for inner, images in ((IBP(), 64), (CrownIBP(), 64)):
        boxes, leads = _asked(here, images)
        certifier = Quantised(inner=inner)
        certifier.lower(twin, boxes, leads)
        times = _rounds({"once": lambda c=certifier, b=boxes, r=leads: c.lower(twin, b, r)}, 3)["once"]
        found.append((f"quantised, {inner.kind}", statistics.median(times) / images, str(images)))
    return found


def _domain(here: Case) -> float | None:
    """Seconds a domain: an image and a radius that `_DOMAINS` domains leave open, less the time until the first."""
    for factor in (1.0, 1.5, 2.0, 0.5, 0.25):
        threat = here.threat.model_copy(update={"eps": here.threat.eps * factor})
        for image in range(4):
            x, y = here.x[image : image + 1], here.y[image : image + 1]
            box, rows = Box.around(x, threat), lead_rows(here.net, x, y)
            first = Crown().lower(here.net, box, rows)
            row = int(first.argmin())
            if float(first[0, row]) > 0:
                continue
            least = rows[:, row : row + 1]
            times = []
            for limit in (1, 1 + _DOMAINS):
                start = time.process_time()
                answer = _decide.decide(here.net, box, least, 1e6, limit=limit, steps=20, box_steps=5)
                times.append(time.process_time() - start)
            if not bool(answer.broken) and float(answer.lower) <= 0:
                return (times[1] - times[0]) / _DOMAINS
    return None


def _peak(name: str, kind: str, images: int) -> tuple[float, float]:
    """MiB by which a fresh process grows, in pages and in bytes that are in use after an operation."""
    if not Path("/proc/self/clear_refs").exists():
        return float("nan"), float("nan")
    command = [sys.executable, "-m", "benchmarks.bounds", "--peak", name, kind, str(images)]
    pages, live = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-2:]
    return float(pages), float(live)


def _formula(here: Case, kind: str, images: int) -> str:
    """MiB that the docstring of `_sweep` allows; interval arithmetic has no rows."""
    graph = trace(here.net, here.x[:1])
    if kind in {"ibp", "alpha_crown"}:
        return ""
    held, row = sum(graph.entries.values()), max(graph.entries.values())
    size = min(_sweep.fitting(graph, 4, 2.0), images)
    asked = lead_rows(here.net, here.x[:1], here.y[:1]).shape[1] if kind == "crown_ibp" else 0
    rows = _sweep._rows_at_once(4 * size * row, 2.0, _sweep.COPIES, size, asked)
    coefficients = max(4 * size * 6 * rows * row, _neurons.COPIES * 2**22 if kind == "crown" else 0)
    return f"{(4 * size * 16 * held + coefficients) / 2**20:,.0f}"


if __name__ == "__main__":
    main()
