"""Why a run's accuracy is lower than it could be: checks on its records, each with its evidence and a setting to try.

A check is a pure function from a stage's record to a `Finding`, or to None where there is nothing to say. Thresholds are rules
of thumb, stated above; the evidence is always a figure of the run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from p3b.report.evaluation import class_accuracies
from p3b.report.record import StageRecord
from p3b.report.thresholds import FEW_STEPS, FEW_STEPS_BETWEEN, SMALL_RATE, is_noise

LARGE_DROP = 3.0
"""Points of accuracy that an epoch may lose before it is named."""
RISING_LOSS = 1.2
"""Ratio of the last evaluation loss to the lowest one from which the model counts as overfitted."""
COLLAPSED = 0.25
"""Share of the dense model's accuracy below which a class counts as collapsed."""


@dataclass(frozen=True)
class Finding:
    """Something that explains lost accuracy.

    Attributes:
        check: name of the check.
        says: what was found, in one sentence.
        evidence: the figures of the run that show it.
        advice: the setting to try.
    """

    check: str
    says: str
    evidence: str
    advice: str


def diagnose(stage: StageRecord) -> list[Finding]:
    """All that the checks find, in the order of `CHECKS`."""
    return [finding for check in CHECKS if (finding := check(stage)) is not None]


def random_weights(stage: StageRecord) -> Finding | None:
    """Training that starts from random weights."""
    model = stage.config.get("model", {})
    if model.get("model_path") or model.get("model_pretrained"):
        return None
    return Finding(
        "random weights",
        "The run started from random weights.",
        f"{model.get('model')} without --model-pretrained or --model-path",
        "Start from pretrained weights: --model-pretrained, or --model-path FILE.",
    )


def few_steps(stage: StageRecord) -> Finding | None:
    """A run with too few optimizer steps to adapt."""
    steps = stage.epochs[-1]["step"] if stage.epochs else 0
    if not stage.epochs or steps >= FEW_STEPS:
        return None
    return Finding(
        "few steps",
        f"The whole stage had {steps} optimizer steps.",
        f"{len(stage.epochs)} epochs of {stage.config.get('resolved', {}).get('steps_per_epoch')} steps",
        "Train for more --epochs, use a smaller --batch-size, and raise --lr (it is scaled with the batch size).",
    )


