"""Learning from one's own dense transfer: from the end of the warm-up on, exactly resumed, and refused in words."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import tyro

import p3b.run.training
import p3b.train.teacher
from p3b.commands.command_line import INTERRUPTED, USER_ERROR
from p3b.commands.prune import prune
from p3b.run.options import CompareConfig, PruneConfig, TrainConfig
from p3b.run.series_plan import DENSE, SMALLER, Run, config_of
from p3b.run.warm_up import train_warm_up
from runs import (
    TWO_HEADS,
    brief,
    colour_folders,
    flags,
    last_checkpoint,
    lines,
    read,
    run,
    same_tensors,
    weights,
    without_seconds,
)

PHASES = ("--epochs", "2", "--prune-start-epoch", "4steps", "--finetune-epochs", "2", "--drop-path", "0.3", "--lr", "0.05")
LATER = ("--distill-from", "warm-up")
WITH_STATE = (*PHASES, *LATER, "--model-ema", "--model-ema-decay", "0.5")


def same_runs(left: Path, right: Path) -> bool:
    files = ("metrics.jsonl", "blocks.jsonl")
    return all(without_seconds(left / "prune" / file) == without_seconds(right / "prune" / file) for file in files) and (
        same_tensors(weights(left / "pruned"), weights(right / "pruned"))
    )


@pytest.fixture(scope="module")
def taught(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student with two heads and its moving average; never changed by a test."""
    out = tmp_path_factory.mktemp("taught")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(p3b.train.teacher, "MEASURED_PASSES", 1)
        assert run("prune", *flags(data, out, *WITH_STATE, model=TWO_HEADS)) == 0
    return out


