"""The number of processes changes nothing: a small version of the campaign's part, one case of each kind."""

from __future__ import annotations

from pathlib import Path

from faults.ranks import cases


def test_one_two_and_four_processes_do_the_same(tmp_path: Path) -> None:
    found = list(cases(3, seed=1, work=tmp_path))
    assert [case for case in found if not case["ok"]] == []
    assert [case["kind"] for case in found] == ["pruning", "evaluation", "command"]
    assert found[0]["ratios_apart_float64"] < 1e-9
    assert found[0]["mask_elements_apart_float64"] == 0
