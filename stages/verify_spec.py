"""`verify-spec`: is a network unsafe in the sense of a VNN-LIB file? One word: `sat`, `unsat` or `unknown`."""

from __future__ import annotations

import argparse
import os
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.core.errors import BadInput

_GRACE = 0.5
_SPARE = 0.3
_YOUNG = 60.0  # seconds; an older process is a test's or a server's, and was started for something else


def run(args: argparse.Namespace) -> int:
    """Print the verdict; 0 whatever it is. Raises `BadInput` or `InputError` for what cannot be used.

    The work is done in a thread, so that an operation that cannot be interrupted does not hold up the answer: a little
    after the time is up this process says `unknown` and ends.
    """
    start = time.monotonic() - _age()
    if not 0 < args.timeout < 1e9:
        raise BadInput(f"--timeout {args.timeout:g}: expected a number of seconds above 0")
    for path in (args.model, args.spec):
        if path.is_dir():
            raise BadInput(f"{path}: expected a file, this is a folder")
        if not path.is_file():
            raise BadInput(f"{path}: there is no such file")
    if args.witness is not None and not args.witness.absolute().parent.is_dir():
        raise BadInput(f"--witness {args.witness}: the folder {args.witness.absolute().parent} is not there")
    if args.witness is not None and args.witness.is_dir():
        raise BadInput(f"--witness {args.witness}: expected a file to write, this is a folder")
    job = _Job(args, start)
    worker = threading.Thread(target=job.work, daemon=True)
    worker.start()
    worker.join(max(0.0, start + args.timeout + _GRACE - time.monotonic()))
    if worker.is_alive():
        print(f"unknown: time is up; {job.said}", file=sys.stderr)
        print("unknown")
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
    if job.error is not None:
        raise job.error
    print(job.verdict, flush=True)
    return 0


def _age() -> float:
    """Seconds since this process began, a hundredth at the finest; 0 where the system does not say."""
    try:
        began = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - began
    except (OSError, ValueError, IndexError, AttributeError):
        return 0.0
    return age if 0 < age < _YOUNG else 0.0


@dataclass(slots=True)
class _Job:
    args: argparse.Namespace
    start: float
    verdict: str = "unknown"
    said: str = "the network is being read"
    error: BaseException | None = field(default=None)

    def work(self) -> None:
        try:
            self._work()
        except BaseException as error:  # raised again where the thread is joined
            self.error = error

    def _work(self) -> None:
        from stages.verification.clock import Clock
        from stages.verification.verdict import decide

        clock = Clock(
            self.args.timeout - _SPARE if self.args.timeout > 2 * _SPARE else self.args.timeout / 2, self.start
        )
        answer = decide(self.args.model, self.args.spec, clock, self._say)
        if answer.witness is not None and self.args.witness is not None:
            from stages.verification.verdict import write_witness

            try:
                write_witness(answer.witness, self.args.witness)
            except OSError as error:
                why = f"cannot be written: {error.strerror or error}; name another place"
                raise BadInput(f"--witness {self.args.witness}: {why}") from error
        self._say(answer.reason)
        self.verdict = answer.word

    def _say(self, text: str) -> None:
        self.said = text
        print(f"{time.monotonic() - self.start:7.2f} s  {text}", file=sys.stderr)
