"""`doctor`: what this machine can do, and how to get the rest. Runs on a device too: standard library only."""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from pipeline import __version__
from pipeline.cli import _installed, _probes

_TOOLS = (
    ("qemu-aarch64-static", "qemu-aarch64", "runs bundles on emulated 64-bit ARM", "qemu-user-static"),
    ("debootstrap", "", "makes the emulated root and image bases", "debootstrap"),
    ("buildah", "", "builds the Dockerfile without a daemon", "buildah"),
)
_PURPOSE = {
    "base": "what every command needs",
    "build": "search, train, compress, validate, export",
    "cpu": "run bundles on the processor",
    "gpu": "run bundles on CUDA through onnxruntime",
    "tensorrt": "build and run engines on NVIDIA devices",
    "rtx": "prove that NVIDIA's parser takes a graph, without a GPU",
    "serve": "serve a bundle over HTTP",
    "test": "the project's own tests",
}
_RUNTIMES = {
    "onnxruntime": ("onnxruntime", "onnxruntime-gpu"),
    "tensorrt": ("tensorrt",),
    "tensorrt_rtx": ("tensorrt-rtx",),
}


class Finding(NamedTuple):
    """One row. `state` is "ok", "missing" or "warning"; `remedy` says how to get or mend it."""

    group: str
    state: str
    name: str
    text: str
    remedy: str = ""


def run(args: argparse.Namespace) -> int:
    """Tell everything; missing things are facts and not failures, so the exit status is 0."""
    print(f"Temper {__version__} on {platform.system()} {platform.machine()}")
    group, warnings, missing = "", 0, 0
    width = min(shutil.get_terminal_size((110, 24)).columns, 120)
    for finding in examine(args.data_root):
        if finding.group != group:
            group = finding.group
            print(f"\n{group}")
        for line in _wrapped(finding, width):
            print(line)
        warnings += finding.state == "warning"
        missing += finding.state == "missing"
    plural = "" if warnings == 1 else "s"
    print(f"\n{warnings} warning{plural}; {missing} missing, which only matters to a command that says so")
    return 0


def _wrapped(finding: Finding, width: int) -> list[str]:
    sign = {"ok": "ok", "missing": "missing", "warning": "WARNING"}[finding.state]
    indent = " " * 32
    return [
        *_fold(finding.text or "not here", width, f"  {sign:<9}{finding.name:<21}", indent),
        *_fold(finding.remedy, width, f"{indent}-> ", f"{indent}   "),
    ]


def _fold(text: str, width: int, first: str, rest: str) -> list[str]:
    """Wrapped between words only, so that commands and paths can be copied."""
    return textwrap.wrap(
        text, width, initial_indent=first, subsequent_indent=rest, break_long_words=False, break_on_hyphens=False
    )


def examine(data_root: Path | None) -> Iterator[Finding]:
    """All findings, in the order in which they are shown."""
    yield from _machine()
    devices, why = _probes.ask(_probes.DRIVER, timeout=30)
    driver = bool(devices)
    yield from _distributions()
    yield from _runtimes(driver)
    yield _gpu(devices, why)
    yield from _torch(driver)
    yield from _shadowed()
    yield from _tools()
    yield from _data(data_root)


def _machine() -> Iterator[Finding]:
    group = "machine"
    old = sys.version_info < (3, 11)
    text = f"{platform.python_implementation()} {platform.python_version()}"
    yield Finding(group, "ok", "python", text + (" (enough for bundles; builds need 3.11)" if old else ""))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    yield Finding(group, "ok", "cores", str(cores))
    total, free = _memory()
    small = total is not None and total < 2 << 30
    text = "unknown" if total is None else f"{_gib(total)}" + ("" if free is None else f", {_gib(free)} free")
    remedy = "the digits build peaks near 2 GiB; build elsewhere and bring the bundle here" if small else ""
    yield Finding(group, "warning" if small else "ok", "memory", text, remedy)
    disk = shutil.disk_usage(Path.cwd()).free
    yield Finding(group, "ok" if disk > 1 << 30 else "warning", "disk", f"{_gib(disk)} free in the current folder")


def _distributions() -> Iterator[Finding]:
    group = "installed"
    table = _installed.extras()
    if not table:
        remedy = f"{_installed.how('build,cpu')}"
        yield Finding(group, "missing", _installed.DISTRIBUTION, "neither installed nor a checkout", remedy)
    for extra, rows in table.items():
        have = [(name, found, clause) for name, clause in rows if (found := _installed.version(name))]
        lack = [f"{name}{clause}" for name, clause in rows if not _installed.version(name)]
        wrong = [
            f"{name} {found} (wants {clause})" for name, found, clause in have if not _installed.fits(found, clause)
        ]
        text = ", ".join(f"{name} {found}" for name, found, _ in have) or "nothing"
        about = f"{_PURPOSE.get(extra, '')}: {text}"
        if wrong:
            yield Finding(group, "warning", extra, about, f"other versions than tested: {', '.join(wrong)}")
        elif lack:
            remedy = f"{_installed.how('' if extra == 'base' else extra)}  (lacks {', '.join(lack)})"
            yield Finding(group, "missing", extra, about, remedy)
        else:
            yield Finding(group, "ok", extra, about)
    both = [name for name in _RUNTIMES["onnxruntime"] if _installed.version(name)]
    if len(both) == 2:
        yield Finding(
            group,
            "warning",
            "onnxruntime",
            "onnxruntime and onnxruntime-gpu share one module and overwrite each other",
            "pip uninstall both, then install one: extra cpu or extra gpu",
        )


