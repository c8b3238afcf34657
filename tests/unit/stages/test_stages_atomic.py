"""What is written whole or not at all leaves devices and pipes in their places."""

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.engine.disk import write_atomic
from stages.nn._atomic import write


@pytest.mark.parametrize("writes", [write, write_atomic])
def test_a_pipe_is_written_into_and_not_replaced(writes: Callable[[Path, bytes], None], tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        writes(path, b"all of it")
        assert os.read(reader, 100) == b"all of it"
    finally:
        os.close(reader)
    assert stat.S_ISFIFO(path.stat().st_mode)
    assert [entry.name for entry in tmp_path.iterdir()] == ["pipe"]
