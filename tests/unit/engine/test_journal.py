import json
import threading
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.errors import BadInput
from pipeline.engine.journal import Journal, read


def test_events_come_back_in_order_with_their_fields(tmp_path: Path) -> None:
    path = tmp_path / "new" / "journal.jsonl"
    journal = Journal(path)
    journal.emit("note", {"text": "größer"})
    journal.emit("done", {"complete": True})
    journal.close()
    assert [(e["kind"], e.get("text"), e.get("complete")) for e in read(path)] == [
        ("note", "größer", None),
        ("done", None, True),
    ]


@pytest.mark.parametrize("cut", range(1, 40))
def test_a_line_torn_anywhere_is_skipped_and_the_next_journal_starts_a_new_one(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "journal.jsonl"
    for number in range(2):
        journal = Journal(path)
        journal.emit("note", {"number": number})
        journal.close()
    path.write_bytes(path.read_bytes()[:-cut])
    journal = Journal(path)
    journal.emit("note", {"number": 2})
    journal.close()
    # Losing only the newline loses nothing.
    assert [event["number"] for event in read(path)] == ([0, 1, 2] if cut == 1 else [0, 2])


def test_many_threads_never_mix_their_lines(tmp_path: Path) -> None:
    heard: list[Any] = []
    journal = Journal(tmp_path / "j", (heard.append,))

    def speak(number: int) -> None:
        for i in range(50):
            journal.emit("note", {"text": f"{number} {i} " + "x" * 5000})

    threads = [threading.Thread(target=speak, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    journal.close()
    assert len((tmp_path / "j").read_bytes().splitlines()) == 200
    assert sorted(e["text"] for e in read(tmp_path / "j")) == sorted(e["text"] for e in heard)


def test_progress_is_heard_always_but_written_at_most_once_a_second_and_at_its_end(tmp_path: Path) -> None:
    heard: list[Any] = []
    journal = Journal(tmp_path / "j", (heard.append,))
    for done in range(1, 1001):
        journal.emit("progress", {"stage": "train", "label": "epoch", "done": done, "total": 1000})
    journal.close()
    assert len(heard) == 1000
    written = [event["done"] for event in read(tmp_path / "j")]
    assert written[0] == 1
    assert written[-1] == 1000
    assert len(written) < 100


def test_values_that_json_cannot_hold_do_not_stop_a_stage(tmp_path: Path) -> None:
    class Odd:
        def __float__(self) -> float:
            return 2.5

    journal = Journal(tmp_path / "j")
    journal.emit("note", {"number": Odd(), "path": Path("x"), "pair": {(1, 2): 3}})
    journal.close()
    assert json.loads((tmp_path / "j").read_text())["number"] == 2.5


def test_a_folder_in_the_way_is_bad_input(tmp_path: Path) -> None:
    (tmp_path / "j").mkdir()
    with pytest.raises(BadInput, match="cannot write"):
        Journal(tmp_path / "j")
