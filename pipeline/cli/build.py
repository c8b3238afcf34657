"""`build`: run the line for a target, from spec to bundle."""

import argparse
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from pipeline.cli._probes import TORCH, ask
from pipeline.cli.options import draft_of, roots
from pipeline.cli.summary import summary
from pipeline.cli.ui import say, screen, width
from pipeline.core.errors import PASSED, BadInput
from pipeline.core.record import RunRecord
from pipeline.engine.build import Built, build
from pipeline.engine.journal import Listener
from pipeline.engine.plan import plan
from pipeline.engine.step import Plan
from pipeline.engine.store import Store

_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def run(args: argparse.Namespace) -> int:
    built = execute(args)
    say(summary(built, width()))
    if built.refused is None:
        return PASSED
    print(f"temper: {built.refused}", file=sys.stderr)
    return built.refused.status


def execute(args: argparse.Namespace, approve: Callable[[Plan], None] = lambda _: None) -> Built:
    """Plan and build as the options say; `approve` may refuse the plan by raising, before anything is built."""
    # Read by the numerical libraries when they are first imported, which nothing did so far. Threads that spin while
    # they wait make small networks several times slower on a machine that does anything else.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if args.threads is not None:
        os.environ.update(dict.fromkeys(_THREADS, str(args.threads)))
    _present(args.device)
    runs, data_root = roots(args)
    with _interruptible() as heed:
        Store(runs / "store")  # one that we cannot use is refused before planning writes into it
        made = plan(draft_of(args), args.target, runs, data_root)
        approve(made)
        with screen(args.quiet) as listener:
            reports = {"report.html": _html, "report.md": _markdown}
            return build(made, runs, data_root, reports, args.device, (listener, heed))


def _html(record: RunRecord, files: Mapping[str, Path]) -> str:
    from pipeline.report import html
    from pipeline.report.view import view

    return html.render(view(record, files))


def _markdown(record: RunRecord, files: Mapping[str, Path]) -> str:
    from pipeline.report import markdown
    from pipeline.report.view import view

    return markdown.render(view(record, files))


@contextmanager
def _interruptible() -> Iterator[Listener]:
    """Stop in order and without a traceback when told to: by Ctrl-C, or by SIGTERM (a time limit, a shutdown).

    Libraries swallow what surfaces while they import something, and what was half imported fails later in its own way.
    So the word is kept: the listener given out says it again at the next event, and no other failure counts.
    """
    told = False

    def stop(*_: object) -> None:
        nonlocal told
        told = True
        raise KeyboardInterrupt

    def heed(event: Mapping[str, object]) -> None:
        del event
        if told:
            raise KeyboardInterrupt

    heard = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) is not signal.SIG_IGN]
    before = {number: signal.signal(number, stop) for number in heard}
    try:
        yield heed
    except Exception:
        if told:
            raise KeyboardInterrupt from None
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _present(device: str) -> None:
    """Raises `BadInput` where the accelerator that was asked for is not there, before anything is built."""
    if device == "cpu":
        return
    found, why = ask(TORCH)
    wanted = int(device.partition(":")[2] or 0)
    if found is None or wanted >= len(found):
        there = f"PyTorch sees {', '.join(found)}" if found else why or "PyTorch sees no such device here"
        raise BadInput(f"--device {device}: {there}; `python -m pipeline doctor` says more, --device cpu always works")
