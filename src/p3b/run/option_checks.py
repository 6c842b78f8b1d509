"""Ranges and contradictions of the options that can be seen without data or model."""

from __future__ import annotations

import math

from p3b.errors import ConfigError
from p3b.run.options import (
    AT_ONCE,
    DataOptions,
    EvaluateConfig,
    MachineOptions,
    ModelOptions,
    PhaseOptions,
    PruneConfig,
    PruneOptions,
    RunOptions,
    TrainConfig,
    TrainingOptions,
)
from p3b.run.trackers import NONE, trackers_asked_for

_PHASES = (
    "prune_start_epoch",
    "prune_sparse_epoch",
    "prune_finalize_epoch",
    "prune_steps_update_mask",
    "prune_update_every",
    "prune_masks",
    "prune_schedule",
)
"""Settings that say when masks close while a model trains."""
OF_GRADUAL = (*(name for name in _PHASES if name not in ("prune_start_epoch", "prune_schedule")), "prune_compute")
"""Those that mean nothing where masks close at once."""


def check(config: TrainConfig) -> None:
    """Refuse a run of training, with or without pruning.

    Raises:
        ConfigError: names the flag, what was got and what is expected.
    """
    _check_training(config.training, may_be_none=isinstance(config, PruneConfig))
    _check_teacher(config)
    _check_inputs(config.data, config.model)
    _check_run(config.run)
    if config.run.output_dir is None:
        raise ConfigError("--output-dir is missing: the folder that everything is written to.")
    if config.model.resize_model_by_checkpoint and config.model.model_path is None:
        raise ConfigError("--resize-model-by-checkpoint needs --model-path: the pruned model or first_sparse_checkpoint.pth.")
    if isinstance(config, PruneConfig):
        _check_pruning(config.prune)
        _check_one_shot(config)
        if config.prune.prune_compute == "active" and config.training.compile:
            raise ConfigError(
                "--prune-compute active cannot be combined with --compile: what is computed changes at every mask update, "
                "and would be compiled anew each time. Leave one of them out."
            )
        if config.model.resize_model_by_checkpoint:
            raise ConfigError("A model that has been pruned already cannot be pruned again; use `p3b finetune` for it.")


def check_evaluation(config: EvaluateConfig) -> None:
    """Refuse an evaluation.

    Raises:
        ConfigError: names the flag, what was got and what is expected.
    """
    _positive(batch_size=config.batch_size)
    _check_inputs(config.data, config.model)
    if set(config.run.track) - {NONE}:
        raise ConfigError("An evaluation is not tracked: leave --track out.")
    if config.run.resume:
        raise ConfigError("An evaluation has nothing to resume: leave --resume out, or replace an earlier one by --overwrite.")
    _check_run(config.run)


def require_training(epochs: int, mend: str) -> None:
    """Refuse a series that would train nothing, and so no dense model to compare with.

    Args:
        epochs: of a row, fine-tuning included.
        mend: what to give, in place of epochs.

    Raises:
        ConfigError: there are none.
    """
    if epochs == 0:
        raise ConfigError(
            "--epochs 0 without --finetune-epochs trains nothing, so there is no dense model to compare with. Give "
            f"--finetune-epochs, or {mend}."
        )


def check_screen(run: MachineOptions) -> None:
    """Refuse what contradicts itself about the screen.

    Raises:
        ConfigError: both --verbose and --quiet.
    """
    if run.verbose and run.quiet:
        raise ConfigError("--verbose and --quiet contradict each other; give one of them.")


def _check_training(training: TrainingOptions, *, may_be_none: bool) -> None:
    (_not_negative if may_be_none else _positive)(epochs=training.epochs)
    _positive(batch_size=training.batch_size, grad_accum_steps=training.grad_accum_steps)
    _positive(lr=training.lr)
    _not_negative(min_lr=training.min_lr, warmup_epochs=training.warmup_epochs, weight_decay=training.weight_decay)
    _not_negative(mixup=training.mixup, cutmix=training.cutmix)
    _share(smoothing=training.smoothing)
    if training.layer_decay is not None and not 0 < training.layer_decay <= 1:
        raise ConfigError(f"--layer-decay must lie in (0, 1], got {training.layer_decay}.")
    if training.clip_grad is not None:
        _positive(clip_grad=training.clip_grad)
    if not 0 < training.model_ema_decay < 1:
        raise ConfigError(f"--model-ema-decay must lie in (0, 1), got {training.model_ema_decay}.")
    if training.warmup_epochs >= training.epochs > 0 and training.warmup_epochs > 0:
        raise ConfigError(f"--warmup-epochs {training.warmup_epochs} leaves none of the {training.epochs} epochs.")
    if training.teacher_path is not None and training.teacher_model is None:
        raise ConfigError(f"--teacher-path {training.teacher_path} needs --teacher-model, the teacher's timm name.")


