"""What a plan remembers: an unchanged one imports nothing heavy, and whatever it depends on makes it anew."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.core.spec import read
from pipeline.engine.plan import plan
from pipeline.engine.step import Plan

ROOT = Path(__file__).resolve().parents[3]
TASK = '[task]\ndata = "digits"\nthreat = { norm = "linf", eps = "0.1" }\n'

SCRIPT = """
import sys
from pathlib import Path
from pipeline.core.spec import read
from pipeline.engine.plan import plan
spec, runs, data = map(Path, sys.argv[1:])
made = plan(read(spec), "x86_cpu", runs, data)
heavy = sorted({"torch", "numpy", "stages", "onnx", "onnxruntime"} & {name.partition(".")[0] for name in sys.modules})
print(made.spec_digest, made.data_digest, *heavy)
"""


def replanned(spec: Path, runs: Path, data: Path) -> list[str]:
    """Spec digest, data digest, and the heavy packages that a fresh process imported to plan."""
    command = [sys.executable, "-c", SCRIPT, str(spec), str(runs), str(data)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_an_unchanged_spec_is_planned_without_torch_and_changed_data_are_seen(tmp_path: Path) -> None:
    data = tmp_path / "data"
    rng = np.random.default_rng(0)
    for part in ("train", "test"):
        for name in ("cat", "dog"):
            (data / "pets" / part / name).mkdir(parents=True)
            for number in range(3):
                pixels = rng.integers(0, 256, (8, 8), dtype=np.uint8)
                Image.fromarray(pixels).save(data / "pets" / part / name / f"{number}.png")
    text = TASK.replace('data = "digits"', 'data = { kind = "folder", path = "pets" }')
    (tmp_path / "spec.toml").write_text(text)
    draft, runs = read(tmp_path / "spec.toml"), tmp_path / "runs"
    first = plan(draft, "x86_cpu", runs, data)
    spec, digest, *heavy = replanned(tmp_path / "spec.toml", runs, data)
    assert (spec, digest, heavy) == (first.spec_digest, first.data_digest, [])

    Image.fromarray(np.zeros((8, 8), np.uint8)).save(data / "pets" / "train" / "dog" / "0.png")
    changed = plan(draft, "x86_cpu", runs, data)
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(data / "pets" / "train" / "dog" / "new.png")
    added = plan(draft, "x86_cpu", runs, data)
    (data / "pets" / "train" / "dog" / "new.png").unlink()
    removed = plan(draft, "x86_cpu", runs, data)
    assert len({first.data_digest, changed.data_digest, added.data_digest}) == 3
    assert removed == changed
    assert {first.spec_digest, changed.spec_digest, added.spec_digest} == {first.spec_digest}


def test_a_torn_memo_is_no_memo(tmp_path: Path) -> None:
    (tmp_path / "spec.toml").write_text(TASK)

    def again() -> Plan:
        return plan(read(tmp_path / "spec.toml"), None, tmp_path / "runs", tmp_path / "data")

    made = again()
    (memo,) = (tmp_path / "runs" / "store" / "plans").iterdir()
    for text in ("", "{", "{}", '{"files": {}, "plan": {}}', "[]"):
        memo.write_text(text)
        assert again() == made
    assert json.loads(memo.read_text())["plan"] == made.dump()  # and was written anew


def test_a_flipped_byte_in_what_is_remembered_changes_no_plan(tmp_path: Path) -> None:
    limit = '[[budget.train]]\nmetric = "accuracy.robust.holdout"\nat_least = 0.5\n'
    (tmp_path / "spec.toml").write_text(TASK + limit)
    store = tmp_path / "runs" / "store"

    def again() -> Plan:
        return plan(read(tmp_path / "spec.toml"), None, tmp_path / "runs", tmp_path / "data")

    made = again()
    (memo,) = (store / "plans").iterdir()
    whole, known = memo.read_bytes(), (store / "data.json").read_bytes()
    bound = whole.index(b'"at_least":0.5') + len(b'"at_least":0.')
    for at in (bound, *range(11, len(whole), len(whole) // 12)):
        memo.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        assert again() == made
        assert memo.read_bytes() == whole
    for at in range(5, len(known), len(known) // 12):
        memo.unlink()
        (store / "data.json").write_bytes(known[:at] + bytes([known[at] ^ 1]) + known[at + 1 :])
        assert again() == made
        assert (store / "data.json").read_bytes() == known
