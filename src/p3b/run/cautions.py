"""What is said before a training starts that can hardly work: a sentence for each cause, with the flags that mend it.

Nothing is refused here. The same numbers (`p3b.report.thresholds`) explain a run after its end (`p3b doctor`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from p3b.core.schedule import Schedule
from p3b.report.thresholds import (
    FEW_IMAGES_A_CLASS,
    FEW_STEPS,
    FEW_STEPS_BETWEEN,
    SMALL_RATE,
    hardly_moves,
    is_noise,
)


@dataclass(frozen=True)
class Outlook:
    """What a training has to work with, known before its first step.

    Attributes:
        model: timm's name.
        has_weights: whether it starts from weights; False: from random ones.
        images: training images of each class, by name.
        batch_size: as of --batch-size.
        global_batch: images of an optimizer step.
        steps_per_epoch: optimizer steps.
        epochs: of the stage, fine-tuning included.
        lr: as of --lr, for a global batch of 512.
        rate: what it comes to.
        schedule: of pruning; None where nothing is pruned.
        asked_interval: mini-batches between two mask updates, as of --prune-steps-update-mask.
    """

    model: str
    has_weights: bool
    images: dict[str, int]
    batch_size: int
    global_batch: int
    steps_per_epoch: int
    epochs: int
    lr: float
    rate: float
    schedule: Schedule | None = None
    asked_interval: int | None = None

    @property
    def steps(self) -> int:
        """Optimizer steps of the stage."""
        return self.epochs * self.steps_per_epoch


def cautions(outlook: Outlook) -> list[str]:
    """Every cause for doubt, in the order in which they matter."""
    return [said for caution in CAUTIONS if (said := caution(outlook)) is not None]


def random_weights(outlook: Outlook) -> str | None:
    """Training from random weights."""
    if outlook.has_weights:
        return None
    return (
        "training starts from random weights, and a Vision Transformer learns little from few images that way. Give "
        f"--model-pretrained (timm's weights of {outlook.model}, downloaded) or --model-path FILE."
    )


def few_images(outlook: Outlook) -> str | None:
    """Classes with hardly any image."""
    few = {name: count for name, count in outlook.images.items() if count < FEW_IMAGES_A_CLASS}
    if not few:
        return None
    fewest = min(few, key=lambda name: few[name])
    return (
        f"{len(few):,} of {len(outlook.images):,} classes have fewer than {FEW_IMAGES_A_CLASS} training images (fewest: "
        f"{fewest}, {few[fewest]}): few images to learn a class from. Add images; a smaller --val-share keeps more of them for "
        "training, a larger --max-train-images takes more."
    )


def few_steps(outlook: Outlook) -> str | None:
    """A stage that is over before it has begun."""
    if outlook.steps >= FEW_STEPS:
        return None
    return (
        f"too few optimizer steps to adapt a model: {outlook.steps:,} in all ({outlook.steps_per_epoch} an epoch). "
        f"Give more --epochs (now {outlook.epochs}) or a smaller --batch-size (now {outlook.batch_size})."
    )


def few_steps_between_phases(outlook: Outlook) -> str | None:
    """Phases of pruning that follow each other so closely that the model cannot."""
    schedule = outlook.schedule
    if schedule is None:
        return None
    phases = {"sparsify": schedule.sparse - schedule.start, "sharpen": schedule.final - schedule.sparse}
    if schedule.start:
        phases = {"warm-up": schedule.start, **phases}
    short = [f"{name} {_count(steps, 'step')}" for name, steps in phases.items() if steps < FEW_STEPS_BETWEEN]
    if not short:
        return None
    return (
        f"phases of pruning have fewer than {FEW_STEPS_BETWEEN} steps ({', '.join(short)}): too few for the model to follow. "
        "Give more --epochs, a smaller --batch-size, or another --prune-start-epoch and --prune-sparse-epoch."
    )


def few_steps_between_updates(outlook: Outlook) -> str | None:
    """Mask updates so close that each of them measures noise; also where the interval that was asked for had to give way."""
    schedule = outlook.schedule
    if schedule is None:
        return None
    every, batch = schedule.update_every, outlook.global_batch
    if not is_noise(every, every * batch):
        return None
    asked = outlook.asked_interval
    gave_way = asked is not None and every < round(asked * outlook.batch_size / batch)
    cause = f" (--prune-steps-update-mask {asked} is longer than an epoch and gives way)" if gave_way else ""
    interval = "at every step" if every == 1 else f"every {every} steps"
    return (
        f"masks are renewed {interval} of {batch} images{cause}: benefits and scores of so few images are "
        f"mostly noise. {_better_interval(outlook)}"
    )


def small_rate(outlook: Outlook) -> str | None:
    """A learning rate that scaling by the batch size has made tiny."""
    if outlook.rate >= outlook.lr or not hardly_moves(outlook.rate, outlook.steps):
        return None
    return (
        f"the learning rate is {outlook.rate:.1e}: --lr {outlook.lr:g} is meant for 512 images a step and is scaled to "
        f"{outlook.global_batch}. In {_count(outlook.steps, 'step')} it changes little. Give a larger one, such as --lr "
        f"{5 * SMALL_RATE * outlook.lr / outlook.rate:.1g}."
    )


CAUTIONS: tuple[Callable[[Outlook], str | None], ...] = (
    random_weights,
    few_images,
    few_steps,
    few_steps_between_phases,
    few_steps_between_updates,
    small_rate,
)


def _better_interval(outlook: Outlook) -> str:
    """The flags that give mask updates enough steps, where the images suffice for it."""
    samples = outlook.steps_per_epoch * outlook.global_batch
    at_most = samples // FEW_STEPS_BETWEEN // 2 * 2
    per_batch = outlook.global_batch // outlook.batch_size or 1
    if outlook.steps_per_epoch >= FEW_STEPS_BETWEEN:
        return f"Give --prune-steps-update-mask {FEW_STEPS_BETWEEN} or more."
    if at_most // per_batch < 2:
        return "Add images, or train the model whole and prune less."
    batch = min(outlook.batch_size, at_most // per_batch // 2 * 2)
    return f"Give a smaller --batch-size, such as {batch}, with --prune-steps-update-mask {FEW_STEPS_BETWEEN}."


def _count(number: int, thing: str) -> str:
    return f"{number:,} {thing}{'' if number == 1 else 's'}"
