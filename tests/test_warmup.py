"""A warm-up that several runs go on from: what comes out is, bit for bit, what it would have been without."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tyro

from p3b.commands import prune, train_warm_up
from p3b.config import PruneConfig
from p3b.errors import ConfigError, RunFolderError
from p3b.methods import METHODS, own_in_warm_up
from p3b.warmup import warm_up_name
from runs import flags, last_checkpoint, lines, read, same_tensors, weights

RANDOM = ("--epochs", "3", "--finetune-epochs", "1", "--drop-path", "0.3", "--lr", "0.05")
"""Augmentation, mixup, stochastic depth: whatever draws."""
WITHIN_AN_EPOCH, AT_ITS_END = "4steps", "1"


def config_of(data: Path, out: Path, *more: str) -> PruneConfig:
    given = flags(data, out, *RANDOM, *more)
    config: PruneConfig = tyro.cli(PruneConfig, args=given, config=(tyro.conf.OmitArgPrefixes,))
    return config


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


@pytest.mark.parametrize("start", [WITHIN_AN_EPOCH, AT_ITS_END])
@pytest.mark.parametrize(
    "of_method",
    [("block_benefit",), ("block_benefit", "--prune-benefit", "subsampled"), ("taylor",), ("random", "--model-ema")],
    ids=" ".join,
)
def test_going_on_from_a_warm_up_is_as_training_it(data: Path, tmp_path: Path, start: str, of_method: tuple[str, ...]) -> None:
    method, *more = of_method
    given = ("--prune-start-epoch", start, "--prune-method", method, *more)
    train_warm_up(config_of(data, tmp_path / "warm", *given, "--prune-ratio", "0"))
    for ratio in ("0.3", "0.6"):
        alone, shared = (config_of(data, tmp_path / f"{kind}{ratio}", *given, "--prune-ratio", ratio) for kind in "ab")
        prune(alone)
        prune(shared, tmp_path / "warm")
        assert same_runs(tmp_path / f"a{ratio}", tmp_path / f"b{ratio}")
        assert "is taken from" in (tmp_path / f"b{ratio}" / "prune" / "log.txt").read_text()
