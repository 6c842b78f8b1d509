"""Sides take turns, lines are recorded once, and the page is made of them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from harness.command import Bench, asked_for, machine_flags, main
from harness.pages import END, Part, cell, circumstances, counted, folded, how_it_was_run, table
from harness.records import Line, add_line, certified, read_lines, write_lines
from harness.turns import CPU, ratio, take_turns


def test_sides_take_turns_in_an_order_that_turns_around() -> None:
    order: list[str] = []
    found = take_turns(CPU, {"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 3, {"b": 2})
    assert "".join(order) == "ab" + "abb" + "bba" + "abb"
    assert found["a"]["ratio"] == found["a"]["wall_ratio"] == 1
    least, most = found["b"]["ratio_range"]
    assert least <= found["b"]["ratio"] <= most
    assert ratio({"ratio": 1.5, "ratio_range": [1.0, 2.0]}) == "1.500 (1.000 to 2.000)"
    assert ratio({"ratio": 1.5}) == "1.500", "of a line that has no range"


def test_a_line_has_a_certificate_and_a_record_is_read_as_written(tmp_path: Path) -> None:
    line = certified(lambda: {"found": 1}, "python x", "torch", "no-such-package")
    assert line["found"] == 1 and line["command"] == "python x" and len(line["commit"]) == 40
    assert {"changed_since", "hardware", "seconds", "date"} <= line.keys()
    assert line["versions"].keys() == {"python", "torch"}
    file = tmp_path / "folder" / "lines.jsonl"
    assert read_lines(file) == []
    add_line(file, line)
    add_line(file, {"second": True})
    assert read_lines(file) == [line, {"second": True}]
    write_lines(file, [{"third": 3}])
    assert read_lines(file) == [{"third": 3}]
    assert circumstances(line).startswith(f"{line['date'][:10]}, commit {line['commit'][:12]}")


def test_tables_folds_and_certificates_are_markdown() -> None:
    assert table(["a", "b"], [["x", "1"], ["y", "2"]]) == ["| a | b |", "|---|---:|", "| x | 1 |", "| y | 2 |", ""]
    assert folded("Title", ["text"]) == ["<details>", "<summary>Title</summary>", "", "text", "</details>", ""]
    assert cell("a|b\nc") == "a\\|b c"
    assert (counted(1, "round"), counted(2, "round")) == ("1 round", "2 rounds")
    made = {"commit": "0" * 40, "changed_since": True, "hardware": {"machine": "m", "cores": 2, "accelerator": None}}
    lines = [{**made, "command": "first", "seconds": 5}, {**made, "command": "second", "seconds": 6000}]
    text = how_it_was_run([*lines, {**made, "commit": "1" * 40, "command": "third"}], "x", "y", "z")
    assert "commit 000000000000 with changes that were not committed, 2 cores m, no accelerator:" in text
    assert text.index("- `first`: x, 5 s") + 1 == text.index("- `second`: y, 100 min") < text.index("- `third`: z")


@pytest.fixture
def tool(tmp_path: Path) -> Bench:
    """A tool that counts its measurements; record and page lie in tmp_path."""
    done: list[str] = []

    def measure(name: str, given: argparse.Namespace) -> dict[str, Any]:
        done.append(name)
        return {"value": len(done), "rounds": given.rounds}

    def tables(lines: Sequence[Line]) -> list[str]:
        return table(["name", "value"], [[line["name"], str(line["value"])] for line in lines])

    part = Part("tool.py", tmp_path / "tool.jsonl", tmp_path / "page.md", tables)
    part.page.write_text(f"Before.\n\n{part.begin}\nold\n{END}\n\nAfter.\n")
    return Bench("What?", part, ("a-1", "a-2", "b"), measure, machine_flags)


def test_a_measurement_replaces_its_earlier_line_and_the_page_is_made(tool: Bench) -> None:
    assert main(tool, ["run", "--only", "a-", "--rounds", "7"]) == 0
    another = {**read_lines(tool.part.lines)[0], "device": "another"}
    add_line(tool.part.lines, another)
    assert main(tool, ["run", "--only", "a-1"]) == 0
    lines = read_lines(tool.part.lines)
    assert [(line["name"], line["value"]) for line in lines] == [("a-2", 2), ("a-1", 1), ("a-1", 3)]
    assert lines[1] == another, "what another kind of device gave stays"
    assert lines[0]["rounds"] == 7
    assert lines[0]["command"] == "python benchmarks/tool.py run --only a-2 --device cpu --threads 1"
    text = tool.part.page.read_text()
    assert text.startswith("Before.\n\n<!-- made from docs/results/tool.jsonl by `python benchmarks/tool.py table`")
    assert text.endswith(f"| a-1 | 3 |\n\n{END}\n\nAfter.\n") and "old" not in text
    tool.part.lines.unlink()
    assert main(tool, ["table"]) == 0
    assert "No run is recorded yet." in tool.part.page.read_text()
    with pytest.raises(SystemExit):
        main(tool, ["run", "--only", "nonsense"])


def test_what_is_kept_is_not_measured_again(tool: Bench) -> None:
    for _ in range(2):
        assert main(replace(tool, keeps=True), ["run", "--only", "b"]) == 0
    assert [line["value"] for line in read_lines(tool.part.lines)] == [1]


def test_a_name_with_a_dash_at_its_end_stands_for_all_that_begin_so() -> None:
    assert asked_for("a-1", None) and asked_for("a-1", "a-1") and asked_for("a-1", "a-")
    assert not asked_for("a-1", "a") and not asked_for("b", "a-")
