"""Proofs and attacks together: whom an attack tries, what it may aim at, and that nothing changes by it."""

from typing import ClassVar, Literal

import pytest
import torch
from torch import Tensor, nn

from stages import trial
from stages.attacks.apgd import APGD
from stages.attacks.pgd import PGD
from stages.bounds.base import Box, Certifier, Contradiction, TooLittleMemory, certifier
from stages.bounds.crown_ibp import CrownIBP
from stages.bounds.ibp import IBP
from stages.evaluate import OnStep, correct, frozen
from stages.seeding import generator
from stages.threat import Threat
from stages.trial import Proved, prove, spared, strike
from stages.validate import CASCADE
from tests.trained import digits, digits_model

SMALL = Threat(norm="linf", eps=0.004)


def images(count: int = 200) -> tuple[Tensor, Tensor]:
    test = digits().test
    return test.floats(slice(0, count)), test.labels[:count]


def quiet(name: str) -> OnStep:
    return lambda done, total: print(name, done, total)


def proofs(net: nn.Module, threat: Threat = SMALL) -> Proved:
    x, y = images()
    return prove(net, x, y, 10, threat, {"ibp": IBP()}, quiet)


def test_leads_are_bounds_of_every_class_and_margins_the_least_of_them() -> None:
    net = digits_model(recipe="at").net
    x, y = images()
    with frozen(net):
        found = proofs(net)
        leads = found.leads["ibp"]
        assert leads.shape == (200, 10)
        assert bool((leads.gather(1, y.unsqueeze(1)) == float("inf")).all())
        for seed in range(5):
            with torch.no_grad():
                z = net(SMALL.random(x, generator(seed)))
            assert bool((z.gather(1, y.unsqueeze(1)) - z >= leads.clamp(max=0)).all())
        assert torch.equal(found.margins["ibp"], IBP().margins(net, x, y, SMALL))
        assert found.unproved is not None
        assert torch.equal(found.unproved, leads <= 0)
        # The case is worth testing: some are proved whole, some in part, some not at all.
        open_classes = found.unproved.sum(1)
        assert len(set(open_classes.tolist())) > 4
        assert int((open_classes == 0).sum()) > 60


def test_a_dearer_certifier_is_asked_about_what_the_cheaper_one_left_open() -> None:
    net, (x, y) = digits_model(recipe="at").net, images(60)
    steps: dict[str, list[int]] = {"ibp": [], "crown_ibp": []}
    with frozen(net):
        both = prove(
            net,
            x,
            y,
            10,
            SMALL,
            {"ibp": IBP(), "crown_ibp": CrownIBP()},
            lambda name: lambda _done, total: steps[name].append(total),
        )
        alone = CrownIBP().margins(net, x, y, SMALL)
    proved = both.margins["ibp"] > 0
    assert 0 < int(proved.sum()) < 60
    assert steps == {"ibp": [60], "crown_ibp": [60 - int(proved.sum())]}
    assert torch.equal(both.margins["crown_ibp"][~proved], alone[~proved])
    assert bool((both.margins["crown_ibp"][proved] == float("-inf")).all())
    right = torch.ones(60, dtype=torch.bool)
    together = torch.stack(list(both.certified(right).values())).any(0)
    assert torch.equal(together, proved | (alone > 0))
    assert int(together.sum()) > int(proved.sum())


def test_a_network_without_a_rule_is_proved_nowhere_and_nothing_is_spared() -> None:
    class Modulo(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1)[:, :10].fmod(0.5)

    found = proofs(Modulo().eval())
    assert found.findings[0].name == "covers_ibp"
    assert found.findings[0].ok
    right = torch.ones(200, dtype=torch.bool)
    assert not bool(spared(found, right, generator(0)).any())
    assert bool((found.margins["ibp"] == float("-inf")).all())


