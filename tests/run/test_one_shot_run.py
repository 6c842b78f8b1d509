"""`p3b prune --epochs 0`: a run like any other, resumed like any other, and refused where the model knows nothing yet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import p3b
import p3b.run.training
from refusals import Refusals
from runs import CALM, colour_folders, finished, flags, lines, read, run, same_tensors, weights
from tiny import parameters_of


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Enough images for a model to be told from one that guesses."""
    return colour_folders(tmp_path_factory.mktemp("photos"), {"train": 12, "val": 6, "test": 8})


@pytest.fixture(scope="module")
def trained(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of `p3b train` whose model answers better than by chance."""
    out = finished("train", photos, tmp_path_factory.mktemp("trained"), "--epochs", "2", "--lr", "0.2", *CALM)
    assert read(out / "train" / "summary.json")["accuracy"]["test"]["top1"] > 70
    return out


def one_shot(photos: Path, trained: Path, out: Path, *more: str) -> list[str]:
    """Flags of a run; later ones win."""
    return flags(photos, out, "--epochs", "0", "--model-path", str(trained / "dense"), "--layout", "index", *CALM, *more)


def test_one_shot_is_a_run_like_any_other(photos: Path, trained: Path, tmp_path: Path) -> None:
    assert run("prune", *one_shot(photos, trained, tmp_path, "--prune-ratio", "0.3")) == 0
    dense, summary = p3b.load(trained / "dense"), read(tmp_path / "prune" / "summary.json")
    assert abs(parameters_of(p3b.load(tmp_path / "pruned")) / parameters_of(dense) - 0.7) < 0.01
    assert summary["dense"]["top1"] == read(trained / "train" / "summary.json")["accuracy"]["test"]["top1"]
    (decision,) = lines(tmp_path / "prune" / "blocks.jsonl")
    assert (decision["step"], decision["phase"]) == (0, "finalize")
    assert not (tmp_path / "prune" / "metrics.jsonl").exists()


def test_without_compensation_every_weight_that_stays_is_as_it_was(photos: Path, trained: Path, tmp_path: Path) -> None:
    given = ("--prune-ratio", "0.3", "--prune-method", "uniform", "--calibration-images", "9")
    for name, more in (("plain", ("--compensate", "off")), ("fitted", ())):
        assert run("prune", *one_shot(photos, trained, tmp_path / name, *given, *more)) == 0
    dense = p3b.load(trained / "dense").state_dict()
    plain, fitted = (weights(tmp_path / name / "pruned") for name in ("plain", "fitted"))
    assert {key: value.shape for key, value in plain.items()} == {key: value.shape for key, value in fitted.items()}
    assert set(plain["blocks.0.mlp.fc1.bias"].tolist()) <= set(dense["blocks.0.mlp.fc1.bias"].tolist())
    assert not set(fitted["blocks.0.mlp.fc1.bias"].tolist()) <= set(dense["blocks.0.mlp.fc1.bias"].tolist())


def test_killed_in_fine_tuning_it_is_resumed_bit_for_bit(
    photos: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ("--prune-method", "taylor", "--finetune-epochs", "2", "--lr", "0.05")
    assert run("prune", *one_shot(photos, trained, tmp_path / "whole", *given)) == 0
    save = p3b.run.training.save_checkpoint

    def killed(*args: Any, **kwargs: Any) -> None:
        save(*args, **kwargs)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(p3b.run.training, "save_checkpoint", killed)
        assert run("prune", *one_shot(photos, trained, tmp_path / "killed", *given)) == 130
    assert run("prune", *one_shot(photos, trained, tmp_path / "killed", *given, "--resume")) == 0
    assert same_tensors(weights(tmp_path / "killed" / "pruned"), weights(tmp_path / "whole" / "pruned"))


def test_a_sweep_of_one_shots_needs_a_dense_run(photos: Path, trained: Path, tmp_path: Path, refused: Refusals) -> None:
    given = one_shot(photos, trained, tmp_path, "--prune-ratios", "0.2")
    assert run("sweep", *given, "--dense-run", str(trained), "--prune-method", "uniform") == 0
    done = [line for line in lines(tmp_path / "sweep.jsonl") if line["kind"] == "run"]
    assert [line["epochs"] for line in done] == [2, 0]
    assert "not of pruning alone" not in (tmp_path / "sweep.md").read_text()
    refused("sweep", *one_shot(photos, trained, refused.out, "--prune-ratios", "0.2"), telling=("Give --finetune-epochs",))
    refused("compare", *one_shot(photos, trained, refused.out), telling=("Give --finetune-epochs", "p3b sweep"))


def test_a_model_that_does_not_know_the_classes_is_refused(
    photos: Path, trained: Path, tmp_path: Path, refused: Refusals
) -> None:
    mend = "--model-path a model that is trained on these classes"
    refused("prune", *flags(photos, refused.out, "--epochs", "0"), telling=("starts from random ones", mend))
    other = colour_folders(tmp_path / "other", classes=("one", "two", "three"))
    refused("prune", *one_shot(other, trained, refused.out), telling=("trained for the classes blue, green, red", mend))
    more = colour_folders(tmp_path / "more", classes=("blue", "green", "red", "white"))
    refused("prune", *one_shot(more, trained, refused.out), telling=("The head is new", mend))


def test_settings_that_one_shot_would_ignore_are_refused(photos: Path, trained: Path, refused: Refusals) -> None:
    for given, words in {
        ("--prune-start-epoch", "1"): "--prune-start-epoch 1 means nothing with --epochs 0",
        ("--prune-masks", "hard"): "--prune-masks hard means nothing",
        ("--distill-from", "warm-up"): "needs a warm-up",
        ("--prune-method", "wdpruning"): "learns while the model trains",
        ("--prune-benefit", "linear"): "learn by gradient over many steps",
        ("--calibration-images", "0"): "must be above 0",
    }.items():
        refused("prune", *one_shot(photos, trained, refused.out, *given), telling=(words,))
    refused("train", *flags(photos, refused.out, "--epochs", "0"), telling=("--epochs must be above 0",))
