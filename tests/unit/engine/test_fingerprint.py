"""What a cache key depends on, and what it must not: code by reach, data by bytes and names, never place or target."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from pipeline.core.canonical import digest, file_digest
from pipeline.core.spec import read
from pipeline.core.stage import ORDER
from pipeline.engine import fingerprint, pages
from pipeline.engine.plan import plan
from pipeline.engine.step import Plan

ROOT = Path(__file__).resolve().parents[3]
TASK = '[task]\ndata = "digits"\nthreat = { norm = "linf", eps = "0.1" }\n'

# In a copy of the repository: the code of every stage's first attempt, anew after each edit.
SCRIPT = """
import json, sys
from pathlib import Path
from pipeline.core.spec import read
from pipeline.engine import fingerprint
from pipeline.engine.plan import plan

root, spec, edits = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
assert fingerprint.REPOSITORY == root, fingerprint.REPOSITORY

def codes(number):
    for cached in (fingerprint._file_of, fingerprint.tree_digest, fingerprint.plugins):
        cached.cache_clear()  # not of the imports, which a comment does not change
    made = plan(read(spec), "x86_cpu", root / f"runs{number}", root / "data")
    return {step.name: step.attempts[0].code for step in made.steps}

before, found = codes(0), {}
for number, name in enumerate(edits, 1):
    path = root / name
    original = path.read_bytes()
    path.write_bytes(original + b"\\n# edited\\n")
    after = codes(number)
    found[name] = [stage for stage in after if after[stage] != before[stage]]
    path.write_bytes(original)
assert codes(-1) == before
print(json.dumps(found))
"""

LINE = list(ORDER)
EDITS = {
    "stages/attacks/square.py": ["validate", "export"],  # their quick set holds it; nobody else names it
    "stages/attacks/pgd.py": LINE,
    "stages/attacks/fgsm.py": ["validate", "export"],  # of validity checks; and the evidence may name any attack
    "stages/attacks/base.py": LINE,
    "stages/recipes/at.py": ["train", "compress"],
    "stages/recipes/natural.py": ["compress"],  # whatever recipe.json names is loaded there
    "stages/compressors/gdws.py": [],  # the spec compresses by pruning
    "stages/compressors/prune.py": ["compress"],
    "stages/nn/builders/resnet.py": LINE,  # arch.json names builders
    "stages/data/mnist.py": [],
    "stages/data/digits.py": LINE,
    "stages/validity.py": ["validate", "export"],
    "targets/passes/fp16.py": ["export"],  # the page names passes
    "targets/runtime/latency.py": ["export"],
    "targets/runtime/predict_bundle.txt": ["export"],  # it is shipped
    "targets/runtime/serve.py": [],
    "targets/jetson.py": [],
    "targets/x86_cpu.py": [],
    "pipeline/cli/build.py": [],
    "pipeline/report/html.py": [],
    "pipeline/engine/runner.py": [],
    "pipeline/core/measurement.py": LINE,
    "tests/planted/temper_masked_cnn.py": LINE,  # a builder of others, as they are installed
}


def test_an_edit_changes_the_keys_of_the_stages_that_can_reach_it_and_of_no_others(tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    for name in (*fingerprint.ROOTS, "tests/planted"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    spec = tmp_path / "spec.toml"
    spec.write_text(f'{TASK}[stages.train]\nkind = "at"\n[stages.compress]\nkind = "prune"\n')
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(copy), str(spec), json.dumps(list(EDITS))],
        cwd=copy,
        env={**os.environ, "PYTHONPATH": f"{copy}{os.pathsep}{copy / 'tests' / 'planted'}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == EDITS


def keys(made: Plan) -> dict[str, str]:
    """The key of every step's first attempt, on inputs that are the same for all plans."""
    inputs = {"weights.safetensors": "0" * 64}
    return {s.name: s.key(s.attempts[0], made.spec.task, made.data_digest, inputs) for s in made.steps}


def planned(
    folder: Path, text: str = TASK, target: str = "x86_cpu", settings: Sequence[str] = (), data: Path | None = None
) -> Plan:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "spec.toml"
    path.write_text(text)
    return plan(read(path, None, settings), target, folder / "runs", data or folder / "data")