def test_proved_examples_are_spared_but_for_fifty() -> None:
    net = digits_model(recipe="at").net
    x, y = images()
    with frozen(net):
        found, right = proofs(net), correct(net, x, y)
    whole = found.certified(right)["ibp"]
    kept = spared(found, right, generator(1))
    assert bool((kept <= whole).all())
    assert int(kept.sum()) == int(whole.sum()) - 50
    assert torch.equal(kept, spared(found, right, generator(1)))
    assert not torch.equal(kept, spared(found, right, generator(2)))
    assert not bool(spared(Proved({}, {}, ()), right, generator(0)).any())


def test_untried_examples_survive_untouched_and_unpaid() -> None:
    net = digits_model().net
    x, y = images(60)
    threat = Threat(norm="linf", eps=0.1)
    with frozen(net):
        rows = correct(net, x, y)
        rows[::2] = False
        hit = strike(net, PGD(steps=5), x, y, rows, threat, 0)
    assert torch.equal(hit.tried, rows)
    assert bool(hit.survived[~rows].all())
    assert torch.equal(hit.x_adv[~rows], x[~rows])
    assert not bool(hit.spent.queries[~rows].any())
    assert bool((hit.spent.queries[rows] > 0).all())
    assert 0 < int(hit.survived[rows].sum()) < int(rows.sum())


def test_classes_proved_unreachable_are_no_targets_and_no_verdict_changes() -> None:
    net = digits_model(recipe="at").net
    x, y = images(100)
    threat = Threat(norm="linf", eps=0.01)
    attack = APGD(steps=10, loss="dlr", targets=9)
    with frozen(net):
        rows = correct(net, x, y)
        unproved = prove(net, x, y, 10, threat, {"ibp": IBP()}, quiet).unproved
        plain = strike(net, attack, x, y, rows, threat, 0)
        aimed = strike(net, attack, x, y, rows, threat, 0, unproved)
    assert torch.equal(plain.survived, aimed.survived)
    assert int(aimed.spent.gradients.sum()) < int(plain.spent.gradients.sum())


def test_no_rows_no_work() -> None:
    def never(x: Tensor) -> Tensor:
        raise AssertionError("asked")

    x, y = images(5)
    hit = strike(never, PGD(), x, y, torch.zeros(5, dtype=torch.bool), SMALL, 0)
    assert bool(hit.survived.all())
    assert torch.equal(hit.x_adv, x)


def test_each_certifier_of_the_cascade_adds_its_own_and_a_dear_one_takes_a_piece_that_fits_the_clock() -> None:
    net, (x, y) = digits_model(recipe="at").net, images(24)
    asked = dict[str, list[int]]()
    brief = {"alpha_crown": {"steps": 2, "box_steps": 1}, "branch_and_bound": {"limit": 2}}
    chain = {name: certifier({"kind": name, **brief.get(name, {})}) for name in CASCADE}

    def counting(name: str) -> OnStep:
        return lambda done, _: asked.setdefault(name, []).append(done)

    with frozen(net):
        found = prove(net, x, y, 10, Threat(norm="linf", eps=0.07), chain, counting, 99)
        proved = found.certified(correct(net, x, y))
    counted = [int(proved[name].sum()) for name in CASCADE]
    assert sum(counted) == found.why.count(None)  # nobody is asked about what others proved
    assert sum(number > 0 for number in counted) >= 3
    assert asked["ibp"] == [24]
    assert asked["crown"][:2] == [1, 3]