def small_learning_rate(stage: StageRecord) -> Finding | None:
    """A learning rate that scaling by the batch size has made tiny, while the loss was still falling."""
    if len(stage.epochs) < 4:
        return None
    rate = max(epoch["lr"] for epoch in stage.epochs)
    first, last = stage.epochs[0]["train_loss"], stage.epochs[-1]["train_loss"]
    before = stage.epochs[-1 - len(stage.epochs) // 4]["train_loss"]
    if rate > SMALL_RATE or before - last < 0.1 * (first - last):
        return None
    return Finding(
        "small learning rate",
        "The learning rate is small, and the loss was still falling at the end.",
        f"largest rate {rate:.1e}; training loss {before:.3f} after three quarters of the epochs, {last:.3f} at the end",
        "Raise --lr, or train for more --epochs.",
    )


def steps_between_updates(stage: StageRecord) -> Finding | None:
    """Mask updates so close that one measures the noise of a few batches."""
    if len(stage.updates) < 3:
        return None
    resolved = stage.config.get("resolved", {})
    per_epoch = resolved.get("steps_per_epoch", 0)
    between = round(min(after.epoch - before.epoch for before, after in pairwise(stage.updates[:-1])) * per_epoch)
    if between == 0 or not is_noise(between, between * resolved.get("global_batch", 0)):
        return None
    return Finding(
        "steps between mask updates",
        f"Masks are renewed every {between} steps: benefit and scores of so few batches are mostly noise.",
        f"{len(stage.updates)} updates, {per_epoch} steps an epoch",
        f"Renew masks less often: --prune-steps-update-mask of {FEW_STEPS_BETWEEN} or more, or more steps an epoch.",
    )


def largest_drop(stage: StageRecord) -> Finding | None:
    """The epoch that lost most accuracy, its phase, and the block that lost most parameters in it."""
    if len(stage.epochs) < 2:
        return None
    part = "val" if "val_top1" in stage.epochs[0] else "test"
    drops = [(before[f"{part}_top1"] - after[f"{part}_top1"], after) for before, after in pairwise(stage.epochs)]
    drop, epoch = max(drops, key=lambda each: each[0])
    if drop < LARGE_DROP:
        return None
    block = _emptied_in(stage, epoch["epoch"])
    return Finding(
        "largest drop",
        f"Epoch {epoch['epoch']} ({epoch['phase']}) lost {drop:.1f} points of {part} top-1.",
        f"top-1 {epoch[f'{part}_top1']:.1f} % after it" + ("" if block is None else f"; {block} lost most parameters in it"),
        "Prune more slowly: a later --prune-sparse-epoch, or more --epochs between start and finalize."
        if epoch["phase"] in ("sparsify", "sharpen")
        else "Lower --lr, or raise --clip-grad.",
    )


def vanished_blocks(stage: StageRecord) -> Finding | None:
    """Blocks that keep nothing."""
    gone = [block["name"] for block in stage.updates[-1].blocks if block["kept_params"] == 0] if stage.updates else []
    if not gone:
        return None
    return Finding(
        "vanished blocks",
        f"{len(gone)} of {len(stage.updates[-1].blocks)} blocks are gone: {', '.join(gone)}.",
        "kept_params of the last line of blocks.jsonl",
        "If accuracy suffers: a smaller --prune-ratio, or a smaller --prune-benefit-scale, which shares more evenly.",
    )


def benefit_never_positive(stage: StageRecord) -> Finding | None:
    """No block ever helped by a probe's measure, so the budget was shared without evidence."""
    measured = [block["benefit_cls"] for update in stage.updates for block in update.blocks if block["benefit_cls"] is not None]
    if not measured or max(measured) > 0:
        return None
    return Finding(
        "benefit never positive",
        "No block ever had a positive benefit for the class token: shares stayed uniform.",
        f"largest benefit {max(measured):.2e} over {len(stage.updates)} updates",
        "Start pruning later (--prune-start-epoch), so that probes and model have adapted, or raise --probe-lr.",
    )


def no_fine_tuning(stage: StageRecord) -> Finding | None:
    """A pruned model that was never fine-tuned."""
    if stage.name != "prune" or stage.summary is None or any(epoch["phase"] == "fine-tune" for epoch in stage.epochs):
        return None
    return Finding(
        "no fine-tuning",
        "The small model was not fine-tuned.",
        "no epoch of the phase fine-tune in metrics.jsonl",
        "Give --finetune-epochs, or run p3b finetune.",
    )


def overfitting(stage: StageRecord) -> Finding | None:
    """Evaluation loss that rises while training loss falls."""
    if len(stage.epochs) < 4:
        return None
    part = "val" if "val_loss" in stage.epochs[0] else "test"
    tail = _of_last_phase(stage)
    losses = [epoch[f"{part}_loss"] for epoch in tail]
    lowest = min(losses)
    if lowest <= 0 or losses[-1] / lowest < RISING_LOSS or tail[-1]["train_loss"] > tail[losses.index(lowest)]["train_loss"]:
        return None
    return Finding(
        "overfitting",
        f"The {part} loss rises while the training loss falls.",
        f"{part} loss {lowest:.3f} at its lowest, {losses[-1]:.3f} at the end",
        "Use stronger augmentation (--aa, --mixup, --drop-path), fewer epochs, or more images.",
    )


def collapsed_classes(stage: StageRecord) -> Finding | None:
    """Classes that lost most of their accuracy."""
    gone = [c for c in class_accuracies(stage) if c.dense is not None and c.accuracy < COLLAPSED * c.dense]
    if not gone:
        return None
    return Finding(
        "collapsed classes",
        f"{len(gone)} classes lost most of their accuracy: {', '.join(c.name for c in gone[:6])}.",
        f"{gone[0].name}: {gone[0].dense:.0f} % dense, {gone[0].accuracy:.0f} % now, {gone[0].images} images",
        "Rare classes are lost first: more images of them, a smaller --prune-ratio, or more fine-tuning.",
    )


CHECKS: tuple[Callable[[StageRecord], Finding | None], ...] = (
    random_weights,
    few_steps,
    small_learning_rate,
    steps_between_updates,
    largest_drop,
    vanished_blocks,
    benefit_never_positive,
    no_fine_tuning,
    overfitting,
    collapsed_classes,
)
"""In the order in which they are told: what explains most comes first."""


def _of_last_phase(stage: StageRecord) -> list[Any]:
    return [epoch for epoch in stage.epochs if epoch["phase"] == stage.epochs[-1]["phase"]]


def _emptied_in(stage: StageRecord, epoch: float) -> str | None:
    """The block that lost most parameters between the mask updates around the end of an epoch."""
    before = [update for update in stage.updates if update.epoch <= epoch - 1]
    after = [update for update in stage.updates if update.epoch <= epoch]
    if not before or not after or before[-1] is after[-1]:
        return None
    lost = {
        now["name"]: then["kept_params"] - now["kept_params"]
        for then, now in zip(before[-1].blocks, after[-1].blocks, strict=True)
    }
    name = max(lost, key=lambda each: lost[each])
    return name if lost[name] > 0 else None
