"""Outcomes pack and unpack; records refuse what they do not know."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from pipeline.core.record import Outcomes, RunRecord


@given(st.lists(st.booleans(), min_size=1, max_size=70))
def test_bits_round_trip(hits: list[bool]) -> None:
    packed = Outcomes.of(range(len(hits)), hits)
    assert packed.hits() == tuple(hits)
    assert Outcomes.load(packed.dump()) == packed


def test_other_examples_have_another_digest() -> None:
    assert Outcomes.of([1, 2], [True, True]).examples != Outcomes.of([2, 1], [True, True]).examples


def test_one_hit_per_example() -> None:
    with pytest.raises(ValueError, match="one hit per example, got 1 for 2"):
        Outcomes.of([1, 2], [True])


def test_newer_schema_is_refused() -> None:
    record = {
        "schema_version": 2,
        "name": "a-b",
        "spec": {"name": "a", "task": {}},
        "spec_digest": "",
        "data_digest": "",
        "environment": {},
    }
    with pytest.raises(ValidationError, match="schema_version"):
        RunRecord.load(record)
    assert RunRecord.load({**record, "schema_version": 1}).complete is False
