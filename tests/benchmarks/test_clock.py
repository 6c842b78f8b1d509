"""The page of the clock says what its lines say, and a step is taken apart without losing time."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import clock
from records import read_lines


def test_the_page_is_made_from_the_lines() -> None:
    lines = read_lines(clock.LINES)
    made = clock.PAGE.read_text().partition(clock.BEGIN)[2].partition(clock.END)[0]
    assert lines and made.strip() == clock.tables(lines).strip()
    assert {line["name"] for line in lines} <= set(clock.ENTRIES)


def test_an_inner_part_does_not_count_for_the_outer_one() -> None:
    watch = clock.Clock()
    watch.begin()
    began = time.process_time()
    with watch.part("outer"), watch.part("inner"):
        while time.process_time() - began < 0.04:
            pass
    found = watch.end(steps=2)
    assert found["calls"] == {"outer": 0.5, "inner": 0.5}
    assert found["ms"]["inner"] > 15 > 5 > found["ms"]["outer"] + found["ms"]["the rest"]


def test_a_step_is_taken_apart_into_its_parts() -> None:
    shape = {
        "batch": 4,
        "images": 12,
        "model": "vit_tiny_patch16_224",
        "img_size": 16,
        "patch_size": 8,
        "embed_dim": 24,
        "depth": 1,
    }
    asked = {**clock.SHAPES, "tiny": {"title": "tiny", "num_heads": 3, **shape}}
    found = clock._measured(
        {"kind": "step", "shape": "tiny", "precision": "bf16", "prune": True},
        asked,
        clock.ROOT / "src",
        Path("nowhere"),
        Path("nowhere"),
    )
    parts = {"forward", "backward", "optimizer", "moving average", "method", "finite?", "data: augment"}
    assert parts < set(found["ms"]) and found["evaluation"] > 0
    assert {name: found["calls"][name] for name in ("forward", "backward", "optimizer", "moving average")} == {
        "forward": 1.0,
        "backward": 1.0,
        "optimizer": 1.0,
        "moving average": 1.0,
    }
    assert found["calls"]["finite?"] == 2, "one look at the model's gradients, one at the probes'"
    assert found["calls"]["data: augment"] == pytest.approx(4)
