"""The page on layouts says what the recorded lines say, and a measurement is recorded whole."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
from timm.models.vision_transformer import VisionTransformer

import layouts
from harness.records import read_lines
from layouts import BENCH, MODELS, NAMES, PRUNE_RATIOS, RUNTIMES, WIDTHS, Widths, dense_model, small_model, tables
from p3b.core.masks import Heads
from p3b.vit.cost import count_parameters
from p3b.vit.shapes import branch_shapes


@pytest.fixture(scope="module", params=PRUNE_RATIOS)
def small(request: pytest.FixtureRequest) -> tuple[float, VisionTransformer, dict[Widths, VisionTransformer]]:
    """A prune ratio, the dense network, and the small one of all widths."""
    dense = dense_model("animals")
    return request.param, dense, {widths: small_model(dense, request.param, *widths) for widths in WIDTHS}


def test_every_line_is_of_dense_and_small_models() -> None:
    for line in read_lines(BENCH.part.lines):
        assert {"seed", "threads", "versions"} <= line.keys() and layouts._key(line) in NAMES.values()
        assert line["rows"][0]["layout"] == "dense"
        assert all(row["images_per_second"] > 0 for row in line["rows"])


def test_the_networks_meet_the_budget_at_every_alignment(small: Any) -> None:
    prune_ratio, dense, models = small
    for (align, whole_heads), model in models.items():
        assert abs(1 - count_parameters(model) / count_parameters(dense) - prune_ratio) <= 1e-3
        assert all(shape.inner % align == 0 for shape in branch_shapes(model))
        attentions = [block.attn for block in model.blocks]
        assert whole_heads or all(attention.num_heads == 4 for attention in attentions)
        least = Heads(gate=0, count=4).least_width(32, align)
        assert not whole_heads or all(attention.head_dim >= least or attention.num_heads == 1 for attention in attentions)
        fewer = any(attention.num_heads < 4 for attention in attentions)
        assert fewer or not whole_heads or prune_ratio < max(PRUNE_RATIOS)


def test_the_networks_are_those_that_were_recorded(small: Any) -> None:
    """Of every width that a line has: so figures that were measured at other times may stand side by side."""
    prune_ratio, _, models = small
    for line in read_lines(BENCH.part.lines):
        if (line["network"], line["prune_ratio"]) == ("animals", prune_ratio):
            for row in layouts._small(line["rows"]):
                assert row["params"] == count_parameters(models[row["align"], row.get("heads", False)])


@pytest.mark.parametrize("runtime", ["fp32", "onnx"])
def test_a_measurement_has_a_row_for_every_layout_and_width(runtime: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2, "num_classes": 3}
    monkeypatch.setattr(layouts, "CANDIDATES", ("index", "balanced"))
    monkeypatch.setattr(layouts, "ALIGNED", ("index",))
    exported: list[Path] = []  # an export takes seconds; tests/deploy/test_layouts.py exports and compares
    monkeypatch.setattr(layouts, "OnnxModel", lambda model, _images, file, flat: exported.append(file) or model)
    monkeypatch.setattr(layouts, "MODELS", {"animals": (MODELS["animals"][0], tiny)})
    line = layouts.measure(f"animals-{runtime}-50-1", Namespace(rounds=1, seconds=0.1, clock="wall"))
    assert (line["network"], line["prune_ratio"], line["runtime"], line["batch_size"]) == ("animals", 0.5, runtime, 1)
    rows: list[dict[str, Any]] = line["rows"]
    assert {"dense", "index", "balanced"} <= {row["layout"] for row in rows} and rows[-1]["params"] < rows[0]["params"]
    assert [row["layout"] for row in rows if row["params"] == rows[0]["params"]] == [
        "dense",
        *([layouts.DENSE_AS_EXPORTED] if runtime == "onnx" else []),
    ]
    assert len(exported) == (len(rows) if runtime == "onnx" else 0)
    thin = [("index", 8, False)] if runtime == "fp32" else []
    whole = [("index", 8, True), ("balanced", 8, True)]
    assert [(row["layout"], row["align"], row["heads"]) for row in rows if row["align"] == 8] == thin + whole
    made_by = {"command": "c", "commit": "0" * 40, "hardware": {"machine": "m", "cores": 2, "accelerator": None}}
    text = "\n".join(tables([{**line, **made_by}]))
    assert RUNTIMES[runtime] in text
    assert "| index, align 8, whole heads | balanced, align 8, whole heads |" in text


def test_lines_of_before_stand_beside_those_with_whole_heads() -> None:
    """An old line has no row with fewer heads, and an empty cell; the best of all rows counts for the goal."""
    old = next(line for line in read_lines(BENCH.part.lines) if line["batch_size"] == 32)
    old = {**old, "rows": [{key: value for key, value in row.items() if key != "heads"} for row in old["rows"][:2]]}
    dense, index = old["rows"]
    quick = {**index, "align": 8, "heads": True, "images_per_second": index["images_per_second"] * 100}
    alone, both = (
        "\n".join(tables(lines)) for lines in ([old], [old, {**old, "prune_ratio": 0.75, "rows": [dense, index, quick]}])
    )
    assert "whole heads" not in alone and "| index | index, align 8, whole heads |" in both
    assert f"| {layouts._cell(dense, index)} |  |" in both
    assert f"| {layouts._cell(dense, index)} | {layouts._cell(dense, quick)} |" in both
    assert "At 50%, 0 of 1 measurements at batch 32 reach 0.9" in both
    assert "At 75%, 1 of 1 measurements at batch 32 reach 0.9" in both


def test_a_cell_is_the_speed_up_and_its_share_of_the_macs_ratio() -> None:
    dense = {"images_per_second": 100.0, "macs": 1000, "layout": "dense", "align": 1}
    assert layouts._cell(dense, {"images_per_second": 150.0, "macs": 500}) == "1.50 (0.75)"
    rows = [dense, {**dense, "images_per_second": 180.0, "macs": 500}, {**dense, "images_per_second": 90.0, "macs": 500}]
    assert layouts._share(rows) == pytest.approx(0.9)
    assert layouts._speedup(rows) == pytest.approx(1.8)
