"""`init`: what it says, what it writes, what it refuses; on folders, on archives and on the real traffic signs."""

import importlib.util
import tomllib
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from pipeline.cli import main
from pipeline.core.spec import Spec, read
from pipeline.engine.plan import plan
from stages.data.digits import Digits
from stages.task import Task

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TEMPER_DATA", raising=False)


def pictures(base: Path, count: int = 24, size: tuple[int, int] = (12, 12), names: str = "ab") -> Path:
    rng = np.random.default_rng(0)
    for name in names:
        (base / name).mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 256, (*size, 3), np.uint8)
            Image.fromarray(pixels).save(base / name / f"{name}_{i // 4}_{i % 4}.png")
    return base


def spec(path: str = "spec.toml") -> dict[str, object]:
    return tomllib.loads(Path(path).read_text(encoding="utf-8"))


def test_a_folder_becomes_a_spec_that_loads(capsys: pytest.CaptureFixture[str]) -> None:
    pictures(Path("my signs!"))
    assert main(["init", "my signs!", "--target", "jetson"]) == 0
    out = capsys.readouterr().out
    assert "48 images, 2 classes, 12x12, colour" in out
    assert "wrote spec.toml; set its budgets, then: python -m pipeline build spec.toml" in out
    assert "warning" not in out
    loaded = Spec.load(spec())
    assert (loaded.name, loaded.target) == ("my-signs", "jetson")
    task = Task.load(loaded.task)
    assert task.data.dump() | {"path": ""} == task.data.model_copy(update={"path": "", "size": 12}).dump()
    assert task.threat.eps == pytest.approx(8 / 255)
    splits = task.open(Path("data"))
    assert len(splits.train) + len(splits.holdout) + len(splits.test) == 48


def test_every_key_is_explained() -> None:
    pictures(Path("own"))
    assert main(["init", "own"]) == 0
    lines = Path("spec.toml").read_text(encoding="utf-8").splitlines()
    bare = [
        line
        for before, line in zip(["", *lines], lines, strict=False)
        if "=" in line and not line.startswith("#") and "#" not in line and not before.startswith("#")
    ]
    assert bare == []


def test_groups_are_passed_on_and_kept_whole(capsys: pytest.CaptureFixture[str]) -> None:
    pictures(Path("own"))
    pattern = r"^(\w_\d+)_\d\.png$"
    assert main(["init", "own", "--groups", pattern, "--size", "16", "--name", "signs"]) == 0
    assert "groups to train on, none divided" in capsys.readouterr().out
    task = Task.load(Spec.load(spec()).task)
    assert task.data.dump()["groups"] == pattern
    assert task.data.dump()["size"] == 16


def test_data_below_the_data_root_is_named_relative_to_it() -> None:
    pictures(Path("data/own"))
    assert main(["init", "data/own"]) == 0
    assert Task.load(Spec.load(spec()).task).data.dump()["path"] == "own"


def test_an_archive_of_grey_digits_gets_a_threat_for_ink() -> None:
    source = Digits().read(Path())
    np.savez("own.npz", images=source.train.images[:400, 0].numpy(), labels=source.train.labels[:400].numpy())
    assert main(["init", "own.npz", "--out", "sub/own.toml"]) == 0
    loaded = Spec.load(spec("sub/own.toml"))
    assert loaded.name == "own"
    task = Task.load(loaded.task)
    assert (task.data.kind, task.threat.eps) == ("arrays", 0.1)


def test_large_pictures_of_several_sizes_are_resized() -> None:
    pictures(Path("own"), size=(90, 70))
    Image.new("RGB", (80, 60)).save("own/a/odd.png")
    assert main(["init", "own"]) == 0
    assert Task.load(Spec.load(spec()).task).data.dump()["size"] == 64


def test_copies_imbalance_and_small_classes_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    base = pictures(Path("own"), count=120)
    for path in sorted((base / "b").iterdir())[8:]:
        path.unlink()
    (base / "a" / "copy.png").write_bytes((base / "b" / "b_0_0.png").read_bytes())
    assert main(["init", "own"]) == 0
    out = capsys.readouterr().out
    assert "warning: 1 images are exact copies of an image with another label" in out
    assert 'warning: unbalanced: "a" has 121, "b" 8' in out
    assert 'warning: "b" has only 8 images' in out
    assert "# warning: unbalanced" in Path("spec.toml").read_text(encoding="utf-8")


