"""The page on layouts says what the recorded lines say, and a measurement is recorded whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import layouts
from layouts import (
    BEGIN,
    END,
    LINES,
    MODELS,
    PAGE,
    PRUNE_RATIOS,
    RUNTIMES,
    WIDTHS,
    Widths,
    dense_model,
    main,
    small_model,
    tables,
    write_page,
)
from p3b.core.masks import Heads
from p3b.vit.compact import branch_shapes
from p3b.vit.cost import count_parameters
from records import ROOT, read_lines


def test_the_page_says_what_the_lines_say(tmp_path: Path) -> None:
    text = PAGE.read_text()
    copy = tmp_path / "layouts.md"
    copy.write_text(text)
    write_page(copy, read_lines(LINES))
    assert copy.read_text() == text, "docs/layouts.md and docs/results/layouts.jsonl differ: run `layouts.py table`"
    assert text.count(BEGIN) == text.count(END) == 1


def test_what_is_recorded_names_no_place_and_has_a_certificate() -> None:
    lines = read_lines(LINES)
    assert lines
    assert str(ROOT) not in LINES.read_text()
    for line in lines:
        assert {"command", "commit", "seed", "hardware", "threads", "versions"} <= line.keys()
        assert line["rows"][0]["layout"] == "dense"
        assert all(row["images_per_second"] > 0 for row in line["rows"])


@pytest.mark.parametrize("widths", WIDTHS, ids=str)
@pytest.mark.parametrize("prune_ratio", PRUNE_RATIOS)
def test_the_networks_meet_the_budget_at_every_alignment(prune_ratio: float, widths: Widths) -> None:
    dense, (align, whole_heads) = dense_model("animals"), widths
    small = small_model(dense, prune_ratio, align, whole_heads)
    assert abs(1 - count_parameters(small) / count_parameters(dense) - prune_ratio) <= 1e-3
    assert all(shape.inner % align == 0 for shape in branch_shapes(small))
    attentions = [block.attn for block in small.blocks]
    assert whole_heads or all(attention.num_heads == 4 for attention in attentions)
    least = Heads(gate=0, count=4).least_width(32, align)
    assert not whole_heads or all(attention.head_dim >= least or attention.num_heads == 1 for attention in attentions)
    fewer = any(attention.num_heads < 4 for attention in attentions)
    assert fewer or not whole_heads or prune_ratio < max(PRUNE_RATIOS)


@pytest.mark.parametrize("prune_ratio", PRUNE_RATIOS)
def test_the_networks_are_those_that_were_recorded(prune_ratio: float) -> None:
    """Of every width that a line has: so figures that were measured at other times may stand side by side."""
    dense = dense_model("animals")
    small = {widths: count_parameters(small_model(dense, prune_ratio, *widths)) for widths in WIDTHS}
    for line in read_lines(LINES):
        if (line["network"], line["prune_ratio"]) == ("animals", prune_ratio):
            for row in layouts._small(line["rows"]):
                assert row["params"] == small[row["align"], row.get("heads", False)]


@pytest.mark.parametrize("runtime", ["fp32", "onnx"])
def test_a_measurement_replaces_its_earlier_one(runtime: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2, "num_classes": 3}
    monkeypatch.setattr(layouts, "CANDIDATES", ("index", "balanced"))
    monkeypatch.setattr(layouts, "ALIGNED", ("index",))
    monkeypatch.setattr(layouts, "MODELS", {"animals": (MODELS["animals"][0], tiny)})
    lines, page = tmp_path / "layouts.jsonl", tmp_path / "layouts.md"
    page.write_text(f"Before.\n{BEGIN}\nSTALE\n{END}\nAfter.\n")
    asked = ["run", "--runtime", runtime, "--prune-ratio", "0.5", "--batch-size", "1", "--rounds", "1", "--seconds", "0.1"]
    for _ in range(2 if runtime == "fp32" else 1):
        main(asked, lines=lines, page=page)
    (line,) = read_lines(lines)
    assert (line["network"], line["prune_ratio"], line["runtime"], line["batch_size"]) == ("animals", 0.5, runtime, 1)
    rows: list[dict[str, Any]] = line["rows"]
    assert {"dense", "index", "balanced"} <= {row["layout"] for row in rows}
    assert rows[1]["params"] < rows[0]["params"]
    thin = [("index", 8, False)] if runtime == "fp32" else []
    whole = [("index", 8, True), ("balanced", 8, True)]
    assert [(row["layout"], row["align"], row["heads"]) for row in rows if row["align"] == 8] == thin + whole
    assert "| index, align 8, whole heads | balanced, align 8, whole heads |" in page.read_text()
    text = page.read_text()
    assert text.startswith("Before.\n") and text.endswith("\nAfter.\n") and "STALE" not in text
    assert text == f"Before.\n{BEGIN}\n\n{tables(read_lines(lines))}\n{END}\nAfter.\n"
    assert RUNTIMES[runtime] in text


def test_lines_of_before_stand_beside_those_with_whole_heads() -> None:
    """An old line has no row with fewer heads, and an empty cell; the best of all rows counts for the goal."""
    old = next(line for line in read_lines(LINES) if line["batch_size"] == 32)
    old = {**old, "rows": [{key: value for key, value in row.items() if key != "heads"} for row in old["rows"][:2]]}
    dense, index = old["rows"]
    quick = {**index, "align": 8, "heads": True, "images_per_second": index["images_per_second"] * 100}
    alone, both = tables([old]), tables([old, {**old, "prune_ratio": 0.75, "rows": [dense, index, quick]}])
    assert "whole heads" not in alone and "| index | index, align 8, whole heads |" in both
    assert f"| {layouts._cell(dense, index)} |  |" in both
    assert f"| {layouts._cell(dense, index)} | {layouts._cell(dense, quick)} |" in both
    assert "at 50%, 0 of 1 measurements at batch 32 reach 0.9" in both
    assert "at 75%, 1 of 1 measurements at batch 32 reach 0.9" in both


def test_a_cell_is_the_speed_up_and_its_share_of_the_macs_ratio() -> None:
    dense = {"images_per_second": 100.0, "macs": 1000, "layout": "dense", "align": 1}
    assert layouts._cell(dense, {"images_per_second": 150.0, "macs": 500}) == "1.50 (0.75)"
    rows = [dense, {**dense, "images_per_second": 180.0, "macs": 500}, {**dense, "images_per_second": 90.0, "macs": 500}]
    assert layouts._share(rows) == pytest.approx(0.9)
    assert layouts._speedup(rows) == pytest.approx(1.8)
    assert torch.get_num_threads() >= 1
