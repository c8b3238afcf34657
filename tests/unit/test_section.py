"""Flat sections: where keys go, what comes back, and what the user is told."""

from typing import Literal

import pytest
from pydantic import ValidationError

from stages.fitting.optim import Fit
from stages.method import unknown
from stages.recipes.at import AdversarialTraining
from stages.recipes.base import FOLDER, AnyRecipe, Recipe
from stages.recipes.natural import Natural
from stages.section import Section


class Sample(Section):
    METHOD = ("recipe", FOLDER, Recipe)
    FLAT = ("fit",)
    recipe: AnyRecipe = AdversarialTraining()
    fit: Fit = Fit()
    keep: Literal["last", "best"] = "last"


class Loose(Section):
    FLAT = ("fit",)
    recipe: AnyRecipe = AdversarialTraining()
    fit: Fit = Fit()


def _findings(data: object) -> dict[tuple[str | int, ...], str]:
    with pytest.raises(ValidationError) as caught:
        Sample.load(data)
    return {detail["loc"]: detail["msg"] for detail in caught.value.errors()}


def test_keys_go_to_the_method_the_loop_and_the_stage() -> None:
    made = Sample.load({"kind": "at", "steps": 3, "epochs": 7, "keep": "best", "augment": {"crop": 2}})
    assert made.recipe == AdversarialTraining(steps=3)
    assert (made.fit.epochs, made.fit.augment.crop, made.keep) == (7, 2, "best")


def test_an_empty_section_is_the_defaults() -> None:
    assert Sample.load({}) == Sample() == Sample(recipe=AdversarialTraining(), fit=Fit())


def test_the_dump_is_flat_complete_and_loads_back() -> None:
    made = Sample.load({"kind": "natural", "lr": 0.3, "milestones": [0.25, 0.5]})
    dump = made.model_dump(mode="json")
    assert dump["kind"] == "natural"
    assert set(dump) == {"kind", "keep", *Fit.model_fields}
    assert Sample.load(dump) == made == Sample(recipe=Natural(), fit=Fit(lr=0.3, milestones=(0.25, 0.5)))
    assert Sample.load(made) is made


def test_two_kinds_never_share_a_dump() -> None:
    assert Sample.load({"kind": "at"}).dump() != Sample.load({"kind": "natural"}).dump()


def test_nested_tables_load_too() -> None:
    assert Sample.load({"recipe": {"kind": "at", "steps": 3}, "epochs": 2}) == Sample.load(
        {"kind": "at", "steps": 3, "epochs": 2}
    )


def test_without_a_method_only_values_are_flat() -> None:
    made = Loose.load({"recipe": "natural", "epochs": 2})
    assert (made.recipe, made.fit.epochs) == (Natural(), 2)
    assert made.dump()["recipe"] == {"kind": "natural"}
    assert Loose.load(made.dump()) == made


def test_all_findings_come_at_once_at_the_users_keys() -> None:
    found = _findings(
        {"kind": "at", "stps": 3, "epochs": "many", "steps": 0, "keep": "first", "augment": {"crp": 1}, "lr": -1}
    )
    assert found[("stps",)] == 'unknown key; did you mean "steps"?'
    assert "valid integer" in found[("epochs",)]
    assert "greater than or equal to 1" in found[("steps",)]
    assert "'last' or 'best'" in found[("keep",)]
    assert found[("augment", "crp")] == 'unknown key; did you mean "crop"?'
    assert "greater than 0" in found[("lr",)]
    assert len(found) == 6


@pytest.mark.parametrize(
    ("data", "place", "words"),
    [
        ({"kind": "att"}, ("kind",), 'no method "att" in recipes; did you mean "at"?'),
        ({"kind": 3}, ("kind",), "expected the name of a method, got 3"),
        ({"kind": "natural", "steps": 3}, ("steps",), "unknown key; there is augment, batch"),
        ({"recipe": {"steps": 3}}, ("recipe",), 'expected a name or a table with "kind"'),
        ({"fit": {"lr": 1.0}, "lr": 2.0}, ("lr",), 'given twice, here and in "fit"'),
        ({"recipe": {"kind": "at"}, "kind": "at"}, ("kind",), "unknown key"),
        ({"nesterov": True, "momentum": 0}, (), "set nesterov = false"),
    ],
)
def test_one_finding(data: object, place: tuple[str, ...], words: str) -> None:
    found = _findings(data)
    assert words in found[place], found


def test_what_is_no_table_is_refused() -> None:
    assert "valid dictionary" in _findings([1])[()]


def test_unknown_lists_everything_where_nothing_is_close() -> None:
    assert unknown("zzz", ["b", "a"]) == "unknown key; there is a, b"
    assert unknown("zzz", []) == "unknown key"
