"""Times of the line itself against the limits that the README states: help, plan, build, rebuild; and peak memory.

    python benchmarks/line.py [--target x86_cpu] [--preset digits]

Everything runs in fresh processes and a fresh runs folder; wall time and the peak resident memory of the process.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def timed(*arguments: str) -> tuple[float, float, int]:
    """Wall seconds, MiB at the peak (of the largest process so far), exit status of one `python -m pipeline` call."""
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "pipeline", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    seconds = time.perf_counter() - start
    if done.returncode not in (0, 1):
        sys.exit(f"{' '.join(arguments)}: status {done.returncode}\n{done.stderr}")
    return seconds, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024, done.returncode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", default="x86_cpu")
    parser.add_argument("--preset", default="digits")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        line = ("--preset", args.preset, "--target", args.target, "--runs", str(Path(folder) / "runs"))
        print(f"cores {os.cpu_count()}, preset {args.preset}, target {args.target}, seed 0")
        print(f"{'what':<28}{'seconds':>9}{'MiB':>8}  limit")
        for what, limit, call in (
            ("help", "0.3 s", ("--help",)),
            ("first plan", "4 s", ("plan", *line)),
            ("plan, nothing changed", "0.5 s", ("plan", *line)),
            ("build", "180 s, 2048 MiB", ("build", *line)),
            ("rebuild, nothing changed", "2 s", ("build", *line)),
        ):
            seconds, peak, status = timed(*call)
            print(f"{what:<28}{seconds:>9.2f}{peak:>8.0f}  {limit}{'' if status == 0 else f'  (status {status})'}")


if __name__ == "__main__":
    main()
