"""A real build, killed at seeded random moments and started again: does it end with the bytes of an undisturbed one?

    python benchmarks/killed.py [--moments 20] [--preset digits] [--target x86_cpu] [--seed 0]

Moments are drawn uniformly over the stages' seconds of the undisturbed build and taken in order; each life of the build
dies by SIGKILL at its next moment (the whole process group) and the next life goes on from what is on disk. Printed:
the stage each life died in, then the line's files by their digests, held against the undisturbed build's. Status 1
where any differs; `.ort` files are left out, since onnxruntime never writes the same bytes twice.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
_POLL_SECONDS = 0.01
# onnxruntime writes one table of an .ort file in the order of a randomly seeded hash table.
_UNSTABLE = ".ort"


@dataclass(frozen=True, slots=True)
class Moment:
    """So many seconds after an attempt at a stage began."""

    stage: str
    attempt: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Death:
    """`hit` is the stage that the journal named last; `killed` is False where the life ended by itself."""

    moment: Moment
    hit: str
    killed: bool


def record(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "record.json").read_bytes())
    return found


def digests(run: Path) -> dict[str, str]:
    """`train/weights.safetensors` -> SHA-256, for every file of every stage that counts."""
    chosen = [stage for stage in record(run)["stages"] if stage["chosen"]]
    return {f"{s['name']}/{file}": found for s in chosen for file, found in s["artifact"]["files"].items()}


def moments(made: dict[str, Any], count: int, seed: int) -> list[Moment]:
    """Seeded moments, uniform over the time that the stages of a record took, in the order of the line."""
    rng = random.Random(seed)
    attempts = made["stages"]
    drawn = sorted(rng.uniform(0, sum(s["seconds"] for s in attempts)) for _ in range(count))
    found = []
    for at in drawn:
        left = at
        for stage in attempts:
            if left <= stage["seconds"] or stage is attempts[-1]:
                found.append(Moment(stage["name"], stage["attempt"], left))
                break
            left -= stage["seconds"]
    return found


def die(command: Sequence[str], runs: Path, moment: Moment) -> Death:
    """One life: start the build, wait until it is at the moment, kill its process group."""
    process = subprocess.Popen(
        [*command, "--runs", str(runs)],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    while process.poll() is None and not _reached(_events(runs, process.pid), moment):
        time.sleep(_POLL_SECONDS)
    deadline = time.monotonic() + moment.seconds
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    begun = [event["stage"] for event in _events(runs, process.pid) if event["kind"] == "stage"]
    return Death(moment, begun[-1] if begun else "start", process.returncode == -signal.SIGKILL)


def finished(command: Sequence[str], runs: Path) -> int:
    """Let a build come to its end; its exit status."""
    return subprocess.run(
        [*command, "--runs", str(runs)], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False
    ).returncode


def _events(runs: Path, process: int) -> list[dict[str, Any]]:
    """This life's whole lines in the journal."""
    found = []
    for path in runs.glob("*/journal.jsonl"):
        if path.parent.is_symlink():
            continue
        for line in path.read_bytes().splitlines():
            try:
                event = json.loads(line)
            except ValueError:
                continue  # torn by an earlier death
            if event["process"] == process:
                found.append(event)
    return found


def _reached(events: Sequence[dict[str, Any]], moment: Moment) -> bool:
    return any(
        event["kind"] == "stage" and (event["stage"], event["attempt"]) == (moment.stage, moment.attempt)
        for event in events
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--moments", type=int, default=20)
    parser.add_argument("--preset", default="digits")
    parser.add_argument("--target", default="x86_cpu")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    line = ("--preset", args.preset, "--target", args.target)
    command = (sys.executable, "-m", "pipeline", "build", "--quiet", *line)
    with tempfile.TemporaryDirectory() as folder:
        calm, runs = Path(folder) / "calm", Path(folder) / "killed"
        status = finished(command, calm)
        run = f"{args.preset}-{args.target}"
        made = record(calm / run)
        print(f"undisturbed: status {status}, {sum(s['seconds'] for s in made['stages']):.0f} s in stages", flush=True)
        kills = 0
        for number, moment in enumerate(moments(made, args.moments, args.seed), 1):
            death = die(command, runs, moment)
            kills += death.killed
            how = "killed in" if death.killed else "had ended by itself after"
            print(f"{number:>3}  {how} {death.hit:<9} aimed {moment.seconds:6.2f} s into {moment.stage}", flush=True)
        again = finished(command, runs)
        wanted, found = digests(calm / run), digests(runs / run)
        print(f"{kills} kills; then to the end: status {again}")
        names = sorted(name for name in wanted.keys() | found.keys() if not name.endswith(_UNSTABLE))
        differ = [name for name in names if wanted.get(name) != found.get(name)]
        for name in names:
            if name in differ or "/images/" not in name:
                print(f"{'DIFFERS' if name in differ else 'same':<8}{wanted.get(name, '-')[:16]:<18}{name}")
    alike = not differ and status == again
    print(f"{len(names) - len(differ)} of {len(names)} digests, images included, are the undisturbed build's")
    return 0 if alike else 1


if __name__ == "__main__":
    sys.exit(main())
