"""The standard ensemble: its settings, its name, and that members share the work."""

import pytest
import torch
from torch import Tensor, nn

from stages.attacks.apgd import APGD
from stages.attacks.auto import Auto, standard
from stages.attacks.base import FOLDER, QUICK, Attack
from stages.attacks.pgd import PGD
from stages.attacks.square import Square
from stages.attacks.worst_of import WorstOf
from stages.evaluate import under_attack
from stages.method import load
from stages.oracle import Oracle
from stages.seeding import generator
from stages.threat import Threat

LINF = Threat(norm="linf", eps=0.1)


def test_the_reference_settings_are_these() -> None:
    """Croce and Hein 2020, and 2021 for l1."""
    for norm, restarts, aims in (("linf", 1, 9), ("l2", 1, 9), ("l1", 5, 5)):
        threat = Threat.load({"norm": norm, "eps": 0.1})
        ce, targeted, fab, square = (one.dump() for one in Auto().members(threat).attacks)
        assert ce == APGD(steps=100, restarts=restarts, loss="ce", targets=0).dump()
        assert targeted == APGD(steps=100, restarts=1, loss="dlr", targets=aims).dump()
        assert {"kind": "fab", "steps": 100, "restarts": 1, "targets": 9}.items() <= fab.items()
        assert square == Square(queries=5000, share=0.8, stretch=False).dump()


def test_only_exactly_these_settings_are_called_standard() -> None:
    quick = [load(FOLDER, Attack, one) for one in QUICK]  # type: ignore[type-abstract]
    assert standard([load(FOLDER, Attack, "auto")])  # type: ignore[type-abstract]
    assert standard([*quick, Auto()])
    for lighter in (Auto(steps=99), Auto(queries=4999), Auto(targets=8)):
        assert not standard([lighter])
    assert not standard([])
    assert not standard(quick)
    assert not standard([PGD(steps=1000, restarts=10)])
    assert not standard(list(Auto().members(LINF).attacks[:3]))


def test_it_is_the_composition_of_its_members() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.ReLU(), nn.Linear(8, 5)).eval()
    rng = generator(0)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=rng))
    x = torch.rand(20, 1, 6, 6, generator=rng)
    y = net(x).argmax(1)
    auto = Auto(steps=10, queries=50)
    one, other = (strike(net, x, y, LINF, generator(1)) for strike in (auto, auto.members(LINF)))
    assert torch.equal(one, other)


@pytest.mark.parametrize("classes", [2, 3])
def test_networks_with_few_classes_are_attacked_whole(classes: int) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(36, classes)).eval()
    rng = generator(0)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=rng))
    x = torch.rand(10, 1, 6, 6, generator=rng)
    y = net(x).argmax(1)
    survived, _ = under_attack(net, Auto(steps=10, queries=50), x, y, LINF, 0)
    assert int(survived.sum()) < 10


def test_proved_examples_cost_one_pass_a_member_at_most_and_keep_their_verdict() -> None:
    """Nothing is unproved: only CE's climb and Square remain, which have no classes to leave out."""

    def logits(x: Tensor) -> Tensor:
        return torch.stack([x.flatten(1).sum(1) + 9, x.flatten(1).sum(1), 0 * x.flatten(1).sum(1)], 1)

    x, y = torch.rand(4, 1, 6, 6, generator=generator(3)), torch.zeros(4, dtype=torch.int64)
    oracle = Oracle.of(logits, 4, unproved=torch.zeros(4, 3, dtype=torch.bool))
    found = Auto(steps=10, queries=50)(oracle, x, y, LINF, generator(0))
    assert torch.equal(found, x)
    assert oracle.spent.gradients.tolist() == [11] * 4
    assert int(oracle.spent.queries.max()) <= 11 + 50 + 2


def test_worst_of_and_auto_agree_on_what_they_accept() -> None:
    assert Auto().norms == WorstOf(attacks=(APGD(), Square())).norms == {"linf", "l2", "l1"}