def test_budget_name_target_and_runs_are_in_no_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = planned(tmp_path / "one")
    budget = planned(tmp_path / "two", settings=['budget.train=[{metric="cost.params", at_most=3}]', "name=other"])
    assert budget.spec_digest != plain.spec_digest
    assert keys(budget) == keys(plain)
    page = pages.target("x86_cpu").model_copy(update={"name": "twin", "budget": {}})
    monkeypatch.setattr(pages, "target", lambda _: page)
    monkeypatch.setattr(pages, "target_names", lambda: ("twin",))
    twin = planned(tmp_path / "three", target="twin")
    assert twin.spec.target == "twin"
    assert keys(twin) == keys(plain)


def test_the_time_of_a_data_file_is_in_no_key(tmp_path: Path) -> None:
    text = TASK.replace('data = "digits"', 'data = { kind = "arrays", path = "set.npz" }')
    (tmp_path / "data").mkdir()
    shutil.copy(ROOT / "stages" / "data" / "digits.npz", tmp_path / "data" / "set.npz")
    before = planned(tmp_path, text)
    os.utime(tmp_path / "data" / "set.npz", (1, 1))
    assert keys(planned(tmp_path, text)) == keys(before)


@pytest.mark.parametrize(
    ("setting", "changed"),
    [
        ("seed=1", LINE),
        ("task.holdout=0.2", LINE),
        ("task.threat.eps=0.2", LINE),
        ("train.epochs=3", ["train"]),
        ("train.checkpoint_seconds=3", ["train"]),
        ("validate.samples=44", ["validate"]),
        ("train.timeout_seconds=60", []),
        ("train.epochs=20", []),  # the default, spelt out
    ],
)
def test_what_a_stage_is_asked_for_changes_its_own_key(tmp_path: Path, setting: str, changed: list[str]) -> None:
    before, after = keys(planned(tmp_path)), keys(planned(tmp_path, settings=[setting]))
    assert [name for name in before if before[name] != after[name]] == changed


def test_other_inputs_other_libraries_and_other_data_are_other_keys(tmp_path: Path) -> None:
    made = planned(tmp_path)
    step = made.steps[1]
    attempt, task = step.attempts[0], made.spec.task
    key = step.key(attempt, task, made.data_digest, {"a": "1"})
    assert key == step.key(attempt, task, made.data_digest, {"a": "1"})
    newer = step.model_copy(update={"libraries": {**step.libraries, "torch": "99"}})
    richer = step.model_copy(update={"budget": made.steps[-1].budget, "procs": 2, "timeout_seconds": 5.0})
    others = {
        step.key(attempt, task, made.data_digest, {"a": "2"}),
        step.key(attempt, task, made.data_digest, {"b": "1"}),
        step.key(attempt, task, "0" * 64, {"a": "1"}),
        newer.key(attempt, task, made.data_digest, {"a": "1"}),
    }
    assert len({key, *others}) == 5
    assert richer.key(attempt, task, made.data_digest, {"a": "1"}) == key


def test_every_default_shows_in_the_config(tmp_path: Path) -> None:
    for step in planned(tmp_path).steps:
        config = step.attempts[0].config
        assert pages.stage(step.name).Config.model_validate(config).model_dump(mode="json") == config
    train = planned(tmp_path).steps[1].attempts[0].config
    assert (train["kind"], train["epochs"], train["holdout_attack"]["kind"]) == ("at", 20, "pgd")


def classes(root: Path) -> list[Path]:
    """A folder data set of four files, every one of other bytes."""
    for number, name in enumerate(("cat/a.png", "cat/b.png", "dog/c.png", "dog/d.png")):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(bytes([number]) * 10)
    return files(root)


