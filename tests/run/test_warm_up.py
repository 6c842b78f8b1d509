"""A warm-up that several runs go on from: what comes out is, bit for bit, what it would have been without."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import tyro

from p3b.commands.prune import prune
from p3b.errors import ConfigError, RunFolderError
from p3b.methods import own_in_warm_up
from p3b.run.inputs import open_model
from p3b.run.options import PruneConfig
from p3b.run.warm_up import train_warm_up, warm_up_name
from runs import brief, colour_folders, everything_in, flags, last_checkpoint, lines, read, same_tensors, weights

RANDOM = ("--epochs", "3", "--finetune-epochs", "1", "--drop-path", "0.3", "--lr", "0.05")
"""Augmentation, mixup, stochastic depth: whatever draws."""
WITHIN_AN_EPOCH, AT_ITS_END = "4steps", "1"


def config_of(data: Path, out: Path, *more: str) -> PruneConfig:
    given = flags(data, out, *RANDOM, *more)
    config: PruneConfig = tyro.cli(PruneConfig, args=given, config=(tyro.conf.OmitArgPrefixes,))
    return config


def tiny_weights(config: PruneConfig) -> dict[str, torch.Tensor]:
    """Of the model that a run with another seed starts from."""
    return open_model(config.model, num_classes=3, seed=1).model.state_dict()


def same_runs(left: Path, right: Path) -> bool:
    """Models, checkpoints and lines; but for times."""

    def told(out: Path) -> list[Any]:
        return [
            [{key: value for key, value in line.items() if "seconds" not in key} for line in lines(out / "prune" / name)]
            for name in ("metrics.jsonl", "blocks.jsonl")
        ]

    return (
        told(left) == told(right)
        and same_tensors(weights(left / "pruned"), weights(right / "pruned"))
        and same_tensors(last_checkpoint(left / "prune")["model"], last_checkpoint(right / "prune")["model"])
        and read(left / "prune" / "summary.json")["accuracy"] == read(right / "prune" / "summary.json")["accuracy"]
    )


@pytest.mark.parametrize(
    ("start", "of_method"),
    [
        (WITHIN_AN_EPOCH, ("block_benefit", "--prune-benefit", "linear", "--model-ema")),
        (AT_ITS_END, ("block_benefit",)),
        (WITHIN_AN_EPOCH, ("random",)),
        (AT_ITS_END, ("taylor",)),
    ],
    ids=str,
)
def test_going_on_from_a_warm_up_is_as_training_it(data: Path, tmp_path: Path, start: str, of_method: tuple[str, ...]) -> None:
    given = ("--prune-start-epoch", start, "--prune-method", *of_method)
    with brief():
        train_warm_up(config_of(data, tmp_path / "warm", *given, "--prune-ratio", "0"))
        prune(config_of(data, tmp_path / "alone", *given, "--prune-ratio", "0.6"))
        prune(config_of(data, tmp_path / "shared", *given, "--prune-ratio", "0.6"), tmp_path / "warm")
    assert same_runs(tmp_path / "alone", tmp_path / "shared")
    assert "is taken from" in (tmp_path / "shared" / "prune" / "log.txt").read_text()


def test_a_warm_up_serves_every_alignment(data: Path, tmp_path: Path) -> None:
    """Whole heads are a dimension of the aligned run alone; until pruning starts no mask tells."""
    given = ("--prune-start-epoch", WITHIN_AN_EPOCH, "--prune-benefit", "linear")
    with brief():
        train_warm_up(config_of(data, tmp_path / "warm", *given))
        prune(config_of(data, tmp_path / "alone", *given, "--prune-ratio", "0.6", "--align", "4"))
        prune(config_of(data, tmp_path / "shared", *given, "--prune-ratio", "0.6", "--align", "4"), tmp_path / "warm")
    assert same_runs(tmp_path / "alone", tmp_path / "shared")


@pytest.fixture(scope="module")
def plain_warm_up(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained by `uniform`, four steps long; never changed by a test."""
    folder = tmp_path_factory.mktemp("warm")
    with brief():
        train_warm_up(config_of(data, folder, *SHORT, "--prune-method", "uniform"))
    return folder


SHORT = ("--prune-start-epoch", WITHIN_AN_EPOCH)


