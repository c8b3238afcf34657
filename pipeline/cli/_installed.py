"""What is installed, read from metadata and files; nothing that is reported on is imported."""

import importlib.util
import re
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

from pipeline.cli._probes import ROOT

DISTRIBUTION = "temper-edge"
PACKAGES = ("pipeline", "stages", "targets")
_REQUIREMENT = re.compile(r"^\s*([A-Za-z0-9._-]+)\s*(?:\[[^\]]*\])?\s*\(?([^;)]*)\)?\s*(?:;(.*))?$")
_CLAUSE = re.compile(r"(>=|<=|==|<|>|!=)\s*([0-9][0-9A-Za-z.*]*)")


def extras() -> dict[str, list[tuple[str, str]]]:
    """Extra -> (distribution, version clause), the base dependencies under "base"; empty where neither source is there.

    From the checkout's pyproject.toml where there is one, else from the installed metadata.
    """
    return _from_checkout(ROOT / "pyproject.toml") or _from_metadata()


def how(extra: str) -> str:
    """The command that installs an extra, from the checkout where this is one; "" stands for the base."""
    which = f"[{extra}]" if extra else ""
    return (
        f'pip install -e ".{which}"' if (ROOT / "pyproject.toml").is_file() else f'pip install "{DISTRIBUTION}{which}"'
    )


def version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def fits(found: str, clause: str) -> bool:
    """Whether a release number meets `>=2.6,<2.14`; local and pre-release parts are not looked at."""
    for sign, bound in _CLAUSE.findall(clause):
        a, b = _numbers(found), _numbers(bound)
        width = max(len(a), len(b))
        a, b = a + [0] * (width - len(a)), b + [0] * (width - len(b))
        holds = {">=": a >= b, "<=": a <= b, "==": a == b, "<": a < b, ">": a > b, "!=": a != b}
        if not holds[sign]:
            return False
    return True


def cuda_build() -> str | None:
    """The CUDA version that torch was built for, "" for a CPU build, None where torch is not there."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    try:
        text = (Path(spec.origin).parent / "version.py").read_text("utf-8")
    except OSError:
        return None
    found = re.search(r"^cuda\b[^=]*=\s*'([^']+)'", text, re.MULTILINE)
    return found[1] if found else ""


def shadows(path: Iterable[str] | None = None) -> list[tuple[str, Path]]:
    """(import name, place) of every other package that bears one of our three names anywhere on the import path."""
    found = []
    for entry in dict.fromkeys(sys.path if path is None else path):
        for name in PACKAGES:
            for place in (Path(entry or ".") / name, Path(entry or ".") / f"{name}.py"):
                package = place.is_dir() and any(place.glob("*.py"))
                if (package or place.is_file()) and place.resolve() != ROOT / name:
                    found.append((name, place.resolve()))
    return list(dict.fromkeys(found))


def _from_checkout(path: Path) -> dict[str, list[tuple[str, str]]]:
    try:
        import tomllib
    except ImportError:
        return {}  # Python 3.10, on a device
    try:
        project = tomllib.loads(path.read_text("utf-8")).get("project", {})
    except (OSError, ValueError):
        return {}
    if project.get("name") != DISTRIBUTION:
        return {}
    tables = {"base": project.get("dependencies", []), **project.get("optional-dependencies", {})}
    return {extra: [r[:2] for text in rows if (r := _parsed(text))] for extra, rows in tables.items()}


def _from_metadata() -> dict[str, list[tuple[str, str]]]:
    found: dict[str, list[tuple[str, str]]] = {}
    try:
        rows = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        return {}
    for text in rows:
        if parsed := _parsed(text):
            extra = re.search(r"""extra\s*==\s*['"]([^'"]+)""", parsed[2])
            found.setdefault(extra[1] if extra else "base", []).append(parsed[:2])
    return found


def _parsed(text: str) -> tuple[str, str, str] | None:
    match = _REQUIREMENT.match(text)
    return (match[1], match[2].strip(), match[3] or "") if match else None


def _numbers(text: str) -> list[int]:
    release = re.match(r"\d+(\.\d+)*", text)
    return [int(part) for part in release[0].split(".")] if release else [0]
