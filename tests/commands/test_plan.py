"""`p3b plan` and `p3b data`: what would be done and what is there, before anything is trained or written."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import p3b.run.forecast
from p3b.commands.plan import duration
from p3b.run.forecast import largest_ratio, stand_in
from p3b.vit.cost import count_parameters
from runs import MODEL, colour_folders, run
from tiny import tiny_vit


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return colour_folders(tmp_path_factory.mktemp("data"))


def test_a_plan_says_data_recipe_time_and_budgets_and_writes_nothing(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(p3b.run.forecast, "images_per_second", lambda models, *_args, **_options: [10.0] * len(models))
    given = ("--budgets", "0.25", "0.99", "--measured-steps", "1", "--device", "cpu", "--precision", "fp32")
    assert run("plan", str(data), *MODEL, "--from-scratch", "--keep", "0.5", *given) == 0
    said = capsys.readouterr().out
    assert "train: 12 images: 12 png" in said and "recipe auto: --batch-size 4" in said
    assert "time: about" in said and "a prune ratio of 0.99 cannot be met" in said
    assert "19,347" in said and "100.00" in said, "the dense model's parameters, and milliseconds an image"
    assert list(tmp_path.iterdir()) == []
    assert run("plan", str(data), *MODEL, "--from-scratch", "--keep", "0.01", *given) == 2
    assert "A prune ratio of 0.99 cannot be met; the largest is 0." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("--epochs", "2", "--prune-schedule", "at-once", "--prune-start-epoch", "1"), r"\(.* warm-up, .* the cut, .* fine"),
        (("--epochs", "0", "--finetune-epochs", "0", "--val-share", "0"), r"\(\d+ s the cut\)"),
        (("--epochs", "2", "--prune-schedule", "gradual"), r"\(.* pruning, .* evaluation\)"),
    ],
)
def test_the_parts_of_the_time_are_those_of_the_run(
    given: tuple[str, ...], said: str, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A cut in one shot is measured by a cut."""
    monkeypatch.setattr(p3b.run.forecast, "images_per_second", lambda models, *_args, **_options: [10.0] * len(models))
    fast = ("--measured-steps", "1", "--device", "cpu", "--precision", "fp32", "--test-path", str(data / "test"))
    assert run("plan", str(data / "train"), *MODEL, "--from-scratch", "--keep", "0.5", *fast, *given) == 0
    time = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("time: about"))
    assert re.search(said, time)


def test_data_says_what_is_there(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("data", str(data)) == 0
    said = capsys.readouterr().out
    assert "train 12 images of 3 classes" in said and "test: 9 images: 9 png" in said
    assert run("data", "nowhere") == 2 and "nowhere" in capsys.readouterr().err


def test_what_is_rare_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    colour_folders(tmp_path, {"train": 9}, classes=("blue",))
    colour_folders(tmp_path, {"train": 2}, classes=("red",), seed=1)
    assert run("data", str(tmp_path), "--val-share", "0") == 0
    assert "imbalanced: blue has 9 training images, red 2" in capsys.readouterr().out


def test_a_stand_in_has_the_parameters_of_the_budget() -> None:
    model = tiny_vit()
    before = count_parameters(model)
    assert count_parameters(stand_in(model, 0.4, {})) == pytest.approx(0.6 * before, abs=100)
    assert count_parameters(model) == before and 0.4 < largest_ratio(model) < 1


def test_durations_read_well() -> None:
    assert [duration(seconds) for seconds in (41.2, 700, 12_600)] == ["41 s", "12 min", "3.5 h"]
