"""A dozen of the models that `benchmarks/faults/modules.py` makes by the hundred."""

from __future__ import annotations

from pathlib import Path

import pytest

from faults.modules import CHANGES, EVENTS, KINDS, cases


@pytest.mark.parametrize("seed", range(4))
def test_a_model_comes_out_exact_or_is_refused_in_words(seed: int, tmp_path: Path) -> None:
    for case in cases(len(KINDS), seed, tmp_path):
        assert case["ok"], case


def test_cases_are_drawn_anew_from_the_same_seed(tmp_path: Path) -> None:
    assert len(CHANGES) * len(EVENTS) > 200
    first, again = (list(cases(3, 7, tmp_path)) for _ in range(2))
    assert first == again
    assert [case["kind"] for case in first] == list(KINDS)