class Clock:
    """Stands in for `time`: every certifier's call takes a second."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


class Slow(Certifier):
    """IBP, that takes a second of `clock` each time and notes how much time of its own it was given."""

    cheap: ClassVar[bool] = True
    seconds: float = 10.0

    def lower(self, net: nn.Module, box: Box, rows: Tensor) -> Tensor:
        clock.now += 1
        given.append(self.seconds * len(rows))
        return IBP().lower(net, box, rows)


clock, given = Clock(), list[float]()


def test_when_the_time_is_over_what_is_proved_counts_and_the_rest_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of 32 images, a second each, 2.5 seconds: three pieces have their turn, the last with half a second."""
    net, (x, y) = digits_model(recipe="at").net, images(200)
    clock.now, steps = 0.0, list[int]()
    given.clear()
    monkeypatch.setattr(trial, "time", clock)
    with frozen(net):
        whole = proofs(net).margins["ibp"]
        found = prove(net, x, y, 10, SMALL, {"slow": Slow()}, lambda _: lambda done, _: steps.append(done), 2.5)
        none = prove(net, x, y, 10, SMALL, {"slow": Slow(), "ibp": IBP()}, quiet, 1e-9)
    assert steps == [32, 64, 96]
    assert given[:3] == pytest.approx([2.5, 1.5, 0.5])
    assert torch.equal(found.margins["slow"][:96], whole[:96])
    assert bool((found.margins["slow"][96:] == -torch.inf).all())
    (told,) = found.findings
    proved, loose = int((whole[:96] > 0).sum()), int((whole[:64] <= 0).sum())
    late = 200 - proved - loose  # the third piece had less than a call takes
    assert told.name == "unproved"
    assert told.ok
    assert told.text == (
        f"{200 - proved} of 200 images, those read wrongly among them, are not proved: {loose} because no lower bound "
        f"of their lead is above 0 (slow), {late} because the 2.5 s for certifying or slow's 10 s an image were over"
    )
    assert [found.why.count(word) for word in ("loose", "time")] == [loose, late]
    assert all((found.margins["slow"][i] > 0) == (word is None) for i, word in enumerate(found.why))
    assert none.unproved is not None
    left = 200 - int((whole[:32] > 0).sum())
    assert int(none.unproved.any(1).sum()) == left
    assert f"{left} because the 1e-09 s for certifying or slow's 10 s an image were over" in none.findings[-1].text


@pytest.mark.parametrize("arithmetic", ["float32", "real"])
def test_where_memory_is_short_fewer_images_are_bounded_at_once(arithmetic: Literal["float32", "real"]) -> None:
    net, (x, y) = digits_model(recipe="at").net, images(12)
    asked: list[int] = []
    with frozen(net):
        plenty = prove(net, x, y, 10, SMALL, {"c": CrownIBP(arithmetic=arithmetic)}, quiet)
        with pytest.raises(TooLittleMemory, match=r"no row of coefficients for one image, which takes .* GiB") as told:
            CrownIBP(arithmetic=arithmetic, memory=1e-12).margins(net, x, y, SMALL)
        needed = float(str(told.value).partition("takes ")[2].split()[0])
        scant = CrownIBP(arithmetic=arithmetic, memory=2.5 * needed)
        found = prove(net, x, y, 10, SMALL, {"c": scant}, lambda _: lambda done, _: asked.append(done))
        assert torch.allclose(found.leads["c"], plenty.leads["c"], atol=1e-4)
        assert asked == [12]
        none = CrownIBP(arithmetic=arithmetic, memory=1e-12)
        with pytest.raises(TooLittleMemory, match="for one image"):
            prove(net, x, y, 10, SMALL, {"c": none}, quiet)
        found = prove(net, x, y, 10, SMALL, {"ibp": IBP(), "c": none}, quiet)
        assert torch.equal(found.margins["ibp"], IBP().margins(net, x, y, SMALL))
    left = found.why.count("memory")
    assert {*found.why} == {None, "memory"}
    assert f"c leaves {left} images as they are: memory: 1e-12 GiB" in found.findings[0].text
    assert f"{left} because a certifier's memory does not hold them" in found.findings[-1].text


class Dear(Certifier):
    """IBP, that notes how many images it was asked about."""

    def lower(self, net: nn.Module, box: Box, rows: Tensor) -> Tensor:
        given.append(float(len(rows)))
        return IBP().lower(net, box, rows)