@pytest.mark.parametrize("method", ["magnitude", "savit"])
def test_methods_without_a_state_of_their_own_share_it(data: Path, plain_warm_up: Path, tmp_path: Path, method: str) -> None:
    given = (*SHORT, "--prune-method", method)
    with brief():
        prune(config_of(data, tmp_path / "alone", *given))
        prune(config_of(data, tmp_path / "shared", *given), plain_warm_up)
    assert same_runs(tmp_path / "alone", tmp_path / "shared")


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        (("--lr", "0.04"), "--lr was 0.05, now 0.04"),
        (("--seed", "1"), "--seed was 0, now 1"),
        (("--no-augment",), "--augment was True, now False"),
        (("--prune-start-epoch", "3steps"), "(--prune-start-epoch) was 4, now 3"),
        (("--max-train-images", "9"), "--max-train-images was None, now 9"),
        (("--prune-method", "block_benefit"), "--prune-method was None, now 'block_benefit'"),
    ],
)
def test_a_warm_up_of_other_settings_is_refused(
    data: Path, plain_warm_up: Path, tmp_path: Path, changed: tuple[str, ...], named: str
) -> None:
    before = everything_in(plain_warm_up)
    with pytest.raises(ConfigError) as refusal:
        prune(config_of(data, tmp_path / "out", *SHORT, "--prune-method", "uniform", *changed), plain_warm_up)
    assert named in str(refusal.value) and "train it again" in str(refusal.value)
    assert not (tmp_path / "out").exists() and everything_in(plain_warm_up) == before


def test_a_warm_up_of_other_images_or_weights_is_refused(data: Path, plain_warm_up: Path, tmp_path: Path) -> None:
    more = colour_folders(tmp_path / "more", {"train": 5, "val": 3, "test": 3})
    with pytest.raises(ConfigError, match=r"images was \[12, 9\], now \[15, 9\]"):
        prune(config_of(more, tmp_path / "out", *SHORT, "--prune-method", "uniform"), plain_warm_up)
    config = config_of(data, tmp_path / "out", *SHORT, "--prune-method", "uniform")
    torch.save(tiny_weights(config), tmp_path / "weights.pth")
    with pytest.raises(ConfigError, match="the weights that training starts from was"):
        prune(replace(config, model=replace(config.model, model_path=tmp_path / "weights.pth")), plain_warm_up)


def test_a_warm_up_that_kept_its_images_elsewhere_is_the_same(data: Path, plain_warm_up: Path, tmp_path: Path) -> None:
    given = ("--prune-method", "uniform", "--prune-start-epoch", WITHIN_AN_EPOCH, "--cache", "off")
    with brief():
        prune(config_of(data, tmp_path, *given), plain_warm_up)
    assert "is taken from" in (tmp_path / "prune" / "log.txt").read_text()


def test_a_warm_up_that_is_not_there_is_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="holds no finished warm-up"):
        prune(config_of(data, tmp_path / "out", *SHORT), tmp_path / "nowhere")


def test_a_warm_up_that_was_killed_before_its_summary_is_not_trained_further(
    data: Path, plain_warm_up: Path, tmp_path: Path
) -> None:
    shutil.copytree(plain_warm_up / "warm-up", tmp_path / "warm-up")
    (tmp_path / "warm-up" / "summary.json").unlink()
    config = config_of(data, tmp_path, *SHORT, "--prune-method", "uniform")
    train_warm_up(replace(config, run=replace(config.run, resume=True)))
    assert read(tmp_path / "warm-up" / "summary.json")["steps"] == 4
    assert last_checkpoint(tmp_path / "warm-up")["steps_done"] == 4


def test_who_shares_is_named_and_nobody_else_does() -> None:
    assert own_in_warm_up("taylor", {"blocks_only": True}) == {}
    assert own_in_warm_up("block_benefit", {"keep_ratios": [0.5]}) == {}
    probed = own_in_warm_up("block_pr", {"alpha": 0.3, "estimator": "linear"})
    assert probed == own_in_warm_up("block_benefit", {"estimator": "linear", "gamma": 0.9})
    assert probed != own_in_warm_up("block_benefit", {}) and probed != own_in_warm_up("block_benefit", {"probe_lr": 1e-3})
    assert own_in_warm_up("block_benefit", {"align": 8}) == own_in_warm_up("block_benefit", {})
    assert own_in_warm_up("a method to come", {}) is None
    assert warm_up_name("block_benefit", {}, "5", seed=0) == "block_benefit-low_rank-seed0"
    assert warm_up_name("block_pr", {}, "5", seed=0) == "block_benefit-paper-seed0"
    assert warm_up_name("block_benefit", {}, "0%", seed=0) is None
