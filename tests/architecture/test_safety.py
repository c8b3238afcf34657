"""What no source file may do, checked on the syntax tree: unpickle, seed globally, print outside the command line."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted(path for top in ("pipeline", "stages", "targets") for path in (ROOT / top).rglob("*.py"))
_PRINTERS = {"init", "verify_spec", "catalog", "audit", "verify", "serve", "finish"}


def _calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def _imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").partition(".")[0])
    return found


def test_there_are_sources() -> None:
    assert len(SOURCES) > 50


def test_no_pickle_anywhere() -> None:
    guilty = [
        path for path in SOURCES if _imports(path) & {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    ]
    loaders = [
        (path, name)
        for path in SOURCES
        for name, call in _calls(path)
        if name in {"torch.load", "torch.save"}
        or (name in {"np.load", "numpy.load"} and not _says(call, "allow_pickle", False))
    ]
    assert guilty == []
    assert loaders == []


def test_global_seeds_live_in_one_module() -> None:
    seeds = {"torch.manual_seed", "np.random.seed", "numpy.random.seed", "random.seed", "torch.random.manual_seed"}
    guilty = [path.name for path in SOURCES if any(name in seeds for name, _ in _calls(path))]
    assert guilty in ([], ["seeding.py"])


def test_prints_belong_to_the_command_line() -> None:
    guilty = [
        str(path.relative_to(ROOT))
        for path in SOURCES
        if path.parent.name != "cli" and path.stem not in _PRINTERS and any(name == "print" for name, _ in _calls(path))
    ]
    assert guilty == []


def test_no_file_over_400_lines() -> None:
    everything = [*SOURCES, *(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]
    long = {path.name: n for path in everything if (n := len(path.read_text(encoding="utf-8").splitlines())) > 400}
    assert long == {}


def _says(call: ast.Call, name: str, value: object) -> bool:
    return any(k.arg == name and isinstance(k.value, ast.Constant) and k.value.value is value for k in call.keywords)