def test_what_a_short_attack_refutes_is_not_put_to_a_dear_certifier() -> None:
    """At the chosen eps many images break; what is proved is the same with it and without."""
    net, (x, y) = digits_model(recipe="at").net, images(100)
    threat = Threat(norm="linf", eps=0.1)
    given.clear()
    with frozen(net):
        alone = prove(net, x, y, 10, threat, {"ibp": IBP()}, quiet)
        dear = prove(net, x, y, 10, threat, {"dear": Dear()}, quiet)
        right = correct(net, x, y)
    asked = given[0] - 8  # as a test
    assert 0 < asked < int(right.sum())
    assert torch.equal(dear.certified(right)["dear"], alone.certified(right)["ibp"])
    assert int((dear.margins["dear"][~right] > -torch.inf).sum()) <= 8
    assert all(finding.ok for finding in dear.findings)
    assert f"{100 - int(asked)} because they are read wrongly" in dear.findings[-1].text
    assert "read wrongly, as" not in alone.findings[-1].text


class Liar(Dear):
    """Calls every lead 1."""

    def lower(self, net: nn.Module, box: Box, rows: Tensor) -> Tensor:
        del net, box
        return torch.ones(rows.shape[:2])


def test_a_certifier_that_proves_what_the_short_attack_refuted_fails_a_finding() -> None:
    net, (x, y) = digits_model(recipe="at").net, images(40)
    with frozen(net):
        found = prove(net, x, y, 10, Threat(norm="linf", eps=0.2), {"liar": Liar()}, quiet)
    (told,) = (finding for finding in found.findings if not finding.ok)
    assert (told.name, told.text[:36]) == ("refuted_liar", "8 images that liar proved are read w")


class Failing(Certifier):
    error: ClassVar[BaseException] = RuntimeError()
    cheap: ClassVar[bool] = True

    def lower(self, net: nn.Module, box: Box, rows: Tensor) -> Tensor:
        del net, box, rows
        raise self.error


def test_a_certifier_that_fails_on_a_network_proves_nothing_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    net, (x, y) = nn.Sequential(nn.Flatten(), nn.Linear(4, 3)).eval(), (torch.rand(2, 1, 2, 2), torch.zeros(2).long())
    monkeypatch.setattr(Failing, "error", RuntimeError("no strides\nlong trace"))
    found = prove(net, x, y, 3, SMALL, {"failing": Failing(), "ibp": IBP()}, quiet)
    assert found.findings[0].name == "covers_failing"
    assert found.findings[0].text == "failing proves nothing about this network: RuntimeError: no strides"
    assert bool((found.margins["failing"] == -torch.inf).all())
    assert torch.equal(found.margins["ibp"], IBP().margins(net, x, y, SMALL))
    alone = prove(net, x, y, 3, SMALL, {"failing": Failing()}, quiet)
    assert alone.why == ("uncovered", "uncovered")
    for error in (Contradiction(), MemoryError(), KeyboardInterrupt()):
        monkeypatch.setattr(Failing, "error", error)
        with pytest.raises(type(error)):
            prove(net, x, y, 3, SMALL, {"failing": Failing()}, quiet)


class _Silent(Certifier):
    """Answers NaN."""

    def lower(self, net: nn.Module, box: Box, rows: Tensor) -> Tensor:
        del net, box
        return torch.full(rows.shape[:2], torch.nan)


def test_what_is_no_number_proves_nothing_and_spares_nobody() -> None:
    net, right = digits_model(recipe="at").net, torch.ones(60, dtype=torch.bool)
    x, y = images(60)
    with frozen(net):
        found = prove(net, x, y, 10, SMALL, {"silent": _Silent()}, quiet)
    assert "covers_silent" in {finding.name for finding in found.findings}
    assert not spared(found, right, generator(0)).any()
    blank = Proved({}, {"silent": torch.full((60, 10), torch.nan)}, ())
    assert blank.unproved is not None
    assert bool(blank.unproved.all())
    assert not blank.certified(right)["silent"].any()
    assert not spared(blank, right, generator(0)).any()
