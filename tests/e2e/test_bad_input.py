"""What a hostile or hurried user may give, on the real command line: one clear message, the right status, no trace."""

import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.cli import COMMANDS, main
from tests.real_line import pipeline

BASE = 'preset = "digits"\n'
Refuse = Callable[..., str]


@pytest.fixture
def refuse(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Refuse:
    """Run a command that must end in status 2, in a folder of its own; the message, which is all that is said."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    monkeypatch.delenv("TEMPER_DATA", raising=False)

    def run(*argv: str) -> str:
        capsys.readouterr()
        try:
            status = main(list(argv))
        except SystemExit as end:
            status = int(str(end.code))
        said = capsys.readouterr()
        assert status == 2, said
        assert said.out == ""
        assert said.err.startswith("temper")
        assert "Traceback" not in said.err
        return said.err

    return run


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "spec.toml: the spec is empty; expected at least [task]"),
        ("\n# nothing\n", "spec.toml: the spec is empty"),
        ("a = = 1\n", "spec.toml: not TOML: Invalid value (at line 1"),
        ('name = "a"\nname = "b"\n', "spec.toml: not TOML: Cannot overwrite a value (at line 2"),
        ('name = "x"\n', 'task: missing; expected a section such as [task] with data = "mnist"'),
        ('preset = "digit"\n', 'spec.toml:1: no preset "digit"; did you mean "digits"?'),
        ("preset = 3\n", "spec.toml:1: preset: expected a name, got 3"),
        (BASE + 'nmae = "x"\n', 'spec.toml:2: nmae: unknown key; did you mean "name"?'),
        (BASE + "[buget]\n", 'spec.toml:2: buget: unknown key; did you mean "budget"?'),
        (BASE + "[stages.trian]\n", 'spec.toml:2: stages.trian: unknown stage; did you mean "train"?'),
        (
            BASE + "[stages.train]\nepohcs = 1\n",
            'spec.toml:3: stages.train.epohcs: unknown key; did you mean "epochs"?',
        ),
        (BASE + "[task]\nholdot = 0.1\n", 'spec.toml:3: task.holdot: unknown key; did you mean "holdout"?'),
        (BASE + '[task]\nthreat = { norm = "linf", epz = 1 }\n', "task.threat.epz: unknown key"),
        (
            BASE + "[stages.search]\narch = { wdith = 3 }\n",
            'arch: builder "small_cnn": wdith: unknown key; did you mean',
        ),
        (
            BASE + '[stages.validate]\ndetector = "feature_squeezin"\n',
            'spec.toml:3: stages.validate.detector: no method "feature_squeezin" in detectors; did you mean "feature',
        ),
        (
            BASE + '[stages.validate.detector]\nkind = "feature_squeezing"\nsqueezers = ["median_3"]\n',
            'stages.validate.detector.squeezers.0: expected "bit_1" to "bit_8", "median_2", or "nlm_SEARCH_PATCH_',
        ),
        (
            BASE + '[stages.validate.detector]\nkind = "feature_squeezing"\nfalse_alarms = 1\n',
            "spec.toml:4: stages.validate.detector.false_alarms: expected less than 1",
        ),
        (
            BASE + '[stages.validate.detector]\nkind = "feature_squeezing"\nadaptive = { stpes = 3 }\n',
            'stages.validate.detector.adaptive.stpes: unknown key; did you mean "steps"?',
        ),
        (
            BASE + '[[budget.validate]]\nmetric = "accuracy.robust.detected.test"\nat_least = 0.5\n',
            'validate does not measure "accuracy.robust.detected.test" with this config',
        ),
        (BASE + '[[budget.train]]\nmetrik = "x"\nat_least = 1\n', "spec.toml:2: budget.train.metric: missing"),
        (
            BASE + '[[budget.train]]\nmetric = "accuracy.clean.holdout"\nat_least = 88\n',
            "spec.toml:4: budget.train.at_least: expected 0 to 1, since accuracy.clean.holdout is a share, got 88; "
            "did you mean 0.88?",
        ),
        (
            BASE + '[[budget.export]]\nmetric = "size.model"\nat_most = -1\n',
            "spec.toml:4: budget.export.at_most: expected at least 0, since size.model is never below, got -1",
        ),
        (
            BASE + '[[budget.export]]\nmetric = "size.model"\nat_least = 10\nat_most = 5\n',
            "spec.toml:5: budget.export.at_most: expected at least 10, which is at_least of the same limit",
        ),
        (
            BASE + '[[regression.validate]]\nmetric = "accuracy.robust.test"\nmax_loss = 2\n',
            "spec.toml:4: regression.validate.max_loss: expected 0 to 1, since accuracy.robust.test is a share, got 2",
        ),
        (
            BASE + "[stages.compress]\nratio = 0.3\nattempts = [{ ratio = 0.5 }, { ratio = 0.2 }]\n",
            "spec.toml:3: stages.compress.ratio: every attempt sets it too, so this is never used; drop one",
        ),
        (BASE + '[stages.train]\nepochs = "ten"\n', 'stages.train.epochs: expected a whole number, got "ten"'),
        (BASE + '[stages.train]\nepochs = "3"\n', 'stages.train.epochs: expected a whole number, got "3"'),
        (BASE + "[stages.train]\nepochs = true\n", "stages.train.epochs: expected a whole number, got true"),
        (BASE + "[stages.train]\nepochs = 2.5\n", "stages.train.epochs: expected a whole number, got 2.5"),
        (BASE + "[stages.train]\nepochs = -3\n", "stages.train.epochs: expected at least 0, got -3"),
        (BASE + "[stages.train]\nnesterov = 1\n", "stages.train.nesterov: expected true or false, got 1"),
        (BASE + '[task]\nholdout = "0.1"\n', 'task.holdout: expected a number, got "0.1"'),
        (BASE + "[task]\nholdout = 1.0\n", "task.holdout: expected less than 1, got 1.0"),
        (BASE + "stages = [1, 2]\n", "spec.toml:2: stages: expected a table, got [1, 2]"),
        (BASE + '[stages]\ntrain = "at"\n', "spec.toml:3: stages.train: expected a table, got 'at'"),
        (BASE + "[[stages.train]]\nepochs = 3\n", "spec.toml:2: stages.train: expected a table, got [{'epochs': 3}]"),
        (BASE + "[budget]\ntrain = 3\n", "spec.toml:3: budget.train: expected tables, [[budget.train]], got 3"),
        (BASE + "[budget]\ntrain = [3]\n", "budget.train.0: expected a table, got 3"),
        (BASE + 'task = "mnist"\n', "spec.toml:2: task: expected a table, got 'mnist'"),
        (BASE + "seed = 2020-01-01\n", "spec.toml:2: seed: expected a number, a text, a list or a table, got the date"),
        (BASE + "[stages.train]\nlr = inf\n", "spec.toml:3: stages.train.lr: expected a finite number, got inf"),
        (BASE + "[task]\nholdout = nan\n", "spec.toml:3: task.holdout: expected a finite number, got nan"),
        (BASE + "seed = -1\n", "spec.toml:2: seed: expected at least 0, got -1"),
        (BASE + 'seed = "1"\n', 'spec.toml:2: seed: expected a whole number, got "1"'),
        (BASE + 'name = "../evil"\n', 'spec.toml:2: name: expected up to 100 letters, digits, ".", "_" and "-"'),
        (BASE + f'name = "{"a" * 101}"\n', "spec.toml:2: name: expected up to 100 letters"),
        (BASE + 'target = "jetsn"\n', 'spec.toml:2: target: no target "jetsn"; did you mean "jetson"?'),
        (BASE + 'target = "../x86_cpu"\n', 'no target "../x86_cpu"; did you mean "x86_cpu"?'),
        (BASE + '[task]\ndata = "digts"\n', 'task.data: no method "digts" in data; did you mean "digits"?'),
        (BASE + '[stages.train]\nkind = "tradse"\n', 'stages.train.kind: no method "tradse" in recipes; did you mean'),
        (BASE + '[stages.train]\nkind = "../at"\n', 'stages.train.kind: no method "../at" in recipes; there is at,'),
        (
            BASE + '[stages.validate]\nattacks = ["pgdd"]\n',
            'attacks.0: no method "pgdd" in attacks; did you mean "pgd"?',
        ),
        (
            BASE + '[stages.validate]\nattacks = [{ kind = "pgd", stepz = 3 }]\n',
            "attacks.0.stepz: unknown key; did you",
        ),
        (BASE + '[stages.search]\narch = { builder = "smal_cnn" }\n', 'no method "smal_cnn" in builders; did you mean'),
        (BASE + '[task]\nthreat = { norm = "linf", eps = 0 }\n', "eps: expected more than 0, got 0"),
        (BASE + '[task]\nthreat = { norm = "linf", eps = 8 }\n', 'got 8; did you mean "8/255"?'),
        (BASE + '[task]\nthreat = { norm = "linf", eps = -0.1 }\n', "task.threat.eps: expected at least 0, got -0.1"),
        (BASE + '[task]\nthreat = { norm = "linf", eps = "8/0" }\n', 'a fraction such as "8/255", got "8/0"'),
        (BASE + '[[budget.train]]\nmetric = "latency.p50"\nat_most = 3\n', 'train does not measure "latency.p50"'),
        (
            BASE + '[[budget.train]]\nmetric = "accuracy.robust.holdot"\nat_least = 0.1\n',
            'spec.toml:2: budget.train: train does not measure "accuracy.robust.holdot" with this config; did you mean',
        ),
        (BASE + '[[budget.train]]\nmetric = "accuracy.clean.holdout"\n', "expected at_least, at_most or max_loss"),
        (BASE + "[stages.compress]\nattempts = []\n", "stages.compress.attempts: expected a list of overrides"),
        (BASE + "[stages.train]\nprocs = 0\n", "stages.train.procs: expected a whole number of at least 1, got 0"),
    ],
)
def test_a_spec_that_does_not_fit_is_one_line_that_says_where(
    refuse: Refuse, tmp_path: Path, text: str, message: str
) -> None:
    (tmp_path / "spec.toml").write_text(text)
    said = refuse("plan", "spec.toml")
    assert message in said
    findings = 2 if "metrik" in text else 1  # that one lacks a key and has an unknown one
    assert said.count("\n") == findings
    assert not (tmp_path / "runs" / "store" / "plans").exists()


def test_findings_of_all_sections_come_at_once_with_their_lines(refuse: Refuse, tmp_path: Path) -> None:
    text = 'nmae = "x"\n[stages.train]\nepohcs = 1\n[task]\nholdout = 2\n[[budget.export]]\n[[budget.export]]\nx = 1\n'
    (tmp_path / "spec.toml").write_text(BASE + text)
    said = refuse("build", "spec.toml")
    for place in ("2: nmae", "4: stages.train.epohcs", "6: task.holdout", "7: budget.export", "9: budget.export.x"):
        assert f"spec.toml:{place}" in said


def test_specs_of_other_editors_and_other_builders_load(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "my spec.toml").write_text("\ufeff" + BASE + '[stages.search]\narch = { builder = "wrn" }\n')
    assert main(["plan", str(tmp_path / "my spec.toml"), "--runs", str(tmp_path / "with spaces")]) == 0
    assert "my-spec for reference" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("plan nope.toml", "nope.toml: no such file; `python -m pipeline init` writes a spec"),
        ("plan mnist", "mnist: no such file; the preset of that name is `--preset mnist`"),
        ("plan .", "cannot be read: Is a directory"),
        ("plan binary", "binary: expected UTF-8 text, got byte 0xff"),
        ("plan --preset digit", 'no preset "digit"; did you mean "digits"?'),
        ("plan --preset digits binary", "not allowed with argument"),
        ("plan --target x86", '--target: no target "x86"; did you mean "x86_cpu"?'),
        ("plan --seed -1", "--set seed=-1: seed: expected at least 0, got -1"),
        ("plan --seed x", "argument --seed: invalid int value: 'x'"),
        ("plan --name ../evil", "name: expected up to 100 letters"),
        ("plan --set train.epochs", 'expected a.b=value, such as "train.epochs=3"'),
        ("plan --set foo.x=1", 'no section "foo"'),
        (
            "plan --set train.epochs=ten",
            '--set train.epochs=ten: stages.train.epochs: expected a whole number, got "ten"',
        ),
        ("plan --set preset=mnist", "give it with --preset"),
        ("plan --runs file", "file/store/"),
        ("build --runs file", "file/store/"),
        ("build --threads 0", 'argument --threads: expected a whole number of at least 1, got "0"'),
        ("build --device gpu", 'argument --device: expected cpu, cuda or cuda:N, got "gpu"'),
        ("build --preset mnist", "task.data: "),
        ("build --nope", "unrecognized arguments: --nope"),
        ("bild", 'no command "bild"; did you mean "build"?'),
        ("ci", "the following arguments are required: --baseline"),
        ("ci --baseline nope", "nope: expected a baseline here, there is none"),
        ("ci --baseline binary", "binary: the baseline is not JSON"),
        ("ci --baseline .", "the baseline cannot be read: Is a directory"),
        ("ci --baseline empty.json", "not a baseline of a run: name: "),
        ("report nope", "nope: expected a record.json, a folder that holds one, or the name of a run; there is no run"),
        ("report binary", "the record is not JSON"),
        ("report empty.json --format pdf", "invalid choice: 'pdf'"),
        ("list foo", 'unknown kind "foo"; there is attacks'),
        ("init nope", "nope: does not exist; expected a folder with a folder per class, or a .npz"),
        ("init binary", "binary: expected a .npz archive of named arrays, got another kind of file"),
        ("init . --target jetsn", 'unknown target "jetsn"; did you mean "jetson"?'),
        ("verify nope", "nope: not a bundle, it holds no manifest.json"),
        ("verify .", "not a bundle"),
        ("serve nope", "nope: not a bundle"),
        ("finish nope", "nope: not a bundle"),
        ("finish nope --runs 0", "argument --runs: expected a whole number of at least 1"),
        ("serve nope --threads 0", "argument --threads: expected a whole number of at least 1"),
    ],
)
def test_a_command_line_that_does_not_fit_is_one_line(refuse: Refuse, tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00a=3")
    (tmp_path / "file").write_text("not a folder")
    (tmp_path / "empty.json").write_text("{}")
    said = refuse(*line.split())
    assert message in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_a_help_text_that_fits_a_screen(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"^0$"):
        main([command, "--help"])
    text = capsys.readouterr().out
    assert COMMANDS[command][1].partition(";")[0][:40] in " ".join(text.split())
    assert max(map(len, text.splitlines())) <= 100


def images(count: int = 60, side: int = 8) -> "np.ndarray[tuple[int, ...], np.dtype[np.uint8]]":
    return np.random.default_rng(0).integers(0, 256, (count, side, side), dtype=np.uint8)


def labels(count: int = 60) -> "np.ndarray[tuple[int, ...], np.dtype[np.int64]]":
    return np.arange(count) % 3


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": images(), "labels": np.zeros(60, int)}, "expected at least two classes, got only one (label 0)"),
        ({"images": images(), "labels": labels() - 1}, "labels: expected numbers from 0 on, got -1"),
        (
            {"images": images(), "labels": labels(), "classes": np.array(["a", "b"])},
            "expected labels within 0..1, got 0..2",
        ),
        ({"images": images(), "labels": labels() * 2}, "labels: up to 4, but none is 1"),
        ({"images": images(), "labels": labels(59)}, "expected 60 labels, one per image, got (59,)"),
        ({"images": images() / 100, "labels": labels()}, "expected floats in [0, 1]"),
        ({"images": np.full((60, 8, 8), np.nan), "labels": labels()}, "expected floats in [0, 1], got nan..nan"),
        (
            {"images": np.array([object()] * 60), "labels": labels()},
            "not a readable .npz of plain arrays: Object arrays",
        ),
        ({"images": images()}, 'no array "labels"; there is images'),
    ],
)
def test_arrays_that_cannot_be_used_end_init_and_build_alike(
    refuse: Refuse, tmp_path: Path, arrays: dict[str, "np.ndarray[tuple[int, ...], np.dtype[np.generic]]"], message: str
) -> None:
    np.savez(tmp_path / "own.npz", **arrays)  # type: ignore[arg-type]  # numpy's stub takes its flag for a name
    said = refuse("init", "own.npz")
    assert "own.npz" in said
    assert message in said
    assert not (tmp_path / "spec.toml").exists()
    path = tmp_path / "own.npz"
    said = refuse("build", "--quiet", "--set", f'task.data={{ kind = "arrays", path = "{path}" }}')
    assert message in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("cut", [0, 200, -300])
def test_a_cut_and_a_flipped_file_are_named_and_the_whole_one_carries_on(
    refuse: Refuse, tmp_path: Path, cut: int
) -> None:
    path = tmp_path / "own.npz"
    np.savez(path, images=images(), labels=labels())
    whole = path.read_bytes()
    broken = bytearray(whole)
    broken[900] ^= 1
    for data in (whole[:cut], bytes(broken)):
        path.write_bytes(data)
        assert f"{path}: " in refuse("build", "--quiet", "--set", f'task.data={{ kind = "arrays", path = "{path}" }}')
    path.write_bytes(whole)
    assert main(["init", "own.npz"]) == 0


def picture(path: Path, side: int = 8) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(images(1, side)[0]).save(path)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda base: (base / "a" / "notes.txt").write_text("x"), "a/notes.txt: not a picture"),
        (lambda base: (base / "a" / "z.png").write_text("x"), "a/z.png: not a readable picture"),
        (lambda base: (base / "a" / "0.png").write_bytes((base / "a" / "0.png").read_bytes()[:60]), "a/0.png: not a"),
        (lambda base: (base / "c").mkdir(), "own/c: expected pictures of this class, got none"),
        (lambda base: shutil.rmtree(base / "b"), "own: expected a folder for each of at least two classes, got 1"),
        (lambda base: picture(base / "a" / "z.png", 12), "a/z.png: 12 x 12 pixels, but 0.png has 8 x 8; set size"),
    ],
)
def test_folders_that_cannot_be_used_are_named(
    refuse: Refuse, tmp_path: Path, spoil: Callable[[Path], object], message: str
) -> None:
    base = tmp_path / "own"
    for name in (f"{label}/{i}.png" for label in "ab" for i in range(12)):
        picture(base / name)
    spoil(base)
    said = refuse("build", "--quiet", "--set", f'task.data={{ kind = "folder", path = "{base}" }}')
    assert message in said
    assert said.count("\n") == 1


def test_a_store_of_a_newer_version_or_of_somebody_else_is_left_alone(refuse: Refuse, tmp_path: Path) -> None:
    store = tmp_path / "runs" / "store"
    store.mkdir(parents=True)
    for text, message in (
        ('{"schema_version": 99}', "a newer Temper wrote this store (version 99"),
        ("[]", "expected"),
    ):
        (store / "store.json").write_text(text)
        for command in ("build", "plan", "clean"):
            assert message in refuse(command)
        assert [path.name for path in store.iterdir()] == ["store.json"]


def test_every_byte_of_a_bundle_counts(refuse: Refuse, runs: Path, tmp_path: Path) -> None:
    whole = runs / "small-x86_cpu" / "bundle"
    names = [path.name for path in whole.iterdir()]
    assert {"model.onnx", "manifest.json", "report.html"} <= set(names)
    for name in names:
        data = (whole / name).read_bytes()
        for spoilt in (
            data[:-1],
            data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :],
        ):
            shutil.rmtree(tmp_path / "b", ignore_errors=True)
            shutil.copytree(whole, tmp_path / "b")
            (tmp_path / "b" / name).write_bytes(spoilt)
            assert name in refuse("verify", "b")
        (tmp_path / "b" / name).unlink()
        assert name in refuse("verify", "b")
        assert name in refuse("serve", "b")
    shutil.rmtree(tmp_path / "b")
    shutil.copytree(whole, tmp_path / "b")
    assert main(["verify", "b"]) == 0
    (tmp_path / "b" / "added.txt").write_text("x")
    assert "added.txt" in refuse("verify", "b")


def test_a_port_that_is_taken_or_is_none_is_said_before_anything_is_served(refuse: Refuse, runs: Path) -> None:
    bundle = str(runs / "small-x86_cpu")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        said = refuse("serve", bundle, "--port", port)
    assert f"cannot listen on 127.0.0.1 port {port}: Address already in use" in said
    assert "expected a whole number from 0 to 65535, got" in refuse("serve", bundle, "--port", "99999")


def test_a_foreign_or_garbled_baseline_is_refused_before_anything_is_built(
    refuse: Refuse, runs: Path, tmp_path: Path
) -> None:
    path = runs / "small-x86_cpu" / "record.json"
    for words in (["--target", "reference"], ["--target", "x86_cpu", "--set", "task.threat.eps=0.2"]):
        said = refuse("ci", "--preset", "digits", "--baseline", str(path), *words)
        assert "a foreign baseline" in said
    (tmp_path / "half.json").write_bytes(path.read_bytes()[:-100])
    assert "half.json: the baseline is not JSON" in refuse("ci", "--baseline", "half.json")
    newer = {**json.loads(path.read_bytes()), "schema_version": 99}
    (tmp_path / "newer.json").write_text(json.dumps(newer))
    assert "has schema version 99" in refuse("ci", "--baseline", "newer.json")
    assert not (tmp_path / "runs" / "store" / "outcomes").exists() or not any(
        (tmp_path / "runs/store/outcomes").iterdir()
    )


def test_an_accelerator_that_is_not_there_is_bad_input(tmp_path: Path) -> None:
    done = pipeline("build", "--device", "cuda:99", "--runs", tmp_path / "runs")
    assert done.returncode == 2
    assert done.stderr.startswith("temper: --device cuda:99: PyTorch sees")
    assert not (tmp_path / "runs").exists()