def _runtimes(driver: bool) -> Iterator[Finding]:
    group, has = "runtimes, and what they would really use", "yes" if driver else "none"
    if any(_installed.version(name) for name in _RUNTIMES["onnxruntime"]):
        works, why = _probes.ask(_probes.ONNXRUNTIME, has)
        state, text = ("ok", ", ".join(works)) if works else ("warning", f"does not run: {why}")
        yield Finding(group, state, "onnxruntime", text, "" if works else "pip install --force-reinstall onnxruntime")
    else:
        yield Finding(group, "missing", "onnxruntime", "", _installed.how("cpu"))
    for module in ("tensorrt", "tensorrt_rtx"):
        extra = "rtx" if module == "tensorrt_rtx" else "tensorrt"
        if not any(_installed.version(name) for name in _RUNTIMES[module]):
            where = "" if extra == "rtx" else "; on a Jetson it comes with JetPack"
            yield Finding(group, "missing", module, "", _installed.how(extra) + where)
            continue
        answer, why = _probes.ask(_probes.TENSORRT, module, has)
        if answer is None:
            yield Finding(
                group, "warning", module, f"does not load: {why}", "its libraries come from NVIDIA's own index"
            )
        elif answer[1]:
            yield Finding(group, "ok", module, f"{answer[0]}: parses, builds and runs engines")
        else:
            yield Finding(group, "ok", module, f"{answer[0]}: parses and builds; running an engine needs a CUDA driver")


def _gpu(devices: list[str] | None, why: str) -> Finding:
    group = "accelerators"
    if devices:
        return Finding(group, "ok", "cuda", ", ".join(devices))
    text = "a driver without a device" if devices == [] else f"no driver ({why})"
    return Finding(
        group, "missing", "cuda", text, "install NVIDIA's driver where there is such a GPU; builds work without"
    )


def _torch(driver: bool) -> Iterator[Finding]:
    group, built_for = "accelerators", _installed.cuda_build()
    if built_for is None:
        return
    if not built_for:
        text = "CPU build" + (", although there is a GPU" if driver else "")
        remedy = "install torch's CUDA build to train on the GPU" if driver else ""
        yield Finding(group, "warning" if driver else "ok", "torch", text, remedy)
        return
    if not driver:
        yield Finding(
            group,
            "warning",
            "torch",
            f"a CUDA {built_for} build on a machine without a GPU: gigabytes for nothing",
            "pip uninstall torch and its nvidia packages, then install its CPU build and the pins of constraints.txt",
        )
        return
    names, why = _probes.ask(_probes.TORCH)
    if names:
        yield Finding(group, "ok", "torch", f"CUDA {built_for} build, uses {', '.join(names)}")
    else:
        yield Finding(
            group,
            "warning",
            "torch",
            f"a CUDA {built_for} build that finds no GPU ({why or 'none listed'})",
            "the driver may be older than this build needs",
        )


def _shadowed() -> Iterator[Finding]:
    for name, place in _installed.shadows():
        yield Finding(
            "import names",
            "warning",
            name,
            f"another package bears this name: {place}",
            "give Temper an environment of its own, or leave that folder before starting it",
        )


def _tools() -> Iterator[Finding]:
    for tool, other, use, package in _TOOLS:
        place = shutil.which(tool) or (shutil.which(other) if other else None)
        remedy = "" if place else f"apt-get install -y --no-install-recommends {package}"
        yield Finding("tools", "ok" if place else "missing", tool, use, remedy)


def _data(data_root: Path | None) -> Iterator[Finding]:
    given, named = data_root is not None, os.environ.get("TEMPER_DATA")
    root = (data_root or Path(named or "data")).absolute()
    group = "data sets"
    origin = (
        "--data-root"
        if given
        else ("$TEMPER_DATA" if named else "./data, for neither --data-root nor $TEMPER_DATA is set")
    )
    there = root.is_dir()
    yield Finding(
        group,
        "ok" if there else "missing",
        "place",
        f"{root} (from {origin})",
        "" if there else "name the place with --data-root or TEMPER_DATA; digits needs none",
    )
    found, why = _probes.ask(_probes.DATA, str(root))
    if found is None:
        yield Finding(group, "missing", "readers", f"not asked: {why}", _installed.how("build"))
        return
    for name, (ok, text) in found.items():
        first = text.splitlines()[0]
        yield Finding(group, "ok" if ok else "missing", name, first if ok else "", "" if ok else first)


def _memory() -> tuple[int | None, int | None]:
    """(total, available) in bytes, cut to what this container may use."""
    try:
        rows = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines() if ":" in line)
        total, free = (int(rows[key].split()[0]) << 10 for key in ("MemTotal", "MemAvailable"))
    except (OSError, KeyError, ValueError):
        return None, None
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
    except (OSError, ValueError):
        return total, free
    return min(total, limit), min(free, max(0, limit - used))


def _gib(size: int) -> str:
    return f"{size / (1 << 30):.1f} GiB"