def killed(data: Path, out: Path, checkpoints: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run of `taught`, stopped after so many checkpoints, of which there is one at every step."""
    save, calls = p3b.run.training.save_checkpoint, []

    def saving(*given: Any, **more: Any) -> None:
        save(*given, **more)
        calls.append(1)
        if len(calls) == checkpoints:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(p3b.run.training, "save_checkpoint", saving)
        given = flags(data, out, *WITH_STATE, "--checkpoint-minutes", "1e-9", model=TWO_HEADS)
        assert run("prune", *given) == INTERRUPTED
    torch.manual_seed(12345)


def resumed(data: Path, out: Path, *more: str) -> int:
    return run("prune", *flags(data, out, *WITH_STATE, "--resume", *more, model=TWO_HEADS))


# --- what is learnt from ----------------------------------------------------------------------------------------------


def test_the_teacher_is_the_average_at_the_end_of_the_warm_up_and_stays(data: Path, taught: Path, tmp_path: Path) -> None:
    given = flags(data, tmp_path, *WITH_STATE, model=TWO_HEADS)
    with brief():
        train_warm_up(tyro.cli(PruneConfig, args=given, config=(tyro.conf.OmitArgPrefixes,)))
    average = last_checkpoint(tmp_path / "warm-up")["ema"]
    teacher = weights(taught / "prune" / "teacher.pth")
    assert same_tensors(teacher, {name.removeprefix("module."): tensor for name, tensor in average.items()})
    told = read(taught / "prune" / "summary.json")["distillation"]
    assert (told["type"], told["alpha"], told["tau"]) == ("soft", 0.5, 2.0)
    assert told["digest"] == last_checkpoint(taught / "prune")["progress"]["teacher"]


def test_with_no_weight_nothing_changes(data: Path, tmp_path: Path) -> None:
    for name, given in (("alone", ()), ("unheard", (*LATER, "--distillation-alpha", "0"))):
        assert run("prune", *flags(data, tmp_path / name, *PHASES, *given)) == 0
    assert same_runs(tmp_path / "alone", tmp_path / "unheard")
    assert "teacher" not in last_checkpoint(tmp_path / "alone" / "prune")["progress"]
    assert not (tmp_path / "alone" / "prune" / "teacher.pth").exists()


def test_a_shared_warm_up_teaches_as_ones_own(data: Path, taught: Path, tmp_path: Path) -> None:
    def config(out: str) -> PruneConfig:
        given = flags(data, tmp_path / out, *WITH_STATE, model=TWO_HEADS)
        found: PruneConfig = tyro.cli(PruneConfig, args=given, config=(tyro.conf.OmitArgPrefixes,))
        return found

    with brief():
        train_warm_up(config("warm"))
        prune(config("shared"), tmp_path / "warm")
    assert same_runs(tmp_path / "shared", taught)


def test_the_log_says_what_it_costs_in_each_part(taught: Path) -> None:
    said = [line for line in (taught / "prune" / "log.txt").read_text().splitlines() if line.startswith("teacher: ")]
    assert "the model at the end of the warm-up" in said[0] and len(said) == 3
    assert [line.split("% ")[1] for line in said[1:]] == ["of a step's time (prune)", "of a step's time (fine-tune)"]
    shares = read(taught / "prune" / "summary.json")["distillation"]["share_of_time"]
    assert shares.keys() == {"prune", "fine-tune"} and all(0 < share < 1 for share in shares.values())


# --- going on ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpoints", [5, 6, 10], ids=["as it begins", "while pruning", "in fine-tuning"])
def test_resuming_equals_never_stopping(
    data: Path, taught: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpoints: int
) -> None:
    killed(data, tmp_path, checkpoints, monkeypatch)
    place = last_checkpoint(tmp_path / "prune")["progress"]
    assert place["teacher"] == last_checkpoint(taught / "prune")["progress"]["teacher"]
    assert place["place"]["step"] == {5: 4, 6: 5, 10: 8}[checkpoints]
    assert resumed(data, tmp_path) == 0
    assert same_runs(tmp_path, taught)


def test_without_its_teacher_a_run_is_not_resumed(
    data: Path, taught: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    killed(data, tmp_path, 6, monkeypatch)
    teacher = tmp_path / "prune" / "teacher.pth"
    teacher.unlink()
    assert resumed(data, tmp_path) == USER_ERROR
    assert "teacher.pth is gone: the teacher that this run learns from" in capsys.readouterr().err
    shutil.copy(taught / "first_sparse_checkpoint.pth", teacher)
    assert resumed(data, tmp_path) == USER_ERROR
    assert "is not the teacher that the run has learnt from so far" in capsys.readouterr().err


# --- a dense run ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dense(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dense")
    for seed in ("0", "1"):
        assert run("train", *flags(data, out / seed, "--epochs", "1", "--seed", seed)) == 0
    return out


def test_a_dense_run_teaches_and_no_other_takes_its_place(
    data: Path, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = flags(data, tmp_path, *PHASES, "--distill-from", "dense-run", "--dense-run")
    with monkeypatch.context() as patch:
        patch.setattr(p3b.run.training.Training, "_end_epoch", lambda *_: _raise(KeyboardInterrupt()))
        assert run("prune", *given, str(dense / "0"), "--checkpoint-minutes", "1e-9") == INTERRUPTED
    assert run("prune", *given, str(dense / "1"), "--resume") == USER_ERROR
    assert "--resume needs the teacher that the run began with" in capsys.readouterr().err
    shutil.copytree(dense / "0", tmp_path / "moved")
    assert run("prune", *given, str(tmp_path / "moved"), "--resume") == 0
    assert f"teacher: the dense model, {tmp_path / 'moved' / 'dense'}" in (tmp_path / "prune" / "log.txt").read_text()
    assert not (tmp_path / "prune" / "teacher.pth").exists()


def _raise(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("--distill-from", "dense-run"), "--distill-from dense-run needs --dense-run"),
        (("--distill-from", "warm-up", "--prune-start-epoch", "0"), "pruning starts at once"),
        (("--distill-from", "warm-up", "--teacher-model", "vit_tiny_patch16_224"), "name two teachers"),
        (("--distill-from", "warm-up", "--distillation-type", "sofd"), "Did you mean 'soft'"),
        (("--distill-from", "warm-up", "--distillation-tau", "0"), "a temperature > 0, got 0.5 and 0"),
        (("--distill-from", "warm-up", "--distillation-alpha", "2"), "alpha in [0, 1]"),
        (("--distill-from", "dense-run", "--dense-run", "DENSE", "--mean", "0", "0", "0"), "trained on images with mean"),
        (("--distill-from", "dense-run", "--dense-run", "DENSE", "--data-path", "OTHERS"), "knows other classes"),
        (("--distill-from", "dense-run", "--dense-run", "NOWHERE"), "holds no finished `p3b train`"),
    ],
    ids=str,
)
def test_what_cannot_teach_is_refused_before_anything_is_written(
    data: Path, dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], given: tuple[str, ...], said: str
) -> None:
    places = {"DENSE": str(dense / "0"), "OTHERS": str(tmp_path / "others"), "NOWHERE": str(tmp_path / "nowhere")}
    if "OTHERS" in given:
        colour_folders(tmp_path / "others", classes=("ant", "bee", "cat"))
    words = [places.get(word, word) for word in given]
    assert run("prune", *flags(data, tmp_path / "out", *PHASES, *words)) == USER_ERROR
    assert said in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out" / "prune").exists()


# --- series -----------------------------------------------------------------------------------------------------------


def series(data: Path, out: Path, *more: str) -> CompareConfig:
    given = flags(data, out, "--epochs", "1", "--prune-start-epoch", "1steps", *more)
    found: CompareConfig = tyro.cli(CompareConfig, args=given, config=(tyro.conf.OmitArgPrefixes,))
    return found


def test_rows_of_a_seed_share_one_teacher(data: Path, tmp_path: Path) -> None:
    config = series(data, tmp_path, "--distill-from", "dense-run", "--distillation-type", "hard")
    given = Path("given")
    for run_of_seed, place in ((lambda row: Run(row, 0.5, 3), tmp_path / "runs" / "dense-seed3"),
                               (lambda row: Run(row, 0.5, 3, dense_run=given), given)):  # fmt: skip
        pruned, smaller = config_of(config, run_of_seed("uniform")), config_of(config, run_of_seed(SMALLER))
        assert isinstance(pruned, PruneConfig) and pruned.prune.dense_run == place
        assert smaller.training.teacher_path == place / "dense" and smaller.training.distillation_type == "hard"
        assert smaller.training.distillation_tau == 2
    alone = config_of(config, Run(DENSE, None, 3))
    assert alone.training.teacher_model is None and alone.training.distillation_type == "none"
    config = series(data, tmp_path, "--distill-from", "warm-up", "--distillation-type", "hard")
    assert config_of(config, Run(SMALLER, 0.5, 3)).training.distillation_type == "none"
    plain = config_of(series(data, tmp_path), Run("uniform", 0.5, 3))
    assert isinstance(plain, PruneConfig) and plain.prune.dense_run is None
    assert type(config_of(series(data, tmp_path), Run(SMALLER, 0.5, 3))) is TrainConfig


def test_a_comparison_of_distilled_models(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ("--methods", "uniform", "--epochs", "1", "--prune-start-epoch", "1steps", "--distill-from", "dense-run")
    assert run("compare", *flags(data, tmp_path, *given)) == 0
    assert "teacher: pruned and smaller models learn from the dense one of their seed" in capsys.readouterr().out
    told = read(tmp_path / "runs" / "uniform-0.5-seed0" / "prune" / "summary.json")["distillation"]
    assert told["teacher"] == str(tmp_path / "runs" / "dense-seed0" / "dense")


def test_a_sweep_keeps_its_teacher(data: Path, dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ("--prune-method", "uniform", "--prune-ratios", "0.5", "--epochs", "1", "--prune-start-epoch", "1steps")
    asked = flags(data, tmp_path, *given, "--distill-from", "dense-run", "--dense-run")
    assert run("sweep", *asked, str(dense / "0")) == 0
    (line,) = (line for line in lines(tmp_path / "sweep.jsonl") if line.get("row") == "uniform")
    assert line["teacher"] == read(dense / "0" / "dense" / "config.json")["weights_digest"]
    assert run("sweep", *asked, str(dense / "1")) == USER_ERROR
    assert "uniform-0.5-seed0 learnt from another dense run" in " ".join(capsys.readouterr().err.split())
