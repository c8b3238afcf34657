"""Holm's correction against its definition."""

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from pipeline.report.paired import holm

_P = st.lists(st.floats(min_value=0, max_value=1), max_size=6)


@given(_P)
def test_holm_rejects_exactly_what_the_step_down_procedure_rejects(p_values: Sequence[float]) -> None:
    level = 0.05
    rejected: set[int] = set()
    for rank, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        if p_values[i] * (len(p_values) - rank) >= level:
            break
        rejected.add(i)
    assert {i for i, p in enumerate(holm(p_values)) if p < level} == rejected


@given(_P)
def test_holm_lies_between_no_correction_and_bonferroni(p_values: Sequence[float]) -> None:
    for raw, adjusted in zip(p_values, holm(p_values), strict=True):
        assert raw <= adjusted <= min(1.0, raw * len(p_values))