def _check_teacher(config: TrainConfig) -> None:
    training = config.training
    source = config.prune.distill_from if isinstance(config, PruneConfig) else "none"
    if source == "none":
        if (training.teacher_model is None) != (training.distillation_type == "none"):
            raise ConfigError(
                "Distillation needs both a teacher (--teacher-model) and a kind (--distillation-type soft or hard)."
            )
    elif training.teacher_model is not None:
        raise ConfigError(
            f"--distill-from {source} and --teacher-model {training.teacher_model} name two teachers; give one of them."
        )
    elif source == "dense-run" and isinstance(config, PruneConfig) and config.prune.dense_run is None:
        raise ConfigError("--distill-from dense-run needs --dense-run: the output folder of a finished `p3b train`.")


def _check_pruning(prune: PruneOptions) -> None:
    _not_negative(finetune_epochs=prune.finetune_epochs)
    _positive(align=prune.align, calibration_images=prune.calibration_images)
    if prune.finetune_lr is not None:
        _positive(finetune_lr=prune.finetune_lr)
    if prune.prune_steps_update_mask is not None:
        _positive(prune_steps_update_mask=prune.prune_steps_update_mask)


def _check_one_shot(config: PruneConfig) -> None:
    """Refuse settings that one shot, where that is asked for, would have to ignore."""
    options, defaults = config.prune, PhaseOptions()
    if config.training.epochs > 0:
        if options.prune_schedule == AT_ONCE:
            for name in OF_GRADUAL:
                if (value := getattr(options, name)) != getattr(defaults, name):
                    raise ConfigError(
                        f"--{name.replace('_', '-')} {value} means nothing with --prune-schedule at-once, which closes nothing "
                        "before --prune-start-epoch and all of it then; leave one of them out."
                    )
        return
    for name in _PHASES:
        if (value := getattr(options, name)) != getattr(defaults, name):
            raise ConfigError(
                f"--{name.replace('_', '-')} {value} means nothing with --epochs 0, which prunes in one shot; leave it out, or "
                "give --epochs."
            )
    if options.distill_from == "warm-up":
        raise ConfigError(
            "--distill-from warm-up needs a warm-up, and --epochs 0 trains nothing before the cut. The small model can learn "
            "from the model that it is cut from: --distill-from dense-run with --dense-run, or --teacher-model and "
            "--teacher-path."
        )


def _check_inputs(data: DataOptions, model: ModelOptions) -> None:
    _share(drop_path=model.drop_path)
    if model.crop_pct is not None and not 0 < model.crop_pct <= 1:
        raise ConfigError(f"--crop-pct must lie in (0, 1], got {model.crop_pct}.")
    for flag, values, lowest in (("--mean", model.mean, "0 to"), ("--std", model.std, "above 0 to")):
        if values is not None and not all(0 <= value <= 1 and (value > 0 or flag == "--mean") for value in values):
            raise ConfigError(
                f"{flag} is {' '.join(map(str, values))}; expected numbers from {lowest} 1, one for a channel: pixels are "
                "scaled to [0, 1] first. Divide values for pixels of 0 to 255 by 255."
            )
    if data.num_workers is not None:
        _not_negative(num_workers=data.num_workers)
    if data.cache not in ("auto", "off"):
        try:
            _positive(cache=float(data.cache))
            int(1e9 * float(data.cache))
        except (ValueError, OverflowError):
            raise ConfigError(f"--cache must be auto, off or a number of gigabytes, got {data.cache!r}.") from None


def _check_run(run: RunOptions) -> None:
    check_screen(run)
    trackers_asked_for(run.track)
    _positive(timeout_minutes=run.timeout_minutes)
    _not_negative(checkpoint_minutes=run.checkpoint_minutes)
    if run.resume and run.overwrite:
        raise ConfigError("--resume and --overwrite contradict each other; give one of them.")
    if not 0 <= run.seed < 2**31:
        raise ConfigError(f"--seed must lie in [0, 2**31), got {run.seed}.")


def _share(**values: float) -> None:
    for name, value in values.items():
        if not 0 <= value < 1:
            raise ConfigError(f"{_flag(name)} must lie in [0, 1), got {value}.")


def _positive(**values: float) -> None:
    for name, value in values.items():
        if not value > 0:
            raise ConfigError(f"{_flag(name)} must be above 0, got {value}.")
        if value == math.inf:
            raise ConfigError(f"{_flag(name)} must be finite, got {value}.")


def _not_negative(**values: float) -> None:
    for name, value in values.items():
        if not value >= 0:
            raise ConfigError(f"{_flag(name)} must be 0 or more, got {value}.")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
