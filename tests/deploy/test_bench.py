"""Sides in turns: what a ratio and its spread say, and what they do not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from exported import PREPROCESSING, save_small
from p3b.deploy.bench import Ratio, Side, example, measure, open_side, ratio_of, size_on_disk
from p3b.deploy.metadata import Metadata
from p3b.deploy.peak import main, peak_memory
from p3b.deploy.turns import in_turns
from p3b.errors import ConfigError


class Clock:
    """Seconds that pass only where a side lets them."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Steady:
    """A model that takes a fixed time for each image."""

    metadata = Metadata(None, PREPROCESSING)

    def __init__(self, clock: Clock, seconds: float) -> None:
        self.clock, self.seconds, self.calls = clock, seconds, 0

    def __call__(self, images: np.ndarray) -> np.ndarray:
        self.clock.now += self.seconds * len(images)
        self.calls += 1
        return np.zeros((len(images), 2), np.float32)


def test_sides_take_turns_and_a_warm_up_is_not_counted() -> None:
    order: list[str] = []
    taken = in_turns({name: lambda name=name: order.append(name) for name in "ab"}, rounds=3, seconds=10)
    assert "".join(order) == "abababab" and {name: len(each) for name, each in taken.items()} == {"a": 3, "b": 3}


def test_rounds_end_with_the_time_but_there_are_three() -> None:
    clock = Clock()
    sides = {"slow": Steady(clock, 10.0), "quick": Steady(clock, 5.0)}
    timed = measure(sides, 2, rounds=100, seconds=1.0, clock=clock)
    assert timed["slow"].rounds == 3
    assert (timed["slow"].p50_ms, timed["slow"].p90_ms, timed["slow"].images_per_second) == (20_000, 20_000, 0.1)
    assert timed["slow"].ratio is None and timed["quick"].ratio == Ratio(2.0, 2.0, 2.0)
    assert measure(sides, 2, rounds=100, seconds=300.0, clock=clock)["quick"].rounds == 10


def test_a_ratio_within_the_spread_is_no_difference() -> None:
    first = [1.0, 1.0, 1.0, 1.0, 1.0]
    noise = ratio_of(first, [0.9, 1.1, 0.95, 1.05, 1.0])
    assert not noise.is_a_difference and str(noise).startswith("no difference (0.95 to 1.05")
    for other in ([0.5, 0.51, 0.49, 0.5, 2.0], [2.0, 2.1, 1.9, 2.0, 0.5]):
        assert ratio_of(first, other).is_a_difference
    assert str(ratio_of(first, [0.5] * 5)) == "x 2.00 (2.00 to 2.00)"


def test_ratios_are_of_the_same_round() -> None:
    """A machine that slows down for both sides changes no ratio."""
    assert ratio_of([1.0, 3.0, 9.0], [0.5, 1.5, 4.5]) == Ratio(2.0, 2.0, 2.0)


def test_examples_are_as_the_model_takes_them() -> None:
    assert example(Metadata(None, PREPROCESSING), 2).shape == (2, 3, 32, 32)
    raw = example(Metadata(None, PREPROCESSING, takes="images"), 1)
    assert raw.dtype == np.uint8 and raw.shape == (1, 3, 36, 36)
    with pytest.raises(ConfigError, match="how large"):
        example(Metadata(), 1)


def test_the_dense_side_of_a_pruned_model_is_larger(tmp_path: Path) -> None:
    saved = save_small(tmp_path / "pruned")
    counts = []
    for side in (Side(saved), Side(saved, dense=True)):
        runner = open_side(side)
        counts.append(sum(value.numel() for value in runner._model.parameters()))  # type: ignore[attr-defined]
    assert counts[0] < counts[1] and "dense of" in Side(saved, dense=True).name
    assert size_on_disk(saved) == sum(file.stat().st_size for file in saved.iterdir())


def test_peak_memory_is_that_of_a_process_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved = save_small(tmp_path / "pruned")
    main([str(saved), "--batch-size", "2"])
    assert int(capsys.readouterr().out) >= 0
    assert peak_memory(Side(tmp_path / "nowhere"), layout="index", batch_size=1, threads=1) is None
