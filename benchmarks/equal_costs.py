"""What a training step of every row takes, in steps of dense training: measured in turns, in one process, with real batches.

Sides are a dense step; a step of pruning by each method with masks in place; a step of the small model of each; a pass of
the teacher. A small model is one that a run has made, where there is one. Else it is made in a few steps: its sizes count,
not its accuracy. P3B's then get the keep ratios of the measured table, since a few steps know nothing of benefit.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.nn.functional import cross_entropy

import p3b
from equal_rows import PEER, TEACHER, Row
from harness.records import RESULTS, read_lines
from harness.turns import CPU, take_turns
from p3b.run.inputs import open_model
from p3b.run.method_options import method_options_of
from p3b.run.one_shot import CalibrationImages
from p3b.run.options import PruneOptions, TrainConfig
from p3b.run.series_plan import DENSE, SMALLER
from p3b.run.stage import Stage, open_stage
from p3b.storage import artifact
from p3b.train.loop import EpochProgress, Learner, train_epoch
from p3b.train.teacher import Teacher
from p3b.vit.architecture import describe_dense
from p3b.vit.cost import count_parameters
from p3b.vit.smaller import cut_evenly, smaller_architecture
from p3b.vit.trainable import trainable_form
from peers import torch_pruning_taylor as peer

ROUNDS = 9
SMALL_STEPS = 4
"""Pruning steps after which a model is made small to be timed."""
ENDLESS = 10**6


def measure_costs(
    config: TrainConfig,
    rows: Sequence[Row],
    ratio: float,
    rounds: int = ROUNDS,
    made: Mapping[str, Path] = MappingProxyType({}),
) -> dict[str, Any]:
    """Time all sides.

    Args:
        config: of dense training, with an output folder that nothing is written to.
        rows: that are timed.
        ratio: share of the parameters that goes.
        rounds: in each of which every side acts once.
        made: by the name of a row, a small model of its own that is saved.

    Returns:
        The precision, steps of an epoch, and by side what `take_turns` says: "dense", "teacher", "pruning ROW", "cut ROW" and
        "small ROW".
    """
    with open_stage(config, "train") as stage:
        batches = _Batches(stage)

        def fresh() -> VisionTransformer:
            return stage.machine.put(open_model(config.model, len(stage.splits.class_names), 0).model)

        def step(learner: Learner) -> Callable[[], object]:
            return lambda: _steps(learner, batches, stage, 1)

        sides: dict[str, Callable[[], object]] = {DENSE: step(peer.learner_of(stage, fresh(), config))}
        teacher, (images, _) = Teacher(fresh(), stage.machine.precision), batches.next()
        sides[TEACHER] = lambda: teacher(images)
        for row in rows:
            if row.prunes and row.cost is None and not row.at_once:
                sides[f"pruning {row.name}"] = step(_pruning(row, ratio, stage, fresh(), config, batches))
            if row.at_once:
                sides[f"cut {row.name}"] = _cutting(row, ratio, stage, fresh())
            if row.method != DENSE and row.structure is None:
                if row.name in made:
                    small = stage.machine.put(artifact.load(made[row.name]))
                else:
                    small = _small(row, ratio, stage, fresh(), config, batches)
                small = trainable_form(small) if row.trains_quickly else small
                sides[f"small {row.name}"] = step(peer.learner_of(stage, small, config))
        repeats = {f"pruning {row.name}": dict(row.settings).get("savit_every", 1) for row in rows}
        said = {"precision": stage.machine.number_format, "steps_per_epoch": stage.recipe.steps_per_epoch}
        return {**said, "sides": take_turns(CPU, sides, rounds, repeats)}


class _Batches:
    """One batch after the other, epoch after epoch; making one is part of what takes it."""

    def __init__(self, stage: Stage) -> None:
        self._batches = stage.recipe.batches
        self._coming = self._endless()

    def _endless(self) -> Iterator[tuple[Tensor, Tensor]]:
        epoch = 0
        while True:
            self._batches.set_epoch(epoch)
            yield from self._batches
            epoch += 1

    def next(self) -> tuple[Tensor, Tensor]:
        return next(self._coming)


class _Some:
    """So many batches, as an epoch."""

    def __init__(self, batches: _Batches, count: int) -> None:
        self._batches, self._count = batches, count

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return (self._batches.next() for _ in range(self._count))


def _steps(learner: Learner, batches: _Batches, stage: Stage, count: int) -> None:
    progress = EpochProgress("train", stage.machine.device)
    train_epoch(learner, _Some(batches, count), progress, peer.nothing, peer.nothing)


def _options(row: Row, ratio: float) -> dict[str, Any]:
    """What the method of a row is built with."""
    given = PruneOptions(prune_method=row.method, prune_ratio=ratio, **dict(row.settings))
    return method_options_of(given, 0)


def _pruning(row: Row, ratio: float, stage: Stage, model: VisionTransformer, config: TrainConfig, batches: _Batches) -> Learner:
    """A model in the midst of pruning: keep ratios have reached their goals, masks are soft and in place."""
    one_shot = row.method == "savit"  # no masks until its end; it looks from the first step on where there is but one interval
    schedule = p3b.Schedule(start=0, sparse=1, final=ENDLESS, update_every=ENDLESS - 1 if one_shot else 1)
    compute = "active" if row.narrows else "full"
    pruner = p3b.Pruner(model, ratio, row.method, schedule, compute=compute, **_options(row, ratio))
    learner = peer.learner_of(stage, model, config, pruner=pruner)
    _steps(learner, batches, stage, 1)
    pruner.schedule = replace(schedule, update_every=ENDLESS - 1)
    return learner


def _cutting(row: Row, ratio: float, stage: Stage, model: VisionTransformer) -> Callable[[], object]:
    """A cut in one shot, on as many images as the row takes."""
    images = CalibrationImages(stage, dict(row.settings)["calibration_images"])

    def cut() -> None:
        pruner = p3b.Pruner(deepcopy(model), ratio, row.method, **_options(row, ratio))
        pruner.calibrate(images, cross_entropy)
        pruner.finalize(images.without_targets())

    return cut


def _small(
    row: Row, ratio: float, stage: Stage, model: VisionTransformer, config: TrainConfig, batches: _Batches
) -> VisionTransformer:
    """The small model of a row."""
    if row.method == SMALLER:
        architecture = smaller_architecture(describe_dense(model), (1 - ratio) * count_parameters(model))
        return stage.machine.put(cut_evenly(model, architecture))
    if row.method == PEER:
        peer.take_gradients(model, [batches.next()], stage.recipe.loss.task)
        return peer.cut_to(model, ratio)[1]
    options = _options(row, ratio)
    if row.method == "block_benefit" and not options["stream"]:
        options["keep_ratios"] = _recorded_keep_ratios(ratio)
    schedule = p3b.Schedule(start=0, sparse=SMALL_STEPS // 2, final=SMALL_STEPS, update_every=2)
    pruner = p3b.Pruner(model, ratio, row.method, schedule, **options)
    _steps(peer.learner_of(stage, model, config, pruner=pruner), batches, stage, SMALL_STEPS)
    small = pruner.finalize()
    assert isinstance(small, VisionTransformer)
    return small


def _recorded_keep_ratios(ratio: float) -> list[float]:
    """Of P3B's blocks at this budget, mean over the seeds of the measured table."""
    lines = [line for line in read_lines(RESULTS / "table.jsonl") if line["row"] == "block_benefit" and line["ratio"] == ratio]
    return [statistics.fmean(line["keep_ratios"][block] for line in lines) for block in lines[0]["keep_ratios"]]
