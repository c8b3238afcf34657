"""A slow, resumable, deterministic computation: a chain of digests, saved after every link."""

import hashlib
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from pipeline.core.stage import Context

FAULTS = ("", "raise", "input", "disk", "exit", "missing", "no result", "kill")


class Slow(BaseModel):
    """`pause` seconds per step; `fault` is what goes wrong half-way."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    steps: int = 3
    pause: float = 0.0
    fault: str = ""


def chain(start: str, config: Slow, ctx: Context) -> str:
    """The digest after `steps` links from `start`. Half-done work is picked up, and said to be."""
    path = ctx.scratch / "chain.json"
    done, value = 0, start
    if path.exists():
        done, value = json.loads(path.read_text())
        ctx.emit("note", {"text": f"resumed at {done}"})
    for step in range(done, config.steps):
        time.sleep(config.pause)
        if step == config.steps // 2:
            break_down(config.fault)
        value = hashlib.sha256(f"{value} {step} {ctx.seed}".encode()).hexdigest()
        if ctx.rank == 0:
            spare = path.with_suffix(".new")
            spare.write_text(json.dumps([step + 1, value]))
            spare.replace(path)
        ctx.emit("progress", {"label": "links", "done": step + 1, "total": config.steps})
    return value


def break_down(fault: str) -> None:
    if fault == "raise":
        raise RuntimeError("the second digit\nhas run away")
    if fault == "input":
        from stages.method import InputError

        raise InputError("expected 10 classes, got 3; count them")
    if fault == "disk":
        raise OSError(28, os.strerror(28), "somewhere")
    if fault == "exit":
        raise SystemExit(7)
    if fault == "missing":
        raise ModuleNotFoundError("No module named 'flux'", name="flux")
    if fault == "kill":
        os.kill(os.getpid(), 9)


def written(ctx: Context, files: Mapping[str, str | bytes]) -> dict[str, Path]:
    """Files of these contents in scratch, by name."""
    found = {}
    for name, content in files.items():
        path = ctx.scratch / name.replace("/", "_")
        if ctx.rank == 0:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        found[name] = path
    return found
