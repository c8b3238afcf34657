"""One network in many forms of file is one network: the same verdict for every image; and what is proved of which."""

from dataclasses import replace
from functools import cache
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor

from stages import validity
from stages.adapter import Form
from stages.attacks.auto import Auto
from stages.attacks.base import Attack
from stages.attacks.fab import FAB
from stages.attacks.pgd import PGD
from stages.attacks.worst_of import WorstOf
from stages.bounds.ibp import IBP
from stages.bounds.quantised import Quantised
from stages.data.digits import Digits
from stages.members import named
from stages.method import InputError
from stages.subject import Subject, opened
from stages.threat import Threat
from stages.verdicts import Plan, Verdicts, check_labels, judge
from targets.passes import qdq_int8_cpu
from targets.passes.base import Kit
from tests.audited import MEAN, STD, file

THREAT = Threat(norm="linf", eps=0.03)
ATTACKS: tuple[Attack, ...] = (PGD(steps=10, loss="margin"), FAB(steps=10, targets=9))
WANTED = {
    "pixels": Form(),
    "normal": Form(mean=(MEAN,), std=(STD,)),
    "bytes": Form(pixels=(0.0, 255.0)),
    "centred": Form(pixels=(-1.0, 1.0)),
    "nhwc": Form(layout="nhwc"),
    "column": Form(),
    "single": Form(),
    "triple": Form(),
}


@cache
def shown() -> tuple[Tensor, Tensor]:
    test = Digits().read(Path()).test
    return test.floats(slice(0, 60)), test.labels[:60]


def subject(folder: Path, form: str = "pixels", end: str = "logits") -> Subject:
    return opened(file(folder / f"{form}-{end}.onnx", form, end), shown()[0], WANTED[form], 1)


def judged(given: Subject, certify: bool = False, shortcuts: bool = True) -> Verdicts:
    x, y = shown()
    certifiers = {"ibp": IBP()} if certify else {}
    plan = Plan(THREAT, named(ATTACKS, THREAT), certifiers, shortcuts, 0)
    return judge(given, x, y, torch.arange(len(x)), plan, lambda attack: attack, lambda _: lambda _done, _total: None)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Verdicts:
    return judged(subject(tmp_path_factory.mktemp("plain")), certify=True)


@pytest.mark.parametrize("form", [form for form in WANTED if form != "pixels"])
def test_the_verdict_of_every_image_is_the_same_whatever_the_file_wants(
    form: str, plain: Verdicts, tmp_path: Path
) -> None:
    certify = form in ("bytes", "column")
    found = judged(subject(tmp_path, form), certify, shortcuts=certify)
    assert torch.equal(found.right, plain.right)
    assert torch.equal(found.robust, plain.robust)
    assert 0 < int(plain.robust.sum()) < int(plain.right.sum())
    if certify:
        assert found.certified is not None
        assert plain.certified is not None
        assert torch.equal(found.certified, plain.certified)


def test_without_shortcuts_everything_is_attacked_and_every_verdict_is_the_same(
    plain: Verdicts, tmp_path: Path
) -> None:
    whole = judged(subject(tmp_path), certify=True, shortcuts=False)
    assert plain.certified is not None
    assert int(plain.certified.sum()) >= 10
    assert torch.equal(whole.robust, plain.robust)
    assert bool(whole.robust[plain.certified].all())
    first = next(iter(whole.struck.hits))
    assert torch.equal(whole.struck.hits[first].tried, whole.right)
    assert not bool(plain.struck.hits[first].tried[plain.certified].any())
    for name, hit in whole.struck.hits.items():
        assert int(plain.struck.hits[name].spent.gradients.sum()) < int(hit.spent.gradients.sum())


def test_what_is_stored_is_what_the_first_attack_that_broke_it_found(plain: Verdicts) -> None:
    broken = plain.right & ~plain.robust
    assert [name is not None for name in plain.struck.stored] == broken.tolist()
    distance = THREAT.distance(plain.struck.x_adv, shown()[0])
    assert torch.equal(distance > 0, broken)
    assert float(distance.max()) <= THREAT.eps + 1e-6
    for line in plain.lines:
        assert line.tried - line.broke == int(
            (plain.struck.hits[line.name].survived & plain.struck.hits[line.name].tried).sum()
        )


