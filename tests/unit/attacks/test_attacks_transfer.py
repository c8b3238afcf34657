"""Transfer: every image finds its own stored example, whatever the file's order; bad files are named."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from stages.attacks.pgd import PGD
from stages.attacks.transfer import Transfer
from stages.evaluate import under_attack
from stages.method import InputError
from stages.oracle import Oracle
from stages.seeding import generator
from stages.threat import Threat
from tests.linear_nets import EPS, NORMS, Norm, TwoClass, drop, with_leads
from tests.stored_examples import written

SHA = 64 * "0"


def broken_and_stored(norm: Norm) -> tuple[TwoClass, Tensor, Tensor, Threat, Tensor]:
    """Images far apart, each at 0.6 of what the threat can take away."""
    rng = generator(3, norm)
    net, threat = TwoClass(torch.randn(1, 8, 8, generator=rng)), Threat(norm=norm, eps=EPS[norm])
    x, w = 0.2 + 0.6 * torch.rand(24, 1, 8, 8, generator=rng), net.w.detach()
    x = x + (0.6 * drop(net, threat) - net.lead(x).detach()).view(-1, 1, 1, 1) * w / w.square().sum()
    y = torch.zeros(24, dtype=torch.int64)
    attack = PGD(steps=30, step=0.3)
    return net, x, y, threat, attack(net, x, y, threat, generator(0))


@pytest.mark.parametrize("norm", NORMS)
def test_every_image_gets_its_own_example_back_in_any_order(norm: Norm, tmp_path: Path) -> None:
    net, x, y, threat, adversarial = broken_and_stored(norm)
    shuffled = adversarial[torch.randperm(len(x), generator=generator(1))]
    replayed = written({"x_adv": shuffled, "indices": torch.arange(len(x))}, tmp_path)(net, x, y, threat, generator(0))
    assert torch.allclose(replayed, adversarial, atol=1e-7)
    assert torch.equal(written({"x_adv": shuffled}, tmp_path)(net, x[5:9], y[5:9], threat, generator(0)), replayed[5:9])


def test_of_a_larger_threat_the_part_within_this_one_is_tried(tmp_path: Path) -> None:
    net, x, y, threat, adversarial = broken_and_stored("linf")
    wide = (x - 3 * threat.eps * net.w.detach().sign()).clamp(0, 1)
    found = written({"x_adv": wide}, tmp_path)(net, x, y, threat, generator(0))
    assert float(threat.distance(found, x).max()) <= threat.eps + 1e-6
    assert bool((found != x).flatten(1).any(1).all())
    del adversarial


def test_an_image_stored_as_it_is_costs_nothing_and_the_next_nearest_is_tried(tmp_path: Path) -> None:
    net, x, y, threat, adversarial = broken_and_stored("l2")
    oracle = Oracle.of(net, 1)
    only_itself = written({"x_adv": x[:1]}, tmp_path)
    assert torch.equal(only_itself(oracle, x[:1], y[:1], threat, generator(0)), x[:1])
    assert oracle.spent.queries.tolist() == [0]
    both = written({"x_adv": torch.cat([x[:1], adversarial[:1]])}, tmp_path)
    assert torch.allclose(both(net, x[:1], y[:1], threat, generator(0)), adversarial[:1], atol=1e-7)


@pytest.mark.parametrize("nearest", [1, 3, 100])
def test_it_costs_as_many_queries_as_examples_are_tried_and_no_gradient(nearest: int, tmp_path: Path) -> None:
    net, x, y, threat = with_leads("linf", 3.0)
    stored = torch.rand(8, *x.shape[1:], generator=generator(2))
    attack = written({"x_adv": stored}, tmp_path).model_copy(update={"nearest": nearest})
    oracle = Oracle.of(net, len(x))
    attack(oracle, x, y, threat, generator(0))
    assert oracle.spent.queries.tolist() == [min(nearest, 8)] * len(x)
    assert not bool(oracle.spent.gradients.any())
    assert not attack.needs_gradients


def test_examples_found_on_one_network_break_another_like_it(tmp_path: Path) -> None:
    net, x, y, threat, adversarial = broken_and_stored("linf")
    twin = TwoClass(net.w.detach() + 0.05 * torch.randn(net.w.shape, generator=generator(4)))
    survived, found = under_attack(twin, written({"x_adv": adversarial}, tmp_path), x, y, threat, 0, batch=7)
    assert int(survived.sum()) <= 2
    assert float(threat.distance(found, x).max()) <= threat.eps + 1e-6


def test_bad_files_are_named_with_what_to_do(tmp_path: Path) -> None:
    net, x, y, threat = with_leads("linf", 1.0)

    def strike(attack: Transfer) -> None:
        attack(net, x, y, threat, generator(0))

    with pytest.raises(InputError, match=r"transfer: cannot read .*nowhere \(No such file.*validate writes"):
        strike(Transfer(path=str(tmp_path / "nowhere"), sha256=SHA))
    good = written({"x_adv": x}, tmp_path)
    with pytest.raises(InputError, match=f"expected the file with sha256 {SHA}, got {good.sha256}"):
        strike(good.model_copy(update={"sha256": SHA}))
    for tensors, found in (
        ({"other": x}, "got none"),
        ({"x_adv": x.to(torch.uint8)}, "got torch.uint8"),
        ({"x_adv": x[:0]}, r"got torch.float32 \[0, 1, 4, 4\]"),
        ({"x_adv": x * float("nan")}, "holds NaN"),
        ({"x_adv": torch.rand(3, 1, 5, 5)}, r"holds images \[1, 5, 5\], expected \[1, 4, 4\]"),
    ):
        with pytest.raises(InputError, match=found):
            strike(written(tensors, tmp_path))


def test_a_file_that_is_no_safetensors_is_told(tmp_path: Path) -> None:
    net, x, y, threat = with_leads("linf", 1.0)
    path = tmp_path / "broken"
    path.write_bytes(b"\x80\x04")
    digest = "c9b0b1d4d3d2fe8b3e1dd4ba5a7a2b71a6e5dc0a8de8c1fe3c2a4d6d9a1c2f00"
    with pytest.raises(InputError, match="expected the file with sha256") as told:
        Transfer(path=str(path), sha256=digest)(net, x, y, threat, generator(0))
    real = str(told.value).split("got ")[1].split(";")[0]
    with pytest.raises(InputError, match="is no safetensors file"):
        Transfer(path=str(path), sha256=real)(net, x, y, threat, generator(0))
