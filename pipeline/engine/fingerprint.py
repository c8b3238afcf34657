"""What an outcome depends on besides its config: the code that can be reached, the data's bytes, the libraries.

The code digest follows imports, not data flow: it over-invalidates (a comment changes a key), which is the safe side.
Modules that are only named in data are added by rule: methods that a config holds (the planner finds them), whole
folders that a stage reads names from (`READS` in the stage module), and the folders of `_WHOLE` with what others have
added to these through entry points.
"""

import ast
import hashlib
import importlib.metadata
import importlib.util
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path

from pipeline.core.canonical import canonical, digest, file_digest
from pipeline.engine.disk import write_atomic

REPOSITORY = Path(__file__).resolve().parent.parent.parent
ROOTS = ("pipeline", "stages", "targets")

# Reaching the left one counts every module of the right one: it loads them by a name found in a file.
_WHOLE = {"stages.nn.arch": ("stages.nn",), "targets.lowering.apply": ("targets.passes",)}
# Files that a module hands on as they are.
_FILES = {"stages.export": ("targets/runtime/predict_bundle.txt",)}
_DATA_SUFFIXES = (".py", ".txt", ".j2")


def code_digest(modules: Iterable[str]) -> str:
    """Digest of every in-repository module reachable by import from `modules`, and of foreign modules named there."""
    seen: set[str] = set()
    todo = list(modules)
    while todo:
        name = todo.pop()
        if name in seen:
            continue
        seen.add(name)
        todo += [m for m in _imports(name) if m not in seen]
        todo += [m for folder in _WHOLE.get(name, ()) for m in folder_modules(folder)]
    theirs = [row for name in _WHOLE if name in seen for folder in _WHOLE[name] for row in plugins(f"{folder}.")]
    files = [(path, file_digest(REPOSITORY / path)) for name in _FILES if name in seen for path in _FILES[name]]
    return digest(["code", *((name, _file_of(name)) for name in sorted(seen)), *theirs, *files])


@cache
def plugins(prefix: str = "stages.") -> tuple[tuple[str, str, str, str], ...]:
    """Third parties' methods in folders of this prefix: folder, name, place, and digest of the source file there."""
    groups = [group for group in importlib.metadata.entry_points().groups if group.startswith(prefix)]
    points = [point for group in groups for point in importlib.metadata.entry_points(group=group)]
    rows = {(p.group, p.name, p.value, _file_of(p.value.partition(":")[0])) for p in points}
    return tuple(sorted(rows))


def folder_modules(folder: str) -> tuple[str, ...]:
    """Every module below a package, dotted."""
    base = REPOSITORY.joinpath(*folder.split("."))
    found = []
    for path in sorted(base.rglob("*.py")):
        parts = path.relative_to(REPOSITORY).with_suffix("").parts
        found.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return tuple(found)


@cache
def tree_digest() -> str:
    """Digest of every source file of the product; the plan's own cache key covers it."""
    state = hashlib.sha256()
    for root in ROOTS:
        for path in sorted((REPOSITORY / root).rglob("*")):
            if path.suffix in _DATA_SUFFIXES:
                state.update(str(path.relative_to(REPOSITORY)).encode() + b"\0" + path.read_bytes() + b"\0")
    return state.hexdigest()


def versions(distributions: Sequence[str]) -> dict[str, str]:
    """Installed version of each distribution; "absent" where there is none."""
    found = {}
    for name in distributions:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


def data_digest(files: Sequence[Path], root: Path, memo: Path) -> str:
    """Digest of the data files' names and bytes. `memo` remembers digests by path, size and time of change.

    Names are relative to the data root, or to the folder that holds all files that lie elsewhere: a file that moves
    from one class folder to another changes the digest, a data set that moves as a whole does not.
    """
    known = _read_memo(memo)
    elsewhere = _common([path for path in files if not path.is_relative_to(root)])
    fresh: dict[str, list[object]] = {}
    rows = []
    for path in files:
        stat = path.stat()
        mark = [stat.st_size, stat.st_mtime_ns]
        entry = known.get(str(path))
        sha = str(entry[2]) if entry is not None and list(entry[:2]) == mark else file_digest(path)
        fresh[str(path)] = [*mark, sha]
        name = path.relative_to(root if path.is_relative_to(root) else elsewhere)
        rows.append([name.as_posix(), sha])
    if any(known.get(path) != entry for path, entry in fresh.items()):
        entries = {**known, **fresh}
        write_atomic(memo, canonical({"files": entries, "digest": digest(entries)}))
    return digest(["data", *sorted(rows)])


def with_folders(files: Sequence[Path]) -> tuple[str, ...]:
    """The files and every folder between them and the one that holds them all, whose times tell of new files."""
    top = _common(files)
    folders = {parent for path in files for parent in path.parents if parent.is_relative_to(top)}
    return tuple(sorted(str(path) for path in {*files, *folders}))


def marks(files: Iterable[str]) -> dict[str, list[int]]:
    """Size and time of change of each file; a missing file has no entry."""
    found = {}
    for name in files:
        try:
            stat = Path(name).stat()
        except OSError:
            continue
        found[name] = [stat.st_size, stat.st_mtime_ns]
    return found


def _common(files: Sequence[Path]) -> Path:
    return Path(os.path.commonpath([path.parent for path in files])) if files else Path()


def _read_memo(memo: Path) -> Mapping[str, list[object]]:
    try:
        data = json.loads(memo.read_text(encoding="utf-8"))
        files: dict[str, list[object]] = data["files"]
        return files if data["digest"] == digest(files) else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _is_ours(module: str) -> bool:
    return module.partition(".")[0] in ROOTS


def _module_of(name: str) -> str:
    """The module that a dotted name lies in: itself, or the nearest package or module above; "" if there is none."""
    while name and _path_of(name) is None:
        name = name.rpartition(".")[0]
    return name


def _path_of(module: str) -> Path | None:
    base = REPOSITORY.joinpath(*module.split("."))
    for path in (base.with_suffix(".py"), base / "__init__.py"):
        if path.is_file():
            return path
    return None


@cache
def _file_of(module: str) -> str:
    path = _path_of(module) if _is_ours(module) else _foreign(module)
    return "absent" if path is None else file_digest(path)


def _foreign(module: str) -> Path | None:
    """The source of a third party's module, found without importing anything new; what it imports is not followed."""
    top, *rest = module.split(".")
    try:
        spec = importlib.util.find_spec(top)
    except ValueError:
        return None  # a module without a source, such as an interactive session
    if spec is None:
        return None
    places = [Path(spec.origin)] if spec.origin and not rest else []
    for folder in spec.submodule_search_locations or () if rest else ():
        base = Path(folder).joinpath(*rest)
        places += [base.with_suffix(".py"), base / "__init__.py"]
    return next((path for path in places if path.is_file()), None)


@cache
def _imports(module: str) -> tuple[str, ...]:
    """In-repository modules that a module's source imports, anywhere in it, its own packages included."""
    if not _is_ours(module) or (path := _path_of(module)) is None:
        return ()
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found = {".".join(package.split(".")[:i]) for i in range(1, package.count(".") + 2)}
    for node in ast.walk(ast.parse(path.read_bytes())):
        for name in _named(node, package):
            if owner := _module_of(name):
                found.add(owner)
    return tuple(sorted(found - {module}))


def _named(node: ast.AST, package: str) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names if alias.name.split(".")[0] in ROOTS)
    elif isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            anchor = package.split(".")[: package.count(".") + 2 - node.level]
            base = ".".join([*anchor, base] if base else anchor)
        if base.split(".")[0] in ROOTS:
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)
