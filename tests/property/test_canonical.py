"""Equal values have equal bytes; anything that JSON cannot hold is refused."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.canonical import canonical, derive_seed, digest

_LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
_JSON = st.recursive(_LEAVES, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=20)


@given(_JSON)
def test_round_trip(data: object) -> None:
    assert json.loads(canonical(data)) == data


@given(st.dictionaries(st.text(), st.integers(), min_size=2))
def test_key_order_is_irrelevant(table: dict[str, int]) -> None:
    reversed_table = dict(reversed(table.items()))
    assert digest(table) == digest(reversed_table)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), {"a": float("-inf")}])
def test_not_a_number_is_refused(bad: object) -> None:
    with pytest.raises(ValueError, match="Out of range float values"):
        canonical(bad)


@given(st.integers(min_value=0), st.lists(st.text() | st.integers(), min_size=1, max_size=4))
def test_seed_depends_on_every_name_in_order(root: int, names: list[str | int]) -> None:
    seed = derive_seed(root, *names)
    assert 0 <= seed < 2**63
    assert seed == derive_seed(root, *names)
    assert seed != derive_seed(root, *names, "more")
    assert seed != derive_seed(root + 1, *names)
