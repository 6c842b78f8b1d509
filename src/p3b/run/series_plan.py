"""The runs of a series: what each of them is, and the settings of the command that carries it out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from p3b.methods import computes_active_alone, method_options, prunes_in_one_shot
from p3b.run.distillation import TAU
from p3b.run.method_options import METHOD_OPTIONS, method_options_of
from p3b.run.options import (
    CompareConfig,
    PhaseOptions,
    PruneConfig,
    PruneOptions,
    RunOptions,
    TrainConfig,
    TrainingOptions,
)
from p3b.run.products import PRODUCTS
from p3b.run.warm_up import warm_up_name

DENSE, SMALLER = "dense", "smaller"
"""The rows that are no method."""
_OF_WARM_UP = ("prune_start_epoch", "probe_lr")
"""Settings of pruning that a warm-up depends on and its name does not tell: a run that changes one trains its own."""


@dataclass(frozen=True)
class Run:
    """One run of a series: a row of the table, at a prune ratio (None for dense), with a seed."""

    row: str
    ratio: float | None
    seed: int
    changed: tuple[tuple[str, Any], ...] = ()
    """Settings of pruning in which it differs from the rest of its series, by name: (("prune_alpha", 1.0),)."""
    dense_run: Path | None = None
    """Output folder of the dense run that it learns from, where that is not one of the series."""

    @property
    def name(self) -> str:
        """Of its folder and its lines."""
        changes = [f"{key.removeprefix('prune_')}_{value}" for key, value in self.changed]
        return "-".join([self.row, *changes, *([] if self.ratio is None else [str(self.ratio)]), f"seed{self.seed}"])

    @property
    def stage(self) -> str:
        """Command that carries it out."""
        return "prune" if is_pruned(self.row) else "train"

    def __str__(self) -> str:
        goes = "" if self.ratio is None else f", {100 * self.ratio:g} % of the parameters go"
        changes = "".join(f", --{key.replace('_', '-')} {value}" for key, value in self.changed)
        return f"{self.row}{changes}{goes}, seed {self.seed}"


def is_pruned(row: str) -> bool:
    """Whether the models of a row are pruned."""
    return row not in (DENSE, SMALLER)


def config_of(config: CompareConfig, run: Run) -> TrainConfig | PruneConfig:
    """Settings of the command that carries a run out.

    Every row is trained for as many epochs as a pruned one is pruned and fine-tuned. A setting that a method does not take
    stays as it is by default: it means nothing to it.
    """
    assert config.run.output_dir is not None
    runs = config.run.output_dir / "runs"
    folder, dense_run = runs / run.name, run.dense_run or runs / Run(DENSE, None, run.seed).name
    options = RunOptions(**{**_fields(config.run), "output_dir": folder, "report": False}, resume=True, seed=run.seed)
    if not is_pruned(run.row):
        model = config.model
        if run.row == SMALLER:  # its start brings its shape along
            model = replace(model, model_path=folder / "start", model_pretrained=False, model_kwargs=(), input_size=None)
        return TrainConfig(config.data, model, _training_of(config, run, dense_run), config.augment, options)
    assert run.ratio is not None
    defaults, taken = _fields(PhaseOptions()), method_options(run.row)
    unused = {setting for setting, option in METHOD_OPTIONS.items() if option not in taken}
    unused |= set() if computes_active_alone(run.row) else {"prune_compute"}
    unused |= set() if prunes_in_one_shot(run.row) else {"prune_schedule"}
    shared = {key: defaults[key] if key in unused else value for key, value in _fields(config.prune).items()}
    pruning = PruneOptions(**{**shared, **dict(run.changed)}, prune_method=run.row, prune_ratio=run.ratio)
    if pruning.distill_from == "dense-run":
        pruning = replace(pruning, dense_run=dense_run)
    return PruneConfig(config.data, config.model, config.training, config.augment, options, pruning)


def about_teacher(config: CompareConfig) -> str | None:
    """What the models of a series learn from, besides their labels, in a sentence; None where there is no such thing."""
    return {
        "none": None,
        "warm-up": "teacher: pruned models learn from the model at the end of their warm-up, one for all that share it; a "
        "smaller one has no warm-up and learns from the labels alone",
        "dense-run": "teacher: pruned and smaller models learn from the dense one of their seed",
    }[config.prune.distill_from]


def _training_of(config: CompareConfig, run: Run, dense_run: Path) -> TrainingOptions:
    """Of a model that is not pruned; a smaller one may learn from a dense run as pruned ones do, from its first step on."""
    training, source = config.training, config.prune.distill_from
    training = replace(training, epochs=training.epochs + config.prune.finetune_epochs)
    if source == "none":
        return training
    if source == "warm-up" or run.row == DENSE:
        return replace(training, distillation_type="none")
    return replace(
        training,
        teacher_model=config.model.model,
        teacher_path=dense_run / PRODUCTS["train"],
        distillation_type="soft" if training.distillation_type == "none" else training.distillation_type,
        distillation_tau=TAU if training.distillation_tau is None else training.distillation_tau,
    )


def warm_up_of(config: PruneConfig, run: Run) -> str | None:
    """Name of the warm-up that a run may share with others; None where it has to train its own.

    Args:
        config: of the run.
        run: with what is changed in it.
    """
    if any(key in _OF_WARM_UP for key, _ in run.changed):
        return None
    return _name_of_warm_up(config)


def shared_warm_ups(config: CompareConfig, runs: Sequence[Run]) -> set[str]:
    """Names of the warm-ups that more than one of the runs can go on from."""
    pruned = (found for run in runs if isinstance(found := config_of(config, run), PruneConfig))
    counts = Counter(_name_of_warm_up(each) for each in pruned)
    return {name for name, count in counts.items() if name is not None and count > 1}


def _name_of_warm_up(config: PruneConfig) -> str | None:
    options, seed = config.prune, config.run.seed
    if config.one_shot:
        return None
    return warm_up_name(options.prune_method, method_options_of(options, seed), options.prune_start_epoch, seed)


def _fields(options: Any) -> dict[str, Any]:
    return {field.name: getattr(options, field.name) for field in fields(options)}