def files(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*") if path.is_file())


def digested(root: Path, memo: Path, below: Path | None = None) -> str:
    return fingerprint.data_digest(files(root), below or root, memo)


def test_a_file_that_changes_its_class_or_its_bytes_changes_the_data(tmp_path: Path) -> None:
    root, memo = tmp_path / "data", tmp_path / "memo.json"
    classes(root)
    first = digested(root, memo)
    (root / "cat" / "a.png").rename(root / "dog" / "a.png")
    moved = digested(root, memo)
    (root / "dog" / "a.png").rename(root / "cat" / "a.png")
    assert digested(root, memo) == first
    (root / "cat" / "a.png").write_bytes(b"x" * 10)
    changed = digested(root, memo)
    (root / "cat" / "a.png").unlink()
    gone = digested(root, memo)
    assert len({first, moved, changed, gone}) == 4


def test_two_files_that_swap_their_names_change_the_data(tmp_path: Path) -> None:
    root, memo = tmp_path / "data", tmp_path / "memo.json"
    one, other, *_ = classes(root)
    first = digested(root, memo)
    spare = root / "spare"
    one.rename(spare)
    other.rename(one)
    spare.rename(other)
    assert digested(root, memo) != first


@pytest.mark.parametrize("inside", [True, False])
def test_a_data_set_that_moves_as_a_whole_does_not_change(tmp_path: Path, inside: bool) -> None:
    """Below the data root, and beside it, where the spec gives an absolute path."""
    here, there = tmp_path / "here", tmp_path / "far" / "away"
    classes(here)
    roots = (here, there) if inside else (tmp_path / "root", tmp_path / "other root")
    first = digested(here, tmp_path / "memo.json", roots[0])
    shutil.copytree(here, there)
    assert digested(there, tmp_path / "memo.json", roots[1]) == first
    (there / "cat" / "a.png").rename(there / "dog" / "a.png")
    assert digested(there, tmp_path / "memo.json", roots[1]) != first


def test_the_memo_saves_reading_and_is_never_trusted_beyond_size_and_time(tmp_path: Path) -> None:
    root, memo = tmp_path / "data", tmp_path / "memo.json"
    path = classes(root)[0]
    first = digested(root, memo)
    stored = json.loads(memo.read_bytes())["files"]
    assert stored[str(path)][2] == file_digest(path)
    stored[str(path)][2] = "0" * 64
    memo.write_text(json.dumps({"files": stored, "digest": digest(stored)}))
    assert digested(root, memo) != first  # a size and a time that it knows: it is believed
    os.utime(path, (1, 1))
    assert digested(root, memo) == first  # another time: read again
    for torn in ("", "{", "[]", "3"):
        memo.write_text(torn)
        assert digested(root, memo) == first


def test_a_data_set_at_another_data_root_is_the_same_plan(tmp_path: Path) -> None:
    text = TASK.replace('data = "digits"', 'data = { kind = "arrays", path = "set.npz" }')
    for place in ("one", "two"):
        (tmp_path / place).mkdir()
        shutil.copy(ROOT / "stages" / "data" / "digits.npz", tmp_path / place / "set.npz")
    one = planned(tmp_path / "a", text, data=tmp_path / "one")
    two = planned(tmp_path / "b", text, data=tmp_path / "two")
    assert keys(one) == keys(two)
    assert one.spec_digest == two.spec_digest


def test_modules_are_followed_through_every_form_of_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "stages"
    for name, text in {
        "__init__.py": "",
        "a.py": "import json, stages.b\nfrom stages import c\nfrom stages.deep import d\nfrom .deep.e import thing\n",
        "b.py": "def late() -> None:\n    from stages.f import thing\n",
        "c.py": "",
        "f.py": "",
        "unused.py": "",
        "deep/__init__.py": "",
        "deep/d.py": "from . import g\nfrom ..h import thing\n",
        "deep/e.py": "thing = 1\n",
        "deep/g.py": "",
        "h.py": "",
    }.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(text)
    monkeypatch.setattr(fingerprint, "REPOSITORY", tmp_path)
    caches = (fingerprint._imports, fingerprint._file_of)
    try:
        reached = set()
        for path in sorted(package.rglob("*.py")):
            for cached in caches:
                cached.cache_clear()
            before = fingerprint.code_digest(["stages.a"])
            path.write_text(path.read_text() + "\n# edited\n")
            for cached in caches:
                cached.cache_clear()
            if fingerprint.code_digest(["stages.a"]) != before:
                reached.add(path.relative_to(package).as_posix())
        expected = {path.relative_to(package).as_posix() for path in package.rglob("*.py")} - {"unused.py"}
        assert reached == expected
    finally:
        for cached in caches:
            cached.cache_clear()