def test_bounds_give_up_twice_the_gap_between_file_and_twin(tmp_path: Path) -> None:
    given = replace(subject(tmp_path), gap=1e-3)  # on some processors both sum alike, and there is none
    x, y = shown()
    assert given.twin is not None
    bare = IBP().margins(given.twin, x, y, THREAT)
    found = judged(given, certify=True).proved.margins["ibp"]
    torch.testing.assert_close(found, bare - 2 * given.gap, rtol=0, atol=1e-5)


def test_after_a_softmax_the_gap_is_that_of_logits(tmp_path: Path) -> None:
    given, logits = subject(tmp_path, end="softmax"), subject(tmp_path)
    assert given.twin is not None
    assert logits.twin is not None
    assert 0 < given.gap < 1e-4
    torch.testing.assert_close(given.twin(shown()[0]), logits.twin(shown()[0]))
    assert "softmax" in given.text


def test_after_a_log_softmax_as_much_is_proved(plain: Verdicts, tmp_path: Path) -> None:
    found = judged(subject(tmp_path, end="log_softmax"), certify=True)
    assert plain.certified is not None
    assert found.certified is not None
    assert torch.equal(found.certified, plain.certified)
    assert torch.equal(found.robust, plain.robust)


def test_an_int8_file_is_proved_by_what_covers_rounding_alone_and_values_are_its_own(tmp_path: Path) -> None:
    x, _ = shown()
    source = onnx.load(file(tmp_path / "float.onnx"))
    source.graph.input[0].name = source.graph.node[0].input[0] = "input"
    made = qdq_int8_cpu.lower(source, {}, Kit(x.numpy(), tmp_path))
    path = tmp_path / "int8.onnx"
    path.write_bytes(made.SerializeToString())
    given = opened(path, x, Form(), 1)
    assert given.twin is not None
    assert given.twin.twin.rounds
    assert torch.equal(given.attacked(x), given.file(x))
    found = judged(given, certify=True)
    assert found.certified is not None
    assert int(found.certified.sum()) == 0
    assert "proves nothing about this file: the file rounds" in found.proved.findings[0].text
    assert 0 < int(found.robust.sum()) < int(found.right.sum())
    x, y = shown()
    plan = Plan(THREAT, named(ATTACKS, THREAT), {"quantised": Quantised()}, False, 0)
    proved = judge(given, x, y, torch.arange(len(x)), plan, lambda attack: attack, lambda _: lambda _done, _total: None)
    assert proved.certified is not None
    assert int(proved.certified.sum()) > 5
    assert bool((proved.robust | ~proved.certified).all())  # attacked all the same, and none was broken
    assert torch.equal(proved.robust, found.robust)


@pytest.mark.parametrize("end", ["neighbours", "position"])
def test_outputs_that_depend_on_the_rest_of_the_batch_are_found(end: str, tmp_path: Path) -> None:
    given, x = subject(tmp_path, end=end), shown()[0]
    assert not validity.batch_free(given.file, x).ok
    assert validity.repeatable(given.file, x).ok
    assert validity.batch_free(subject(tmp_path).file, x).ok


def test_ensembles_are_listed_as_their_members() -> None:
    assert list(named((Auto(),), THREAT)) == ["apgd_ce", "apgd_dlr_targeted", "fab_targeted", "square"]
    twice = WorstOf(attacks=(PGD(), PGD(steps=3), WorstOf(attacks=(PGD(steps=4),))))
    assert list(named((twice,), THREAT)) == ["pgd", "pgd_2", "pgd_3"]


def test_labels_and_outputs_must_fit(tmp_path: Path) -> None:
    given = subject(tmp_path)
    assert check_labels(given, torch.tensor([0, 9]), ["a"] * 10) is None
    assert check_labels(given, torch.tensor([0, 1]), ["a", "b"]) == "the file has 10 outputs, the data 2 classes"
    with pytest.raises(InputError, match="it has 10 outputs, but the data holds labels up to 10"):
        check_labels(given, torch.tensor([0, 10]), ["a"] * 11)
