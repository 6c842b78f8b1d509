"""Recipes: how settings that nobody gave are chosen. Pure: from facts about data, model and machine to choices with reasons.

    auto    from the facts, one rule a setting; rules know what is given: a learning rate fits the batch size that was given
    small   fixed values for a few hundred images
    paper   nothing is chosen: the defaults of the options, which are those of the published runs

Where the figures of auto come from: docs/photos.md#why-these-values.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from p3b.run.pruning_rules import (
    WIDTHS,
    calibration_images,
    is_at_once,
    one_shot_method,
    prune_benefit,
    prune_compute,
    prune_schedule,
    prune_start,
    prune_update,
)
from p3b.run.recipe_terms import (
    MANY,
    Choice,
    Facts,
    Recipe,
    Rule,
    Settings,
    global_batch,
    is_early,
    passes_of,
    steps_of,
)

RECIPES = ("auto", "small", "paper")


def auto_recipe(facts: Facts, given: Settings) -> Recipe:
    """A choice for every setting that is not given, each by its rule.

    Args:
        facts: of data, model and machine.
        given: settings that are given, with their values; none of them is chosen.

    Raises:
        ScheduleError: a given phase is no duration.
    """
    settled: dict[str, Any] = dict(given)
    choices = []
    for rule in _rules(given):
        choice = rule(facts, settled)
        if choice is not None and choice.setting not in given:
            choices.append(choice)
            settled[choice.setting] = choice.value
    return Recipe("auto", tuple(choices))


def small_recipe(given: Settings, *, prunes: bool) -> Recipe:
    """Fixed values for a few hundred images."""
    epochs = {"epochs": 30, "finetune_epochs": 30} if prunes else {"epochs": 60}
    pruning = {"prune_start_epoch": "20%", "prune_update_every": "30steps"} if prunes else {}
    if given.get("epochs") == 0:  # one shot: no phases, and no fine-tuning that was not asked for
        epochs, pruning = {}, {}
    values = {**_MEDIUM, **epochs, **pruning, "batch_size": 32, "lr": 4e-3, "drop_path": 0.0}
    reason = "for a few hundred images"
    return Recipe("small", tuple(Choice(name, value, reason) for name, value in values.items() if name not in given))


# ----------------------------------------------------------------------------------------- images, batches and steps


def _input_size(facts: Facts, _settled: Settings) -> Choice | None:
    native = facts.input_size
    if not facts.resizable:
        return None
    needed = facts.patch_size * max(_LEAST_PATCHES, math.ceil(facts.side / facts.patch_size))
    if facts.on_gpu or needed >= native:
        return Choice("input_size", native, "the size that the model is made for")
    less = (native / needed) ** 2
    return Choice("input_size", needed, f"images of {facts.side} pixels; {native} would take {less:.1f} times as long on a CPU")


_LEAST_PATCHES = 6
"""Along a side: what is known of 224 pixels is of little use on fewer."""


def _crop_pct(facts: Facts, settled: Settings) -> Choice | None:
    size = settled.get("input_size") or facts.input_size
    if facts.side > 1.15 * size:
        return None
    return Choice("crop_pct", 1.0, f"images of {facts.side} pixels have no border to spare at {size}")


def _batch_size(facts: Facts, settled: Settings) -> Choice:
    image_bytes = _training_bytes(facts, settled.get("input_size") or facts.input_size)
    fitting = _power_of_two(_USABLE * facts.memory / image_bytes)
    wanted = 32 if facts.images < MANY else 64
    frequent = _power_of_two(facts.images / (_STEPS_AN_EPOCH * facts.processes))
    size = max(2, min(wanted, max(4, frequent), fitting))
    if size == fitting < wanted:
        return Choice("batch_size", size, f"what fits {facts.memory / 1e9:.0f} GB of memory")
    if size < wanted:
        return Choice("batch_size", size, f"{facts.images:,} images: smaller batches for {_STEPS_AN_EPOCH} steps an epoch")
    return Choice("batch_size", size, f"{facts.images:,} images")


_STEPS_AN_EPOCH, _USABLE = 5, 0.6
"""Steps that an epoch should have; share of the memory that training may take."""


def _training_bytes(facts: Facts, side: int) -> float:
    """About what an image takes in training: some 34 values a token, layer and channel, and the probes of P3B as much again."""
    tokens = (side / facts.patch_size) ** 2 + 1
    return tokens * facts.depth * facts.width * 34 * 4 * (2 if facts.prunes else 1)


def _power_of_two(most: float) -> int:
    """The largest that is no more than `most`; 1 where that is less."""
    return 1 << max(0, math.floor(math.log2(max(1.0, most))))


def _epochs(facts: Facts, settled: Settings) -> Choice:
    passes = passes_of(facts, settled)
    at_once = is_at_once(settled)
    count = math.ceil(passes / _pruning_part(facts)) if facts.prunes and not at_once else passes
    what = "nearly all with the small model, whose steps cost less" if at_once else "of training"
    if facts.prunes and not at_once:
        small = "the rest with the small model, whose steps cost less"
        what = f"a third to prune, {small}" if is_early(facts) else "half to prune, half to fine-tune"
    steps = steps_of(facts, settled, passes)
    return Choice("epochs", count, f"{passes} passes over {facts.images:,} images, about {steps:,} steps: {what}")


def _finetune_epochs(facts: Facts, settled: Settings) -> Choice | None:
    if not facts.prunes or is_at_once(settled):
        return None
    passes = passes_of(facts, settled)
    left = passes - math.ceil(passes / _pruning_part(facts))
    early = "the sooner the model is small, the more it learns in the same time"
    return Choice("finetune_epochs", left, early if is_early(facts) else "the small model has to recover")


def _pruning_part(facts: Facts) -> int:
    """One in so many passes is for pruning."""
    return 3 if is_early(facts) else 2


def _lr(facts: Facts, settled: Settings) -> Choice:
    batch = global_batch(facts, settled)
    rate = 4e-4 * 128 / facts.width * math.sqrt(batch / 64) * (1 if facts.pretrained else 2)
    return Choice(
        "lr",
        float(f"{rate * 512 / batch:.2g}"),
        f"{rate:.1e} a step, for a {'pretrained' if facts.pretrained else 'new'} model of {facts.width} channels",
    )


# ----------------------------------------------------------------------------------------- regularisation

_MILD = {
    "aa": None, "crop_scale": (0.6, 1.0), "reprob": 0.0, "repeated_aug": False, "mixup": 0.0, "cutmix": 0.0,
}  # fmt: skip
_MEDIUM = {
    "aa": "rand-m5-mstd0.5-inc1", "crop_scale": (0.35, 1.0), "reprob": 0.1, "repeated_aug": False, "mixup": 0.2, "cutmix": 0.0,
}  # fmt: skip
_STRONG = {
    "aa": "rand-m9-mstd0.5-inc1", "crop_scale": (0.2, 1.0), "reprob": 0.25, "repeated_aug": False, "mixup": 0.8, "cutmix": 1.0,
}  # fmt: skip


def _augmentation(setting: str) -> Callable[[Facts, Settings], Choice]:
    def rule(facts: Facts, settled: Settings) -> Choice:
        passes = settled["epochs"] + (settled.get("finetune_epochs") or 0)
        steps = steps_of(facts, settled, passes)
        if steps >= _LONG:
            return Choice(setting, _STRONG[setting], f"strong augmentation for {steps:,} steps")
        if passes >= _OFTEN and steps >= _ENOUGH:
            return Choice(setting, _MEDIUM[setting], f"medium augmentation, since each image is seen {passes} times")
        few = f"{steps:,} steps are few" if passes >= _OFTEN else f"each image is seen {passes} times only"
        return Choice(setting, _MILD[setting], f"mild augmentation, since {few}")

    return rule


_LONG, _OFTEN, _ENOUGH = 50_000, 30, 3_000
"""Steps of a long run; passes from which on images would be learnt by heart, and the steps that it takes to do so: in some
hundred steps a network learns less of images that are changed more (docs/results/recipes.md).
"""


def _class_balance(facts: Facts, _settled: Settings) -> Choice | None:
    times = facts.largest / max(1, facts.smallest)
    if times < _UNEVEN:
        return None
    balance = "inverse" if times < _VERY_UNEVEN else "sqrt"  # a few images with a great weight are learnt by heart
    return Choice("class_balance", balance, f"the largest class has {times:.0f} times as many images as the smallest")


_UNEVEN, _VERY_UNEVEN = 4, 20
"""Images of the largest class for one of the smallest: from the first on rare classes get more weight, from the second on less
than would make classes equal.
"""


def _hflip(facts: Facts, _settled: Settings) -> Choice | None:
    return Choice("hflip", 0.0, "characters are not mirrored") if facts.symbols else None


def _drop_path(facts: Facts, settled: Settings) -> Choice:
    steps = steps_of(facts, settled, settled["epochs"] + settled.get("finetune_epochs", 0))
    return Choice(
        "drop_path", 0.1 if steps >= 10_000 else 0.0, f"{steps:,} steps {'are' if steps >= 10_000 else 'are not'} many"
    )


def _model_ema(_facts: Facts, _settled: Settings) -> Choice:
    return Choice("model_ema", False, "a rate that falls to nothing averages enough")


_RULES: tuple[Rule, ...] = (
    _input_size, _crop_pct, _batch_size, prune_schedule, _epochs, _finetune_epochs, _lr, *map(_augmentation, _MILD),
    _class_balance, _hflip, _drop_path, _model_ema, prune_start, prune_update, prune_benefit, prune_compute, *WIDTHS,
    calibration_images,
)  # fmt: skip
"""In the order in which one depends on the other."""
_RULES_OF_CUT = (_batch_size, one_shot_method)
_RULES_OF_FINE_TUNING = (*_RULES_OF_CUT, _lr, *map(_augmentation, _MILD), _hflip, _drop_path, _model_ema)
"""Those for a model that is cut in one shot: its images are prepared in the way that it knows."""


def _rules(given: Settings) -> tuple[Rule, ...]:
    if given.get("epochs") != 0:
        return _RULES
    return _RULES_OF_FINE_TUNING if given.get("finetune_epochs") else _RULES_OF_CUT
