"""Recipes: how settings that nobody gave are chosen. Pure: from facts about data, model and machine to choices with reasons.

    auto    from the facts, one rule a setting; rules know what is given: a learning rate fits the batch size that was given
    small   fixed values for a few hundred images
    paper   nothing is chosen: the defaults of the options, which are those of the published runs

Where the figures of auto come from: docs/photos.md#why-these-values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from p3b.core.schedule import parse_duration

RECIPES = ("auto", "small", "paper")


@dataclass(frozen=True)
class Facts:
    """What the choices depend on.

    Attributes:
        images: to train on.
        classes: how many there are.
        smallest, largest: images of the class that has the fewest and of the one that has the most.
        side: median length of the shorter side of an image, in pixels.
        symbols: whether the names of all classes are single characters, as of digits and letters.
        input_size: side of the model's input image in pixels.
        resizable: whether that may be changed: it was not given, and the model is not one that p3b saved.
        patch_size: pixels.
        width, depth: of the model.
        pretrained: whether it starts from weights.
        on_gpu: whether it is trained on a GPU.
        memory: of the device, in bytes, for each process that uses it.
        processes: that train together.
        prunes: whether the model is pruned.
        narrows: whether its residual stream and whole heads can be pruned, too.
    """

    images: int
    classes: int
    smallest: int
    largest: int
    side: int
    symbols: bool
    input_size: int
    resizable: bool
    patch_size: int
    width: int
    depth: int
    pretrained: bool
    on_gpu: bool
    memory: int
    processes: int
    prunes: bool
    narrows: bool


@dataclass(frozen=True)
class Choice:
    """A value for a setting, and why."""

    setting: str
    value: Any
    reason: str


@dataclass(frozen=True)
class Recipe:
    """What a recipe chooses.

    Attributes:
        name: one of RECIPES.
        choices: at most one for a setting.
    """

    name: str
    choices: tuple[Choice, ...]


Settings = Mapping[str, Any]
"""Values that are given or were chosen before, by the name of the setting."""


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
    wanted = 32 if facts.images < _MANY else 64
    frequent = _power_of_two(facts.images / (_STEPS_AN_EPOCH * facts.processes))
    size = max(2, min(wanted, max(4, frequent), fitting))
    if size == fitting < wanted:
        return Choice("batch_size", size, f"what fits {facts.memory / 1e9:.0f} GB of memory")
    if size < wanted:
        return Choice("batch_size", size, f"{facts.images:,} images: smaller batches for {_STEPS_AN_EPOCH} steps an epoch")
    return Choice("batch_size", size, f"{facts.images:,} images")


_MANY, _STEPS_AN_EPOCH, _USABLE = 5_000, 5, 0.6
"""Images from which on batches are of 64 and models are made small early; steps that an epoch should have; share of the memory
that training may take."""


def _training_bytes(facts: Facts, side: int) -> float:
    """About what an image takes in training: some 34 values a token, layer and channel, and the probes of P3B as much again."""
    tokens = (side / facts.patch_size) ** 2 + 1
    return tokens * facts.depth * facts.width * 34 * 4 * (2 if facts.prunes else 1)


def _power_of_two(most: float) -> int:
    """The largest that is no more than `most`; 1 where that is less."""
    return 1 << max(0, math.floor(math.log2(max(1.0, most))))


def _epochs(facts: Facts, settled: Settings) -> Choice:
    passes = _passes(facts, settled)
    count = math.ceil(passes / _pruning_part(facts)) if facts.prunes else passes
    what = "of training"
    if facts.prunes:
        small = "the rest with the small model, whose steps cost less"
        what = f"a third to prune, {small}" if _is_early(facts) else "half to prune, half to fine-tune"
    return Choice(
        "epochs", count, f"{passes} passes over {facts.images:,} images, about {_steps(facts, settled, passes):,} steps: {what}"
    )


def _finetune_epochs(facts: Facts, settled: Settings) -> Choice | None:
    if not facts.prunes:
        return None
    passes = _passes(facts, settled)
    left = passes - math.ceil(passes / _pruning_part(facts))
    early = "the sooner the model is small, the more it learns in the same time"
    return Choice("finetune_epochs", left, early if _is_early(facts) else "the small model has to recover")


def _is_early(facts: Facts) -> bool:
    """Whether the model is pruned, and made small early and narrow: from so many images on that there are steps to do so.

    With 10,000 images that is worth 2 points and more at 50, 75 and 90 % pruned (docs/results/equal_time.md); with a few
    hundred it costs one (docs/experiments.md).
    """
    return facts.prunes and facts.images >= _MANY


def _pruning_part(facts: Facts) -> int:
    """One in so many passes is for pruning."""
    return 3 if _is_early(facts) else 2


def _passes(facts: Facts, settled: Settings) -> int:
    """Passes over the images: the fewer there are, the more; the steps still grow, with the square root of the images.

    More than 60 passes over the same images hardly teach more, unless they are so few that there would be hardly a step, or of
    so many classes that there would be few for each.
    """
    a_pass = _steps_per_epoch(facts, settled)
    passes = max(10, min(60, round(1000 / math.sqrt(facts.images))))
    passes = max(
        passes, min(_MOST_PASSES, math.ceil(_STEPS_A_CLASS * facts.classes / a_pass)), math.ceil(_LEAST_STEPS / a_pass)
    )
    return passes if facts.pretrained else 2 * passes


_LEAST_STEPS, _STEPS_A_CLASS, _MOST_PASSES = 250, 20, 100
"""Steps of a run; steps for each class, and the passes that these may come to."""


def _steps(facts: Facts, settled: Settings, epochs: float) -> int:
    return max(1, round(epochs * _steps_per_epoch(facts, settled)))


def _steps_per_epoch(facts: Facts, settled: Settings) -> int:
    batches = max(1, facts.images // (settled["batch_size"] * facts.processes))
    return math.ceil(batches / settled.get("grad_accum_steps", 1))


def _global_batch(facts: Facts, settled: Settings) -> int:
    return int(settled["batch_size"] * facts.processes * settled.get("grad_accum_steps", 1))


def _lr(facts: Facts, settled: Settings) -> Choice:
    batch = _global_batch(facts, settled)
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
        steps = _steps(facts, settled, passes)
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
    steps = _steps(facts, settled, settled["epochs"] + settled.get("finetune_epochs", 0))
    return Choice(
        "drop_path", 0.1 if steps >= 10_000 else 0.0, f"{steps:,} steps {'are' if steps >= 10_000 else 'are not'} many"
    )


def _model_ema(_facts: Facts, _settled: Settings) -> Choice:
    return Choice("model_ema", False, "a rate that falls to nothing averages enough")


# ----------------------------------------------------------------------------------------- phases of pruning


def _prune_start(facts: Facts, settled: Settings) -> Choice | None:
    if not facts.prunes:
        return None
    share = 25 if _is_early(facts) else 20
    steps = _steps(facts, settled, share / 100 * settled["epochs"])
    return Choice("prune_start_epoch", f"{share}%", f"{steps} steps of warm-up")


def _prune_update(facts: Facts, settled: Settings) -> Choice | None:
    if not facts.prunes or "prune_steps_update_mask" in settled:
        return None
    epochs, steps = settled["epochs"], _steps_per_epoch(facts, settled)
    begin = parse_duration(settled["prune_start_epoch"], epochs, steps)
    end = parse_duration(settled.get("prune_finalize_epoch") or "100%", epochs, steps)
    span = max(1.0, (end - begin) * steps)
    interval = max(1, min(max(30, round(span / 20)), round(span / 3)))
    return Choice(
        "prune_update_every",
        f"{interval}steps",
        f"benefit averaged over {interval} batches, {span / interval:.0f} mask updates",
    )


def _narrow(setting: str, value: Any, reason: str) -> Callable[[Facts, Settings], Choice | None]:
    """A rule for what makes the small model an ordinary narrower one: of the methods that can, and where nothing forbids it."""

    def rule(facts: Facts, settled: Settings) -> Choice | None:
        able = facts.narrows and _narrows_widths(facts, settled)
        by_hand = any(settled.get(other) for other in ("spare", "prune_keep_ratios"))
        return Choice(setting, value, reason) if able and not by_hand else None

    return rule


def _prune_benefit(facts: Facts, settled: Settings) -> Choice | None:
    if not _is_early(facts) or "block_benefit" not in _methods(settled):
        return None
    epochs, steps = settled["epochs"], _steps_per_epoch(facts, settled)
    warm_up = parse_duration(settled["prune_start_epoch"], epochs, steps)
    seen = round(facts.images * warm_up / max(1, facts.classes))
    if seen < _SEEN:
        return Choice("prune_benefit", "removal", f"probes would see {seen} images of a class before pruning starts, too few")
    return Choice("prune_benefit", "linear", f"{facts.images:,} images: the probes that cost least are good enough")


_SEEN = 100
"""Images of a class in the warm-up from which on probes know enough to judge blocks: with 5 they did not, with 400 they did
(docs/results/equal_time_syllables.md, docs/results/equal_time.md).
"""


def _prune_compute(facts: Facts, settled: Settings) -> Choice | None:
    if not _narrows_widths(facts, settled) or settled.get("compile"):
        return None
    return Choice("prune_compute", "active", f"{facts.images:,} images: steps that get quicker as pruning goes on")


def _narrows_widths(facts: Facts, settled: Settings) -> bool:
    """Whether it is early, and a method is asked for that can narrow widths and leave out what is closed."""
    return _is_early(facts) and any(method in _NARROWING for method in _methods(settled))


def _methods(settled: Settings) -> tuple[str, ...]:
    """Methods that are asked for."""
    return tuple(settled.get("methods") or ()) or (settled.get("prune_method", "block_benefit"),)


_NARROWING = ("block_benefit", "uniform", "random")
"""Methods that can, and that need not compute all that is closed; block_pr is P3B as published, and keeps its widths."""
_WIDTHS = (
    _narrow("prune_stream", "auto", "a narrower residual stream: a small model without indices, which trains and runs faster"),
    _narrow("align", 8, "whole heads and widths in multiples of 8 are faster"),
)


def _one_shot_method(_facts: Facts, settled: Settings) -> Choice | None:
    if settled.keys() & _OF_BLOCK_BENEFIT:
        return None
    return Choice("prune_method", "taylor", "one ranking of the network loses least where nothing is trained")


_OF_BLOCK_BENEFIT = {
    "prune_keep_ratios", "prune_benefit", "prune_alpha", "prune_gamma", "prune_benefit_scale", "probe_lr", "align", "spare",
    "prune_stream",
}  # fmt: skip
"""Settings by which somebody asks for block_benefit without naming it."""


_RULES: tuple[Callable[[Facts, Settings], Choice | None], ...] = (
    _input_size, _crop_pct, _batch_size, _epochs, _finetune_epochs, _lr, *map(_augmentation, _MILD), _class_balance, _hflip,
    _drop_path, _model_ema, _prune_start, _prune_update, _prune_benefit, _prune_compute, *_WIDTHS,
)  # fmt: skip
"""In the order in which one depends on the other."""
_RULES_OF_CUT = (_batch_size, _one_shot_method)
_RULES_OF_FINE_TUNING = (*_RULES_OF_CUT, _lr, *map(_augmentation, _MILD), _hflip, _drop_path, _model_ema)
"""Those for a model that is cut in one shot: its images are prepared in the way that it knows."""


def _rules(given: Settings) -> tuple[Callable[[Facts, Settings], Choice | None], ...]:
    if given.get("epochs") != 0:
        return _RULES
    return _RULES_OF_FINE_TUNING if given.get("finetune_epochs") else _RULES_OF_CUT
