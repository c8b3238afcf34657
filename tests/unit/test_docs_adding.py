"""The worked examples of docs/adding.md do what the page says of them."""

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from stages import seeding
from stages.attacks.base import Attack
from stages.nn.cost import cost
from stages.threat import Threat
from tests.networks import arch, built, images

_ROOT = Path(__file__).resolve().parents[2]
_BLOCK = re.compile(r"```python\n# (\S+)\n(.*?)```", re.DOTALL)


def _examples(folder: Path) -> dict[str, ModuleType]:
    """Each example as a module of the name that its first line asks for; the tree itself is not touched."""
    found = {}
    for path, text in _BLOCK.findall((_ROOT / "docs" / "adding.md").read_text(encoding="utf-8")):
        assert not (_ROOT / path).exists(), f"{path} is taken; choose another example"
        file = folder / Path(path).name
        file.write_text(text, encoding="utf-8")
        name = path.removesuffix(".py").replace("/", ".")
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        found[Path(path).stem] = module
    return found


@pytest.fixture
def examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, ModuleType]:
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    return _examples(tmp_path)


def test_the_attack_works(examples: dict[str, ModuleType]) -> None:
    attack = examples["ni_fgsm"].NIFGSM(steps=5)
    assert isinstance(attack, Attack)
    assert attack.dump() == {"kind": "ni_fgsm", "steps": 5, "decay": 1.0}
    net, x, threat = built(arch("small_cnn", (1, 8, 8))), images(30, (1, 8, 8)), Threat(norm="linf", eps=0.5)
    y = net(x).argmax(1)
    x_adv = attack(net, x, y, threat, seeding.generator(0))
    assert threat.distance(x_adv, x).max() <= 0.5 + 1e-6
    assert (net(x_adv).argmax(1) == y).float().mean() < 0.9


def test_the_network_works(examples: dict[str, ModuleType]) -> None:
    with torch.random.fork_rng(devices=[]):
        seeding.deterministic(0)
        net: nn.Module = examples["lenet"].build((1, 28, 28), 10)
    assert net(images(2, (1, 28, 28))).shape == (2, 10)
    # 5x5 kernels 1 -> 6 -> 16, then 16 * 7 * 7 -> 120 -> 84 -> 10, with biases.
    by_hand = (25 + 1) * 6 + (25 * 6 + 1) * 16 + (784 + 1) * 120 + 121 * 84 + 85 * 10
    assert cost(net, (1, 28, 28)).params == by_hand
