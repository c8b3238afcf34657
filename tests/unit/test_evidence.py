"""The evidence file: equal bytes for equal evidence, readable without us, and every damage named by its line."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from stages import evidence
from stages.evidence import Example, Header, Spending, on_grid, recheck
from stages.method import InputError
from stages.threat import Threat

Damage = Callable[[list[str]], list[str]]

THREAT = Threat(norm="linf", eps=0.1)


def header(count: int) -> Header:
    return Header(
        threat=THREAT.dump(),
        split="test",
        strength="quick",
        attacks={"pgd": {"kind": "pgd", "steps": 20}},
        certifiers={"ibp": {"kind": "ibp"}},
        seed=3,
        model="0" * 64,
        examples=count,
    )


def row(index: int, broken: bool) -> Example:
    return Example(
        index=index,
        label=1,
        clean=1,
        attacked=0 if broken else 1,
        survived={"pgd": not broken},
        spent={"pgd": Spending(queries=3 if broken else 21, gradients=2 if broken else 20)},
        broken_by="pgd" if broken else None,
        stored="pgd" if broken else None,
        margin=0.1 + index,
        margin_attacked=-1.5 if broken else 0.1 + index,
        distance=0.1 if broken else 0.0,
        certified={"ibp": False},
        certified_margin={"ibp": None if broken else -0.25},
    )


def bright(x: Tensor) -> Tensor:
    mean = x.flatten(1).mean(1)
    return torch.stack([0.5 - mean, mean - 0.5], 1)


def test_it_reads_back_equal_and_writes_equal_bytes(tmp_path: Path) -> None:
    rows = tuple(row(i, i % 2 == 0) for i in range(5))
    evidence.write(tmp_path / "a.jsonl", header(5), rows)
    evidence.write(tmp_path / "b.jsonl", header(5), iter(rows))
    found = evidence.read(tmp_path / "a.jsonl")
    assert (found.header, found.examples) == (header(5), rows)
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "b.jsonl"]


def test_the_standard_library_is_enough_to_read_it(tmp_path: Path) -> None:
    evidence.write(tmp_path / "e.jsonl", header(2), [row(7, True), row(9, False)])
    first, *rest = (json.loads(line) for line in (tmp_path / "e.jsonl").read_text("utf-8").splitlines())
    assert first["examples"] == 2
    assert first["strength"] == "quick"
    assert [one["index"] for one in rest] == [7, 9]
    assert [one["survived"]["pgd"] for one in rest] == [False, True]


def test_the_documentation_names_every_field() -> None:
    text = (Path(evidence.__file__).resolve().parents[1] / "docs" / "evidence.md").read_text("utf-8")
    for kind in (Header, Example):
        for field in kind.model_fields:
            assert f"`{field}`" in text


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda lines: lines[:0], "expected a header line, got an empty file"),
        (lambda lines: lines[:-1], "the header counts 2 examples, got 1; is the file cut short"),
        (lambda lines: [*lines[:-1], lines[-1][:20]], "line 3: expected JSON"),
        (lambda lines: [lines[0].replace('"schema_version":3', '"schema_version":4'), *lines[1:]], "schema 3, got 4"),
        (lambda lines: [lines[0], lines[1].replace('"label":1', '"label":"one"'), lines[2]], "line 2: label: "),
        (lambda lines: [lines[0], "[]", lines[2]], "line 2: expected a table, got list"),
        (lambda lines: ['{"examples":2}', *lines[1:]], "line 1: expected evidence of schema 3, got None"),
    ],
)
def test_damage_is_named_by_its_line(damage: Damage, message: str, tmp_path: Path) -> None:
    evidence.write(tmp_path / "e.jsonl", header(2), [row(7, True), row(9, False)])
    lines = (tmp_path / "e.jsonl").read_text("utf-8").splitlines()
    (tmp_path / "e.jsonl").write_text("\n".join(damage(lines)), "utf-8")
    with pytest.raises(InputError, match=message):
        evidence.read(tmp_path / "e.jsonl")


def test_a_header_that_miscounts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the header counts 3 examples, got 1"):
        evidence.write(tmp_path / "e.jsonl", header(3), [row(0, True)])


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_the_recheck_sees_each_way_to_cheat(norm: str) -> None:
    threat = Threat.load({"norm": norm, "eps": 0.4})
    size = {"linf": 1.0, "l2": 0.5, "l1": 0.25}[norm]
    x = torch.full((5, 1, 2, 2), 0.42)
    y = torch.zeros(5, dtype=torch.int64)
    x_adv = x + 0.4 * size
    x_adv[1] += 0.01
    x_adv[2] = x[2]
    x_adv[3, 0, 0, 0] = -0.001
    x[4], x_adv[4] = 0.7, 1.01
    found = recheck(bright, x, x_adv, y, threat)
    assert found.in_ball.tolist()[:3] == [True, False, True]
    assert found.in_range.tolist() == [True, True, True, False, False]
    assert found.wrong.tolist()[:3] == [True, True, False]
    assert found.holds.tolist() == [True, False, False, False, False]


def test_the_strongest_of_several_is_stored_and_ties_go_to_the_first() -> None:
    x, y = torch.full((4, 1, 2, 2), 0.4), torch.zeros(4, dtype=torch.int64)
    first, second = x.clone(), x.clone()
    first[0], second[0] = 0.6, 0.7
    first[1] = 0.6
    first[2], second[2] = 0.6, 0.6
    best, names = evidence.worst(x, {"first": first, "second": second}, bright, y)
    assert names == ["second", "first", "first", None]
    assert torch.equal(best[:, 0, 0, 0], torch.tensor([0.7, 0.6, 0.6, 0.4]))


def test_the_lead_is_negative_where_the_answer_is_wrong() -> None:
    z = torch.tensor([[2.0, 1.0, 0.0], [0.0, 3.0, 1.0]])
    assert evidence.lead(z, torch.tensor([0, 2])).tolist() == [1.0, -2.0]


@pytest.mark.parametrize(("norm", "eps"), [("linf", 2.5 / 255), ("l2", 3.2 / 255), ("l1", 5.5 / 255)])
def test_the_nearest_image_on_the_grid_stays_in_the_ball(norm: str, eps: float) -> None:
    threat = Threat.load({"norm": norm, "eps": eps})
    rng = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (200, 1, 3, 3), generator=rng) / 255
    x_adv = threat.project(threat.random(x, rng), x)
    found = on_grid(x_adv, x, threat)
    assert torch.allclose(found * 255, (found * 255).round(), atol=1e-4)
    assert bool(recheck(lambda batch: batch.flatten(1), x, found, torch.zeros(200), threat).in_ball.all())
    # Half a step is as far as rounding goes, a whole one where it had to go towards the image.
    assert float((found - x_adv).abs().max()) <= 1 / 255 + 1e-6
    assert torch.equal(on_grid(x, x, threat), x)


def test_two_pixels_rounded_out_of_the_ball_are_rounded_back() -> None:
    x, threat = torch.full((1, 1, 1, 2), 100 / 255), Threat(norm="l2", eps=1.0 / 255)
    outward = x + 0.6 / 255
    assert (on_grid(outward, x, threat) * 255).round().flatten().tolist() == [100, 100]
    wide = Threat(norm="l2", eps=2.0 / 255)
    assert (on_grid(outward, x, wide) * 255).round().flatten().tolist() == [101, 101]


def test_an_image_that_is_not_on_the_grid_is_refused() -> None:
    x = torch.full((1, 1, 2, 2), 0.501)
    with pytest.raises(InputError, match=r"got one 0\.245 steps off"):
        on_grid(x, x, THREAT)
