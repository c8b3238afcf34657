"""What happened when, one JSON object a line, appended; a line torn by a crash is skipped when read.

build     name, target, steps            a build began
stage     stage, attempt, of, overrides   an attempt at a stage began
progress  stage, label, done, total       from inside a stage (written once a second, heard always)
note      stage, text                     from inside a stage
outcome   stage, attempt, reused, seconds its outcome is in the store
gate      stage, attempt, ok, reasons     it was judged
warning   text                            something was repaired or waited for
failed    stage, text                     a stage raised, crashed or timed out
done      complete, refused               the line ended
"""

import json
import os
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pipeline.engine.disk import writing

Listener = Callable[[Mapping[str, Any]], None]

_SECONDS_BETWEEN_PROGRESS = 1.0


class Journal:
    """Append-only; safe to call from any thread, and from several processes on one file."""

    def __init__(self, path: Path, listeners: tuple[Listener, ...] = ()) -> None:
        self._listeners = listeners
        self._lock = threading.Lock()
        self._written: dict[object, float] = {}
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            torn = _is_torn(path)
            self._file = path.open("ab", buffering=0)
            if torn:
                self._file.write(b"\n")
        self._path = path

    def emit(self, kind: str, fields: Mapping[str, object]) -> None:
        """Append one event and tell every listener. Values that JSON cannot hold are written as their text."""
        event: dict[str, Any] = {"time": round(time.time(), 3), "process": os.getpid(), "kind": kind, **fields}
        line = json.dumps(event, default=_plain, ensure_ascii=False, skipkeys=True).encode() + b"\n"
        with self._lock:
            if self._is_due(event):
                with writing(self._path):
                    self._file.write(line)
            for listener in self._listeners:
                listener(event)

    def close(self) -> None:
        self._file.close()

    def _is_due(self, event: Mapping[str, Any]) -> bool:
        if event["kind"] != "progress" or event.get("done") == event.get("total"):
            return True
        which, now = (event.get("stage"), event.get("label")), time.monotonic()
        if now - self._written.get(which, -_SECONDS_BETWEEN_PROGRESS) < _SECONDS_BETWEEN_PROGRESS:
            return False
        self._written[which] = now
        return True


def read(path: Path) -> list[dict[str, Any]]:
    """Every whole event; a torn line (a process died while writing it) is left out."""
    events = []
    for line in path.read_bytes().splitlines():
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict):
            events.append(event)
    return events


def _is_torn(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            if file.seek(0, os.SEEK_END) == 0:
                return False
            file.seek(-1, os.SEEK_END)
            return file.read(1) != b"\n"
    except FileNotFoundError:
        return False


def _plain(value: object) -> object:
    try:
        return float(value)  # type: ignore[arg-type]  # numbers of numerical libraries
    except (TypeError, ValueError):
        return str(value)
