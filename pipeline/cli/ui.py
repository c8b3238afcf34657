"""What a build says while it runs: bars with estimates on a terminal, a line now and then in a log.

Fed by journal events. Everything goes to stderr, so that stdout holds the summary alone. rich is imported for a
terminal only.
"""

import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TextIO

from pipeline.engine.journal import Listener

_SECONDS_BETWEEN_LINES = 5.0

Event = Mapping[str, Any]


def width() -> int:
    """Columns for a summary: those of the terminal, within what reads well."""
    return max(60, min(shutil.get_terminal_size((100, 24)).columns, 120))


def say(text: str) -> None:
    """To standard output. That its reader left (`| head`) does not change what the command came to."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def screen(quiet: bool = False, stream: TextIO | None = None) -> Iterator[Listener]:
    """A listener for the time of a build; `quiet` leaves warnings only."""
    stream = stream or sys.stderr
    if quiet:
        yield _only_warnings(stream)
    elif stream.isatty():
        with _bars(stream) as listener:
            yield listener
    else:
        yield Lines(stream)


def sentence(event: Event) -> str | None:
    """The line that an event is worth; None for those that only move a bar."""
    kind, stage = event["kind"], event.get("stage", "")
    if kind == "build":
        return f"building {event['name']} for {event['target']}: {', '.join(event['steps'])}"
    if kind == "stage":
        overrides = ", ".join(f"{key} = {value}" for key, value in event["overrides"].items())
        return f"{stage}: attempt {event['attempt'] + 1} ({overrides})" if overrides else None
    if kind == "outcome":
        return f"{stage}: reused" if event["reused"] else f"{stage}: done in {duration(event['seconds'])}"
    if kind == "gate" and not event["ok"]:
        return f"{stage}: refused: {'; '.join(event['reasons'])}"
    if kind == "note":
        return f"{stage}: {event.get('text', '')}"
    if kind == "warning":
        return str(event["text"])
    return None


def duration(seconds: float) -> str:
    """`0.3 s`, `42 s`, `3 min 05 s`, `2 h 10 min`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


class Lines:
    """Plain lines: what ends at once, progress and notes at most every few seconds."""

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream, self._clock = stream, clock
        self._spoke = clock()
        self._began: dict[object, tuple[float, float]] = {}

    def __call__(self, event: Event) -> None:
        text = sentence(event)
        if event["kind"] == "progress":
            text = self._progress(event)
        if text is None or (event["kind"] in ("progress", "note") and self._too_soon()):
            return
        self._spoke = self._clock()
        print(f"{time.strftime('%H:%M:%S')} {text}", file=self._stream, flush=True)

    def _too_soon(self) -> bool:
        return self._clock() - self._spoke < _SECONDS_BETWEEN_LINES

    def _progress(self, event: Event) -> str | None:
        done, total = float(event.get("done", 0)), float(event.get("total", 0))
        label, now = event.get("label", ""), self._clock()
        start, first = self._began.setdefault((event["stage"], label), (now, done))
        if total <= 0:
            return f"{event['stage']}: {label} {done:g}"
        left = ""
        if done > first and now > start:
            left = f", about {duration((now - start) / (done - first) * (total - done))} left"
        return f"{event['stage']}: {label} {done:g} of {total:g} ({done / total:.0%}){left}"


def _only_warnings(stream: TextIO) -> Listener:
    def listen(event: Event) -> None:
        if event["kind"] == "warning":
            print(sentence(event), file=stream, flush=True)

    return listen


@contextmanager
def _bars(stream: TextIO) -> Iterator[Listener]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.completed:g}/{task.total:g}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(file=stream, highlight=False), transient=True) as progress:
        line = progress.add_task("line", total=1)
        inner = progress.add_task("", total=1, visible=False)
        shown: list[object] = [None]

        def listen(event: Event) -> None:
            if event["kind"] == "build":
                progress.update(line, total=len(event["steps"]))
            elif event["kind"] == "stage":
                progress.update(line, description=event["stage"])
                progress.update(inner, visible=False)
            elif event["kind"] == "gate" and event["ok"]:
                progress.advance(line)
            elif event["kind"] == "progress" and event.get("total"):
                which = (event["stage"], event.get("label"))
                if shown[0] != which:
                    shown[0] = which
                    progress.reset(inner, description=f"  {event.get('label', '')}", visible=True)
                progress.update(inner, completed=float(event["done"]), total=float(event["total"]), visible=True)
            if (text := sentence(event)) is not None:
                progress.console.print(text, markup=False, soft_wrap=True)

        yield listen
