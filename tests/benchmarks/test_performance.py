"""The harness lets sides take turns, records what they took, and the page says what the lines say."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from bench import (
    BEGIN,
    END,
    ENTRIES,
    LINES,
    PAGE,
    Entry,
    Machine,
    Shape,
    main,
    measure_benefit,
    measure_gates,
    measure_masks,
    take_turns,
    write_page,
)
from p3b.scoring.estimators import ESTIMATORS
from records import ROOT, read_lines
from tiny import VIT

TINY = Shape("tiny", VIT, 2, 3, {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3})


def test_the_page_says_what_the_lines_say(tmp_path: Path) -> None:
    text = PAGE.read_text()
    copy = tmp_path / "performance.md"
    copy.write_text(text)
    write_page(copy, read_lines(LINES))
    assert copy.read_text() == text, "docs/performance.md and docs/results/performance.jsonl differ: run `bench.py table`"
    assert text.count(BEGIN) == text.count(END) == 1


def test_what_is_recorded_is_known_and_complete() -> None:
    lines = read_lines(LINES)
    assert len({(line["name"], line["device"]) for line in lines}) == len(lines)
    for line in lines:
        assert line["name"] in ENTRIES
        assert {"command", "commit", "hardware", "versions", "seconds", "date", "result"} <= line.keys()
    assert not LINES.exists() or str(ROOT) not in LINES.read_text()


def test_sides_take_turns_in_an_order_that_turns_around() -> None:
    order: list[str] = []
    machine = Machine(torch.device("cpu"))
    found = take_turns(machine, {"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=3)
    assert "".join(order) == "ab" + "ab" + "ba" + "ab"
    assert found["a"]["ratio"] == found["a"]["wall_ratio"] == 1


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_entry_becomes_a_line_and_a_row_and_replaces_the_one_before(precision: str, tmp_path: Path) -> None:
    entries = {
        "gates-tiny": Entry("gates", "tiny", precision, measure_gates, {}),
        "masks-tiny": Entry("masks", "tiny", precision, measure_masks, {}),
        "benefit-tiny": Entry("benefit", "tiny", precision, measure_benefit, {}),
    }
    lines, page = tmp_path / "performance.jsonl", tmp_path / "page.md"
    page.write_text(f"Before.\n\n{BEGIN}\nold\n{END}\n\nAfter.\n")
    for only in ("gates-", "masks-tiny", "benefit-", "gates-tiny"):
        assert (
            main(["run", "--only", only, "--rounds", "2"], entries=entries, shapes={"tiny": TINY}, lines=lines, page=page) == 0
        )
        if only == "gates-":  # what another kind of device gave stays
            lines.write_text(json.dumps({**read_lines(lines)[0], "device": "another"}) + "\n" + lines.read_text())
    recorded = read_lines(lines)
    assert [line["name"] for line in recorded] == ["gates-tiny", "masks-tiny", "benefit-tiny", "gates-tiny"]
    gates = recorded[-1]["result"]
    assert gates["rounds"] == 2 and gates["sides"]["pruning"]["ratio"] > 0
    assert recorded[1]["result"]["share_of_training"] > 0
    benefit = recorded[2]["result"]["sides"]
    assert list(benefit) == ["plain", *ESTIMATORS] and all(side["ratio"] > 0 for side in benefit.values())
    text = page.read_text()
    assert text.startswith("Before.") and text.endswith("After.\n") and "old" not in text
    assert f"| tiny | {precision} | 1 core, 2 |" in text
    with pytest.raises(SystemExit):
        main(["run", "--only", "nonsense"], entries=entries, lines=lines, page=page)


def test_the_peak_of_a_process_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    shape = {**asdict(TINY), "arguments": {**TINY.arguments, "embed_dim": 384}}
    asked = {"shape": shape, "device": "cpu", "precision": "fp32", "estimator": "paper", "steps": 1}
    assert main(["peak", "--asked", json.dumps(asked)]) == 0
    assert int(capsys.readouterr().out) >= 0
