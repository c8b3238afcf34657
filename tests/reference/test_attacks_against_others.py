"""Our attacks beside torchattacks on the same network and images, where that is installed; it is no dependency.

`pip install --target DIR --no-deps torchattacks scipy tqdm requests idna urllib3 certifi charset-normalizer`, then
`PYTHONPATH=DIR pytest tests/reference`.
"""

import importlib
import importlib.util
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from stages.attacks.apgd import APGD
from stages.attacks.base import Attack
from stages.attacks.carlini_wagner import CarliniWagner
from stages.attacks.fab import FAB
from stages.attacks.pgd import PGD
from stages.attacks.square import Square
from stages.evaluate import correct, frozen, under_attack
from stages.nn._torchvision import torchvision
from stages.threat import Threat
from tests.trained import digits, digits_model

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("torchattacks") is None, reason="torchattacks is not installed"),
    pytest.mark.filterwarnings("ignore"),
]

IMAGES = 200
EPS = {"linf": 0.1, "l2": 0.6}
SLACK = 0.03
PAIRS: list[tuple[Attack, str, str, dict[str, Any]]] = [
    (PGD(steps=20), "linf", "PGD", {"alpha": 0.0125, "steps": 20}),
    (APGD(), "linf", "APGD", {"norm": "Linf", "steps": 100, "loss": "ce"}),
    (APGD(loss="dlr"), "linf", "APGD", {"norm": "Linf", "steps": 100, "loss": "dlr"}),
    (APGD(), "l2", "APGD", {"norm": "L2", "steps": 100, "loss": "ce"}),
    (APGD(loss="dlr", targets=9, steps=30), "linf", "APGDT", {"norm": "Linf", "steps": 30}),
    (FAB(steps=30), "linf", "FAB", {"norm": "Linf", "steps": 30}),
    (FAB(steps=30, targets=9), "linf", "FAB", {"norm": "Linf", "steps": 30, "multi_targeted": True}),
    (FAB(steps=30, targets=9), "l2", "FAB", {"norm": "L2", "steps": 30, "multi_targeted": True}),
    (CarliniWagner(steps=100, searches=4), "l2", "CW", {"c": 1, "steps": 100}),
    (Square(queries=1000), "linf", "Square", {"norm": "Linf", "n_queries": 1000, "p_init": 0.8}),
    (Square(queries=1000), "l2", "Square", {"norm": "L2", "n_queries": 1000, "p_init": 0.8}),
]


def _peer(name: str, eps: float, settings: dict[str, Any], x: Tensor, y: Tensor) -> Tensor:
    """What the peer found; Carlini and Wagner's attack knows no eps."""
    net = digits_model(recipe="at").net
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torchvision()
        given = settings if name == "CW" else {"eps": eps, **settings}
        made = getattr(importlib.import_module("torchattacks"), name)(net, **given)
        with torch.random.fork_rng(devices=[]):
            found: Tensor = made(x, y)
    return found


@pytest.mark.parametrize(("attack", "norm", "name", "settings"), PAIRS, ids=repr)
def test_ours_leaves_no_more_standing_than_theirs(
    attack: Attack, norm: str, name: str, settings: dict[str, Any]
) -> None:
    net, test = digits_model(recipe="at").net, digits().test
    x, y = test.floats(slice(0, IMAGES)), test.labels[:IMAGES]
    threat = Threat.load({"norm": norm, "eps": EPS[norm]})
    found = threat.project(_peer(name, threat.eps, settings, x, y), x)
    theirs = correct(net, found, y) & correct(net, x, y)
    with frozen(net):
        ours, _ = under_attack(net, attack, x, y, threat, 0)
    assert float(ours.float().mean()) <= float(theirs.float().mean()) + SLACK