def test_an_existing_spec_is_kept_unless_forced(capsys: pytest.CaptureFixture[str]) -> None:
    pictures(Path("own"))
    Path("spec.toml").write_text("mine", encoding="utf-8")
    assert main(["init", "own"]) == 2
    assert "spec.toml: is there already; --force overwrites it" in capsys.readouterr().err
    assert Path("spec.toml").read_text(encoding="utf-8") == "mine"
    assert main(["init", "own", "--force"]) == 0
    assert Spec.load(spec()).name == "own"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nowhere"], "nowhere: does not exist"),
        (["own", "--target", "jetsn"], 'unknown target "jetsn"; did you mean "jetson"'),
        (["own", "--groups", "("], "not a regular expression"),
        (["own", "--groups", "zzz(z)"], 'does not match the group pattern "zzz(z)"'),
        (["own", "--size", "2"], "greater than or equal to 4"),
        (["own", "--name", "a/b"], '--name: expected letters, digits, ".", "_" and "-", got "a/b"'),
        (["own/a/a_0_0.png"], "a_0_0.png: expected a .npz archive"),
        (["own/a"], "expected folders only, one per class, got a file"),
    ],
)
def test_what_cannot_be_used_ends_in_status_2(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures(Path("own"), count=8)
    assert main(["init", *argv]) == 2
    assert message in capsys.readouterr().err
    assert not Path("spec.toml").exists()


def test_pictures_of_one_pixel_are_one_message(capsys: pytest.CaptureFixture[str]) -> None:
    pictures(Path("own"), size=(1, 1))
    np.savez("own.npz", images=np.zeros((40, 1, 1), np.uint8), labels=np.arange(40) % 2)
    for path in ("own", "own.npz"):
        assert main(["init", path]) == 2
        assert f"{path}: expected pictures of at least 4x4 pixels, got 1x1" in capsys.readouterr().err
    assert not Path("spec.toml").exists()


def test_an_unwritable_place_is_one_message(capsys: pytest.CaptureFixture[str]) -> None:
    pictures(Path("own"), count=8)
    Path("file").write_text("", encoding="utf-8")
    assert main(["init", "own", "--out", "file/spec.toml"]) == 2
    assert "file/spec.toml: cannot be written" in capsys.readouterr().err


def _script() -> ModuleType:
    at = importlib.util.spec_from_file_location("gtsrb_folder", ROOT / "benchmarks" / "gtsrb_folder.py")
    assert at is not None
    assert at.loader is not None
    module = importlib.util.module_from_spec(at)
    at.loader.exec_module(module)
    return module


@pytest.mark.data
def test_real_signs_through_a_folder(data_root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written: int = _script().write(data_root, Path("signs"), limit=5)
    assert main(["init", "signs"]) == 0
    assert "warning: neighbouring images look alike" in capsys.readouterr().out
    assert main(["init", "signs", "--force", "--groups", r"^(\d+_\d+)_"]) == 0
    assert "warning: neighbouring" not in capsys.readouterr().out
    splits = Task.load(Spec.load(spec()).task).open(Path("data"))
    parts = []
    for split in (splits.train, splits.holdout, splits.test):
        assert split.groups is not None
        assert set(split.labels.tolist()) == set(range(43))
        parts.append(set(split.groups.tolist()))
    assert sum(map(len, parts)) == len(set().union(*parts)) == 43 * 5
    assert written == len(splits.train) + len(splits.holdout) + len(splits.test) == 43 * 5 * 6


def test_what_init_writes_can_be_planned() -> None:
    for stage in ("search", "train", "compress", "validate", "export"):
        pytest.importorskip(f"stages.{stage}", exc_type=ModuleNotFoundError)
    pictures(Path("own"))
    assert main(["init", "own"]) == 0
    made = plan(read(Path("spec.toml")), None, Path("runs").resolve(), Path("data").resolve())
    assert [step.name for step in made.steps] == ["search", "train", "compress", "validate", "export"]
