"""How long one call takes and how much memory it costs, measured in a fresh process of its own.

A fresh process, because another library's threads, or pages that the caller already holds, would be measured as ours.
"""

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from targets.runtime.errors import BundleError

_STATUS = Path("/proc/self/status")
_ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Figure:
    """A number with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Latency:
    """Milliseconds per call (of `batch` images) and bytes.

    `peak_bytes` is the largest resident size from loading the model on, less the size before it: what the model costs
    beyond Python, numpy and the runtime. `process_bytes` is the peak of the whole process.
    """

    p50: Figure
    p95: Figure
    peak_bytes: int
    process_bytes: int
    runs: int
    batch: int


def measure(
    model: Path,
    shape: Sequence[int],
    batch: int = 1,
    runs: int = 200,
    warmup: int = 20,
    threads: int = 1,
    provider: str = "CPUExecutionProvider",
    timeout: float = 600.0,
) -> Latency:
    """Time `runs` calls of a model on onnxruntime after `warmup` calls that do not count; shape is [C, H, W].

    Raises `BundleError` where the numbers make no sense or the process fails, with its last words.
    """
    if batch < 1 or runs < 20 or warmup < 0:
        raise BundleError(f"latency: expected batch >= 1, runs >= 20, warmup >= 0, got {batch}, {runs}, {warmup}")
    task = {"model": str(Path(model).resolve()), "shape": list(shape), "batch": batch, "runs": runs}
    task |= {"warmup": warmup, "threads": threads, "provider": provider}
    path = os.pathsep.join([str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {**os.environ, "PYTHONPATH": path}
    command = [sys.executable, "-m", "targets.runtime.latency", json.dumps(task)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=env, check=False)
    except subprocess.TimeoutExpired:
        raise BundleError(f"latency: {model} gave no answer within {timeout:g} s") from None
    if done.returncode != 0:
        words = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise BundleError(f"latency: measuring {model} ended with status {done.returncode}: {words}")
    found = json.loads(done.stdout.splitlines()[-1])
    p50, p95 = percentiles(found["milliseconds"])
    return Latency(p50, p95, found["peak_bytes"], found["process_bytes"], runs, batch)


def time_calls(call: Callable[[], Any], runs: int, warmup: int) -> list[float]:
    """Milliseconds of `runs` calls, after `warmup` calls that do not count."""
    for _ in range(warmup):
        call()
    samples = []
    for _ in range(runs):
        start = time.perf_counter_ns()
        call()
        samples.append((time.perf_counter_ns() - start) / 1e6)
    return samples


def percentiles(samples: Sequence[float]) -> tuple[Figure, Figure]:
    """Median and 95th percentile, each with its distribution-free 95 % interval."""
    return quantile(samples, 0.5), quantile(samples, 0.95)


def quantile(samples: Sequence[float], q: float) -> Figure:
    """The q-quantile of independent samples, and two order statistics that enclose the true one with 95 %.

    With B ~ Binomial(n, q): the interval is [x_(l), x_(u)], l the largest rank with P(B < l) <= 0.025 and u the
    smallest with P(B < u) >= 0.975 (Conover 1999, section 3.2). Where a rank would fall outside the sample its end
    is the extreme value, and the coverage is less: for q = 0.95 that is so below 72 samples.
    Raises `BundleError` for an empty sample.
    """
    if not samples:
        raise BundleError("quantile: expected samples, got none")
    ranked, n = sorted(samples), len(samples)
    low = high = None
    below = 0.0  # P(B < rank)
    for rank in range(n + 1):
        if below <= 0.025:
            low = rank
        if high is None and below >= 0.975:
            high = rank
        log_pmf = math.lgamma(n + 1) - math.lgamma(rank + 1) - math.lgamma(n - rank + 1)
        below += math.exp(log_pmf + rank * math.log(q) + (n - rank) * math.log1p(-q))
    value = ranked[max(1, math.ceil(q * n)) - 1]
    return Figure(value, ranked[max(1, low or 1) - 1], ranked[(n if high is None else high) - 1])


def resident() -> tuple[int, int]:
    """Resident bytes of this process now and at their peak.

    Linux counts both per address space; elsewhere the peak stands for both, so differences are a lower bound.
    """
    if _STATUS.exists():
        rows = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines() if ":" in line)
        return int(rows["VmRSS"].split()[0]) * 1024, int(rows["VmHWM"].split()[0]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return peak, peak


def forget_peak() -> None:
    """Let the peak start again from the present size, where the kernel allows it; else it stays, which overstates."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def _child(task: dict[str, Any]) -> dict[str, Any]:
    from targets.runtime.ort import OrtEngine

    images = np.random.default_rng(0).random((task["batch"], *task["shape"]), dtype=np.float32)
    forget_peak()
    before, _ = resident()
    engine = OrtEngine(Path(task["model"]), task["threads"], task["provider"])
    samples = time_calls(lambda: engine.outputs(images), task["runs"], task["warmup"])
    _, peak = resident()
    return {"milliseconds": samples, "peak_bytes": max(0, peak - before), "process_bytes": peak}


if __name__ == "__main__":
    try:
        sys.stdout.write(json.dumps(_child(json.loads(sys.argv[1]))) + "\n")
    except BundleError as refused:
        sys.stderr.write(f"{refused}\n")
        sys.exit(refused.status)
