"""An epoch's line fits a terminal of 80 columns."""

from __future__ import annotations

import pytest

from p3b.run.records import epoch_line
from p3b.run.short_figures import duration, short_count


@pytest.mark.parametrize("loss", [0.0, 1.09861, 6.9077, 12.345, 1234.5])
@pytest.mark.parametrize("params", [950, 97_315, 5_524_416, 86_567_656, 999_999, 632_045_800])
@pytest.mark.parametrize("seconds", [0.0, 8.34, 99.96, 5999.0, 86_399.0, 360_000.0])
def test_the_line_of_an_epoch_fits_80_columns(loss: float, params: int, seconds: float) -> None:
    line = {"epoch": 300, "phase": "fine-tune", "train_loss": loss, "kept_params": params, "seconds": seconds}
    assert len(epoch_line(line, 300, "test", 100.0)) <= 80


def test_what_the_line_says() -> None:
    line = {"epoch": 3, "phase": "sparsify", "train_loss": 1.09861, "kept_params": 97_315, "seconds": 8.34}
    assert (
        epoch_line(line, 10, "val", 41.666) == "epoch   3/10  sparsify  loss 1.0986  val top-1  41.67 %  97.3 k params  8.3 s"
    )


@pytest.mark.parametrize(
    ("number", "text"), [(950, "0.95 k"), (999_949, "1000 k"), (1_000_000, "1.00 M"), (86_567_656, "86.6 M")]
)
def test_short_counts(number: int, text: str) -> None:
    assert short_count(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(8.34, "8.3 s"), (100, "1m40s"), (5999, "99m59s"), (6000, "1h40m"), (360_000, "4d04h")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
