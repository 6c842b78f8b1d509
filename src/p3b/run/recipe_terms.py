"""What the rules of a recipe are about: facts of data, model and machine, choices with their reasons, and steps of a run."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


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
        compensates: whether what goes in such a cut can be made up for by what stays.
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
    compensates: bool


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

Rule = Callable[[Facts, Settings], Choice | None]
"""A choice for one setting, from the facts and what is settled before; None where there is nothing to choose."""
MANY = 5_000
"""Images from which on batches are of 64 and models are made small early."""


def is_early(facts: Facts) -> bool:
    """Whether the model is pruned, and made small early and narrow: from so many images on that there are steps to do so.

    With 10,000 images that is worth 2 points and more at 50, 75 and 90 % pruned (docs/results/equal_time.md); with a few
    hundred it costs one (docs/experiments.md).
    """
    return facts.prunes and facts.images >= MANY


def steps_of(facts: Facts, settled: Settings, epochs: float) -> int:
    """Optimizer steps of so many epochs; one at least."""
    return max(1, round(epochs * steps_per_epoch(facts, settled)))


def steps_per_epoch(facts: Facts, settled: Settings) -> int:
    """Optimizer steps of an epoch."""
    batches = max(1, facts.images // (settled["batch_size"] * facts.processes))
    return math.ceil(batches / settled.get("grad_accum_steps", 1))


def global_batch(facts: Facts, settled: Settings) -> int:
    """Images of an optimizer step, over all processes."""
    return int(settled["batch_size"] * facts.processes * settled.get("grad_accum_steps", 1))


def passes_of(facts: Facts, settled: Settings) -> int:
    """Passes over the images: the fewer there are, the more; the steps still grow, with the square root of the images.

    More than 60 passes over the same images hardly teach more, unless they are so few that there would be hardly a step, or of
    so many classes that there would be few for each.
    """
    a_pass = steps_per_epoch(facts, settled)
    passes = max(10, min(60, round(1000 / math.sqrt(facts.images))))
    passes = max(
        passes, min(_MOST_PASSES, math.ceil(_STEPS_A_CLASS * facts.classes / a_pass)), math.ceil(_LEAST_STEPS / a_pass)
    )
    return passes if facts.pretrained else 2 * passes


_LEAST_STEPS, _STEPS_A_CLASS, _MOST_PASSES = 250, 20, 100
"""Steps of a run; steps for each class, and the passes that these may come to."""
