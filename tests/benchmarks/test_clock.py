"""A step is taken apart without losing time, and lines with an earlier revision keep its column."""

from __future__ import annotations

import multiprocessing
import time

import pytest

import clock
from harness.records import read_lines
from step_parts import Clock, measure_step
from tiny import VIT
from training import Shape


def test_an_inner_part_does_not_count_for_the_outer_one() -> None:
    watch = Clock()
    watch.begin()
    began = time.process_time()
    with watch.part("outer"), watch.part("inner"):
        while time.process_time() - began < 0.04:
            pass
    found = watch.end(steps=2)
    assert found["calls"] == {"outer": 0.5, "inner": 0.5}
    assert found["ms"]["inner"] > 15 > 5 > found["ms"]["outer"] + found["ms"]["the rest"]


def test_a_step_is_taken_apart_into_its_parts() -> None:
    shape = Shape("tiny", VIT, 4, 1, {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 3})
    with multiprocessing.get_context("fork").Pool(1) as pool:  # it wraps functions of torch for good
        found = pool.apply(measure_step, (shape, 12, "bf16", True, "DIGITS"))
    parts = {"forward", "backward", "optimizer", "moving average", "method", "finite?", "data: augment"}
    assert parts < set(found["ms"]) and found["evaluation"] > 0
    assert {name: found["calls"][name] for name in ("forward", "backward", "optimizer", "moving average")} == {
        "forward": 1.0,
        "backward": 1.0,
        "optimizer": 1.0,
        "moving average": 1.0,
    }
    assert found["calls"]["finite?"] == 2, "the model's gradients once, and the probes' once"
    assert found["calls"]["data: augment"] == pytest.approx(4)


def test_a_line_without_an_earlier_revision_has_one_column() -> None:
    old = next(line for line in read_lines(clock.BENCH.part.lines) if line["kind"] == "step" and "before" in line["sides"])
    new = {**old, "sides": {"now": old["sides"]["now"]}, "commit_before": None}
    assert "| part of a step | before (ms) | now (ms) | calls before | calls now |" in clock.tables([old])
    assert "| part of a step | now (ms) | calls now |" in clock.tables([new])


def test_attention_is_measured_in_both_forms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock, "ATTENTION", ((1, 2, 3, 4),))
    found = clock.measure_attention()["ms"]
    assert all(value > 0 for value in found.values())
    assert list(found)[:2] == [f"1 images, 2 heads of 4, 3 tokens | bf16 | {form}" for form in ("fused", "plain")]
