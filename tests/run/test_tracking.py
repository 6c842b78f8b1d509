"""Trackers get every line once, whatever happens to the run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from p3b.errors import ConfigError
from p3b.run.folder import StageFolder
from p3b.run.trackers import trackers_asked_for
from p3b.run.tracking import Tracking, tracked_values
from refusals import Refusals
from runs import PHASES, finished, flags, lines, run

BLOCK = {"name": "blocks.0.attn", "kept_params": 30, "params": 40, "benefit_cls": 0.5, "benefit_patch": None}


class Kept:
    """A tracker that keeps what it gets; it can be broken."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.values: list[dict[str, float]] = []
        self.opened: list[tuple[str, int]] = []
        self.broken = self.closed = False

    def open(self, root: Path, stage: str, name: str, first_step: int, settings: Mapping[str, Any]) -> Kept:
        self.opened.append((name, first_step))
        return self

    def log(self, values: Mapping[str, float], step: int) -> None:
        if self.broken:
            raise ConnectionError("no network")
        self.steps.append(step)
        self.values.append(dict(values))

    def close(self) -> None:
        self.closed = True


def epoch(step: int) -> dict[str, Any]:
    return {"epoch": step // 10, "step": step, "train_loss": 0.5, "val_top1": 90.0, "kept_params": 100, "phase": "sparsify"}


def update(step: int) -> dict[str, Any]:
    return {"epoch": step / 10, "step": step, "blocks": [BLOCK]}


class Run:
    """A stage that writes lines, is stopped and goes on."""

    def __init__(self, root: Path, trackers: Mapping[str, Kept]) -> None:
        self.root, self.trackers, self.warned = root, trackers, []  # type: ignore[var-annotated]

    def begin(self, cut: Mapping[str, int] | None = None) -> tuple[Tracking, Callable[[str, dict[str, Any]], None]]:
        folder = StageFolder(self.root, "prune")
        openers = {name: each.open for name, each in self.trackers.items()}
        tracking = Tracking(
            folder, list(openers), {}, asked=True, say=str, warn=self.warned.append, openers=openers
        )  # fmt: skip
        tracking.open(goes_on=cut is not None)
        if cut is None:
            folder.begin({}, overwrite=False)
        else:
            folder.cut_lines(cut)
        tracking.catch_up()

        def write(file: str, line: dict[str, Any]) -> None:
            folder.append_line(file, line)
            tracking.send(file, line)

        return tracking, write


def test_what_a_resumed_run_makes_again_is_not_sent_again(tmp_path: Path) -> None:
    """Killed after step 30, resumed at the checkpoint of step 10: steps 15 to 30 come a second time."""
    kept = Kept()
    course = Run(tmp_path, {"kept": kept})
    _, write = course.begin()
    made = [("metrics.jsonl", epoch(10)), *(("blocks.jsonl", update(step)) for step in (15, 20))]
    made += [("metrics.jsonl", epoch(20)), ("blocks.jsonl", update(30))]
    for file, line in made:
        write(file, line)
    tracking, write = course.begin({"metrics.jsonl": 1, "blocks.jsonl": 0})
    for file, line in [*made[1:], ("metrics.jsonl", epoch(30)), ("metrics.jsonl", epoch(40))]:
        write(file, line)
    tracking.close()
    assert kept.steps == [10, 15, 20, 20, 30, 30, 40] and kept.closed
    (first, at), (second, later) = kept.opened
    assert first == second and (at, later) == (0, 31), "the same run goes on behind what it has"


def test_a_tracker_that_is_added_later_gets_all_lines_and_a_new_run_has_a_new_name(tmp_path: Path) -> None:
    kept, late = Kept(), Kept()
    _, write = Run(tmp_path, {"kept": kept}).begin()
    write("blocks.jsonl", update(0))  # of one shot
    write("blocks.jsonl", update(10))
    write("metrics.jsonl", epoch(10))
    Run(tmp_path, {"kept": kept, "late": late}).begin({"metrics.jsonl": 1, "blocks.jsonl": 2})
    assert kept.steps == [0, 10, 10] and late.steps == [0, 10, 10]
    assert "kept/blocks.0.attn" in late.values[0] and "loss/train" in late.values[2]
    Run(tmp_path, {"kept": kept}).begin()
    assert kept.opened[-1][1] == 0 and kept.opened[-1][0] != kept.opened[0][0]


def test_a_run_goes_on_without_a_tracker_that_fails(tmp_path: Path) -> None:
    kept, other = Kept(), Kept()
    course = Run(tmp_path, {"kept": kept, "other": other})
    _, write = course.begin()
    kept.broken = True
    write("metrics.jsonl", epoch(10))
    write("metrics.jsonl", epoch(20))
    assert other.steps == [10, 20]
    assert course.warned == ["warning: kept takes nothing any more (no network); the run goes on without it"]


def test_one_that_cannot_be_opened_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    def refuse(*_given: Any) -> Kept:
        raise ValueError("no key.")

    before = Kept()
    tracking = Tracking(
        StageFolder(tmp_path, "prune"),
        ["before", "wandb"],
        {},
        asked=True,
        say=str,
        warn=str,
        openers={"before": before.open, "wandb": refuse},
    )
    with pytest.raises(ConfigError, match=r"--track wandb cannot be used: no key\. Or give --track none"):
        tracking.open(goes_on=False)
    assert before.closed and not list(tmp_path.iterdir())


def test_values_have_names_that_trackers_group() -> None:
    assert tracked_values(epoch(10)) == {
        "epoch": 1.0, "loss/train": 0.5, "top1/val": 90.0, "kept_params": 100.0,
    }  # fmt: skip
    assert tracked_values(update(10)) == {"kept/blocks.0.attn": 0.75, "benefit_cls/blocks.0.attn": 0.5}


def test_a_missing_package_is_named_before_anything_is_written(
    data: Path, refused: Refusals, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("p3b.run.trackers.importlib.util.find_spec", lambda _name: None)
    assert trackers_asked_for(()) == () == trackers_asked_for(("none",))
    refused(
        "prune", *flags(data, refused.out, "--track", "wandb"),
        telling=("--track wandb needs the package wandb (Weights & Biases), which is not installed: pip install wandb",),
    )  # fmt: skip
    with pytest.raises(ConfigError, match="none contradicts the others"):
        trackers_asked_for(("none", "wandb"))


def test_tensorboard_shows_every_step_once_after_a_stop(data: Path, tmp_path: Path) -> None:
    """A real run, gone on with from its first epoch's checkpoint."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = finished("prune", data, tmp_path / "out", *PHASES, "--track", "tensorboard")
    (out / "prune" / "summary.json").unlink()
    newest = max((out / "prune" / "checkpoints").iterdir())
    newest.unlink()
    assert run("prune", *flags(data, out, *PHASES, "--track", "tensorboard", "--resume")) == 0
    events = EventAccumulator(str(out / "tensorboard" / "prune"))
    events.Reload()
    epochs = lines(out / "prune" / "metrics.jsonl")
    assert [(event.step, pytest.approx(event.value)) for event in events.Scalars("loss/train")] == [
        (line["step"], line["train_loss"]) for line in epochs
    ]
    assert len(events.Scalars("kept/blocks.0.attn")) == len(lines(out / "prune" / "blocks.jsonl"))
