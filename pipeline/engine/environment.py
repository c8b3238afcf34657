"""Where a run was made: commit, interpreter, machine, threads, versions. Imports no library that it reports on."""

import os
import platform
import subprocess
from collections.abc import Iterable
from pathlib import Path

import pipeline
from pipeline.engine.fingerprint import REPOSITORY, versions

_THREADS = "OMP_NUM_THREADS"


def environment(distributions: Iterable[str], device: str = "cpu") -> dict[str, str]:
    """Facts as text, by name. Holds no user, host or folder name."""
    found = {
        "temper": pipeline.__version__,
        "commit": _commit(REPOSITORY),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "system": f"{platform.system()} {platform.release()}",
        "machine": platform.machine(),
        "cpu": _cpu(),
        "cores": str(_cores()),
        "threads": os.environ.get(_THREADS) or str(_cores()),
        "device": device,
    }
    if gpus := _gpus():
        found["gpu"] = gpus
    return found | {f"version.{name}": version for name, version in versions(sorted(set(distributions))).items()}


def _commit(folder: Path) -> str:
    """The commit of the checkout that this code runs from, with a plus where files differ; "none" outside of one."""
    if not (folder / ".git").exists():
        return "none"
    try:
        head = _git(folder, "rev-parse", "HEAD")
        return head + ("+" if _git(folder, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return "none"


def _git(folder: Path, *words: str) -> str:
    # Without the optional lock a status never disturbs a git command that runs beside us.
    quiet = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
    command = ["git", "-C", str(folder), *words]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=10, env=quiet).stdout.strip()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu() -> str:
    """The processor's model name; on boards whose kernel gives none, the board's."""
    try:
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            if line.partition(":")[0].strip() == "model name":
                return line.partition(":")[2].strip()
        return Path("/proc/device-tree/model").read_text(errors="replace").strip("\0\n")
    except OSError:
        return platform.processor() or "unknown"


def _gpus() -> str:
    """Model names as the kernel driver tells them, so that no CUDA library is loaded."""
    names = []
    for path in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        rows = dict(line.split(":", 1) for line in path.read_text(errors="replace").splitlines() if ":" in line)
        names.append(rows.get("Model", "unknown").strip())
    return ", ".join(names)
