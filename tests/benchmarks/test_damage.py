"""The campaign of damaged files, small: every kind of original is damaged, and nothing wrong gets through."""

from __future__ import annotations

from pathlib import Path

from faults.damage import cases


def test_damaged_files_give_one_clear_error_or_what_was_saved(tmp_path: Path) -> None:
    seen = list(cases(18, 0, tmp_path))
    assert [case for case in seen if not case["ok"]] == []
    kinds = {case["kind"].removesuffix(", damaged by chance") for case in seen}
    assert {
        "made to harm",
        "dense folder",
        "dense .pth",
        "pruned folder",
        "pruned .pth",
        "interrupted save",
        "checkpoints",
    } <= kinds
    assert all(case["part"] == "damage" and case["seconds"] < 10 and case["megabytes"] < 500 for case in seen)
    assert all(case["refused_with_a_message"] != case["read_as_it_was_saved"] for case in seen)
    assert len(seen) == 18
