"""`p3b prune --prune-schedule at-once`: a warm-up of the dense model, the cut in one shot, and the small model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import p3b
import p3b.run.training
from p3b.core.schedule import Schedule
from p3b.errors import ScheduleError
from p3b.run.options import CompareConfig, MachineOptions, PhaseOptions
from p3b.run.prune_plan import phases_of, plan_pruning
from p3b.run.series_plan import Run, config_of, shared_warm_ups
from refusals import Refusals
from runs import CALM, PHASES, colour_folders, flags, lines, read, run, same_tensors, weights
from tiny import parameters_of

AT_ONCE = ("--prune-schedule", "at-once", "--epochs", "3")
NARROW = ("--prune-stream", "auto", "--align", "4", "--prune-ratio", "0.5")
LEARNS = ("--lr", "0.05", *CALM)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return colour_folders(tmp_path_factory.mktemp("photos"), {"train": 8, "val": 4, "test": 4})


def test_the_model_is_cut_when_the_warm_up_ends_and_meets_its_budget(photos: Path, tmp_path: Path) -> None:
    given = flags(photos, tmp_path, *AT_ONCE, "--prune-start-epoch", "1.5", *NARROW, *LEARNS)
    assert run("prune", *given) == 0
    small, summary = p3b.load(tmp_path / "pruned"), read(tmp_path / "prune" / "summary.json")
    assert abs(parameters_of(small) / summary["dense"]["params"] - 0.5) < 0.01
    (decision,) = lines(tmp_path / "prune" / "blocks.jsonl")
    assert (decision["step"], decision["phase"]) == (9, "finalize")
    epochs = [(line["epoch"], line["phase"]) for line in lines(tmp_path / "prune" / "metrics.jsonl")]
    assert epochs == [(1, "warm-up"), (3, "fine-tune")], "the rest of the second epoch is left out"
    assert summary["dense"]["top1"] is None, "the model before the cut has only begun to learn"


def test_the_rate_falls_to_its_end_in_the_warm_up_be_it_whole_epochs_or_not(photos: Path, tmp_path: Path) -> None:
    rates = {}
    for start in ("1", "2", "50%"):
        out = tmp_path / start
        assert run("prune", *flags(photos, out, *AT_ONCE, "--prune-start-epoch", start, *NARROW, *LEARNS)) == 0
        rates[start] = [line["lr"] for line in lines(out / "prune" / "metrics.jsonl") if line["phase"] == "warm-up"]
    assert rates["1"][-1] < 0.1 * rates["50%"][0]
    assert len(rates["2"]) == 2 and rates["2"][-1] == rates["1"][-1]


@pytest.mark.parametrize("start", ["1", "1.5"])
def test_killed_after_any_save_it_is_resumed_bit_for_bit(
    start: str, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = (*AT_ONCE, "--prune-start-epoch", start, *NARROW, "--lr", "0.05", "--distill-from", "warm-up")
    assert run("prune", *flags(photos, tmp_path / "whole", *given)) == 0
    save = p3b.run.training.save_checkpoint

    def killed(*args: Any, **kwargs: Any) -> None:
        save(*args, **kwargs)
        raise KeyboardInterrupt

    kills = 0
    with monkeypatch.context() as patch:
        patch.setattr(p3b.run.training, "save_checkpoint", killed)
        while run("prune", *flags(photos, tmp_path / "killed", *given, *["--resume"] * (kills > 0))) != 0:
            kills += 1
            assert kills < 9
    assert kills == 3, "in the warm-up or at its end, and in fine-tuning"
    assert same_tensors(*(weights(tmp_path / name / "pruned") for name in ("killed", "whole")))
    assert [line["step"] for line in lines(tmp_path / "killed" / "prune" / "metrics.jsonl")] == [
        line["step"] for line in lines(tmp_path / "whole" / "prune" / "metrics.jsonl")
    ]


def test_what_it_would_have_to_ignore_is_refused(photos: Path, refused: Refusals) -> None:
    for more, words in {
        ("--prune-update-every", "2"): "--prune-update-every 2 means nothing with --prune-schedule at-once",
        ("--prune-compute", "active"): "--prune-compute active means nothing",
        ("--prune-start-epoch", "0"): "which are 0 optimizer steps",
        ("--prune-start-epoch", "4"): "of 3 (--epochs); expected 0 < start <= epochs",
        ("--prune-method", "wdpruning"): "learns while the model trains",
        ("--prune-benefit", "linear"): "learn by gradient over many steps",
        ("--prune-stream", "auto", "--prune-ratio", "0.999"): "cannot be met",
    }.items():
        start = () if "--prune-start-epoch" in more else ("--prune-start-epoch", "1")
        refused("prune", *flags(photos, refused.out, *AT_ONCE, *start, *more), telling=(words,))
    refused("prune", *flags(photos, refused.out, "--epochs", "0", "--prune-schedule", "at-once"), telling=("means nothing",))


def test_its_phases_are_a_warm_up_and_the_small_model() -> None:
    options = PhaseOptions(prune_schedule="at-once", prune_start_epoch="0.25", finetune_epochs=2)
    plan = plan_pruning(options, 2, 8, 1)
    assert (plan.epochs, plan.finetune_epochs, plan.schedule.start, plan.one_shot, plan.gradual) == (1, 3, 2, True, None)
    assert [(phase.name, phase.end) for phase in phases_of(plan, 8)] == [("warm-up", 2), ("fine-tune", 32)]
    assert plan_pruning(replace(options, prune_start_epoch="1.01"), 2, 8, 1).epochs == 1, "to whole steps"
    gradual = plan_pruning(PhaseOptions(prune_start_epoch="1"), 3, 8, 1)
    assert isinstance(gradual.gradual, Schedule) and not gradual.one_shot
    with pytest.raises(ScheduleError, match="a step at least"):
        plan_pruning(PhaseOptions(prune_schedule="at-once", prune_start_epoch="0.01"), 2, 8, 1)


def test_in_a_series_methods_that_learn_on_the_way_prune_gradually() -> None:
    series = CompareConfig(prune=PhaseOptions(prune_schedule="at-once"), run=MachineOptions(output_dir=Path("out")))
    rows = [Run(row, 0.5, 0) for row in ("wdpruning", "uniform", "taylor")]
    schedules = [config_of(series, row).prune.prune_schedule for row in rows]  # type: ignore[union-attr]
    assert schedules == ["gradual", "at-once", "at-once"]
    assert not shared_warm_ups(series, rows)


def test_a_plan_says_what_it_is(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = flags(photos, tmp_path / "out", *PHASES, "--prune-schedule", "at-once", "--measured-steps", "1")
    assert run("plan", *given) == 0
    assert "6 steps of warm-up, the cut in one shot, and 2 epochs of fine-tuning" in capsys.readouterr().out
