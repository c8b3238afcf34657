import io
import os
import pty
import subprocess
import sys
import threading
from collections.abc import Mapping
from typing import Any

import pytest

from pipeline.cli.ui import Lines, duration, screen, sentence
from tests.fake_line.processes import ROOT

LINE: tuple[Mapping[str, Any], ...] = (
    {"kind": "build", "name": "toy", "target": "jetson", "steps": ["search", "train"]},
    {"kind": "stage", "stage": "search", "attempt": 0, "overrides": {}},
    {"kind": "outcome", "stage": "search", "attempt": 0, "reused": True, "seconds": 3.0},
    {"kind": "gate", "stage": "search", "attempt": 0, "ok": True, "reasons": []},
    {"kind": "stage", "stage": "train", "attempt": 1, "overrides": {"ratio": 0.5}},
    {"kind": "progress", "stage": "train", "label": "epoch [red] 1", "done": 1, "total": 4},
    {"kind": "progress", "stage": "train", "label": "epoch 2", "done": 4, "total": 4},
    {"kind": "note", "stage": "train", "text": "a note [bold]"},
    {"kind": "warning", "text": "stored file abc was damaged"},
    {"kind": "outcome", "stage": "train", "attempt": 1, "reused": False, "seconds": 75.0},
    {"kind": "gate", "stage": "train", "attempt": 1, "ok": False, "reasons": ["too low"]},
    {"kind": "done", "complete": False, "refused": "train"},
)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_log_gets_one_plain_line_per_thing_that_ended() -> None:
    stream = io.StringIO()
    with screen(stream=stream) as listen:
        for event in LINE:
            listen(event)
    said = [line.split(" ", 1)[1] for line in stream.getvalue().splitlines()]
    assert said == [
        "building toy for jetson: search, train",
        "search: reused",
        "train: attempt 2 (ratio = 0.5)",
        "stored file abc was damaged",
        "train: done in 1 min 15 s",
        "train: refused: too low",
    ]


def test_a_log_hears_of_progress_every_few_seconds_with_an_estimate() -> None:
    stream, clock = io.StringIO(), Clock()
    listen = Lines(stream, clock)
    for done in range(101):
        listen({"kind": "progress", "stage": "train", "label": "epoch 1", "done": done, "total": 100})
        clock.now += 0.5
    said = [line.split(" ", 1)[1] for line in stream.getvalue().splitlines()]
    assert 5 <= len(said) <= 10
    assert said[0] == "train: epoch 1 10 of 100 (10%), about 45 s left"
    assert said[-1].endswith("left") or said[-1].endswith("(100%), about 0.0 s left")


def test_progress_without_a_total_has_no_estimate() -> None:
    stream, clock = io.StringIO(), Clock()
    listen = Lines(stream, clock)
    clock.now = 9.0
    listen({"kind": "progress", "stage": "search", "label": "candidates", "done": 3})
    assert stream.getvalue().endswith("search: candidates 3\n")


def test_quiet_leaves_warnings_only() -> None:
    stream = io.StringIO()
    with screen(quiet=True, stream=stream) as listen:
        for event in LINE:
            listen(event)
    assert stream.getvalue() == "stored file abc was damaged\n"


def test_a_terminal_gets_bars_and_the_same_sentences() -> None:
    ours, theirs = pty.openpty()
    shown: list[bytes] = []

    def look() -> None:
        while True:
            try:
                piece = os.read(ours, 4096)
            except OSError:
                return
            if not piece:
                return
            shown.append(piece)

    reader = threading.Thread(target=look)
    reader.start()
    with os.fdopen(theirs, "w") as stream, screen(stream=stream) as listen:
        assert stream.isatty()
        for event in LINE:
            listen(event)
    reader.join(10)
    os.close(ours)
    text = b"".join(shown).decode()
    for event in LINE:
        if said := sentence(event):
            assert said in text
    assert "epoch 2" in text
    assert "4/4" in text


def test_rich_is_not_imported_for_a_log() -> None:
    code = (
        "import sys; from pipeline.cli.ui import screen\n"
        "with screen() as listen: listen({'kind': 'warning', 'text': 'x'})\n"
        "print('rich' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (59.6, "1 min 00 s"),
        (3599.7, "1 h 00 min"),
        (7800, "2 h 10 min"),
    ],
)
def test_durations_read_as_people_say_them(seconds: float, text: str) -> None:
    assert duration(seconds) == text
