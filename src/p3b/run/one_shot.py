"""One shot: a model is cut by what some hundred training images say, as it is (`p3b prune --epochs 0`) or after a warm-up."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import numpy as np
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.nn.functional import cross_entropy

from p3b.data import EvalBatches, eval_batches
from p3b.data.cut import balanced_subset
from p3b.errors import ConfigError, ModelError
from p3b.pruner import Pruner
from p3b.run.final_table import reported_part
from p3b.run.guessing import said_of_guessing
from p3b.run.options import PruneConfig
from p3b.run.stage import Stage
from p3b.train.evaluate import Accuracy
from p3b.vit.compensation import require_compensable


def require_trained(stage: Stage) -> dict[str, Accuracy]:
    """Accuracy of the model that is to be pruned, on all parts; refuse one that does not know these classes.

    Raises:
        ModelError: its head is new or of other classes, or its answers are no better than guesses.
    """
    mend = (
        "One shot (--epochs 0) trains nothing: give --model-path a model that is trained on these classes (dense/ of a "
        "finished `p3b train`), or let it learn them on the way with --epochs 10 or more."
    )
    if stage.unknown_classes is not None:
        raise ModelError(f"{stage.unknown_classes} {mend}")
    accuracies = stage.evaluation.final(stage.model)
    part = reported_part(accuracies)
    found = accuracies[part]
    guess = said_of_guessing("The model", part, found.top1, stage.evaluation.chances[part], found.images)
    if guess is not None:
        raise ModelError(f"{guess} {mend}")
    return accuracies


def share_of_images(asked: int, train_images: int, processes: int) -> int:
    """Images that a cut is decided on in each process, of so many that are asked for and are there.

    Raises:
        ConfigError: there is not one for each.
    """
    share = min(asked, train_images) // processes
    if share < 1:
        raise ConfigError(f"--calibration-images leaves none for each of {processes} processes; give more of them.")
    return share


class CalibrationImages:
    """Training images as they are, not augmented, that a cut is decided or compensated on; each rank has its share.

    Args:
        stage: whose training images they are.
        count: how many at most, equally many of each class as nearly as can be, chosen by seed.
    """

    def __init__(self, stage: Stage, count: int) -> None:
        train, seed, processes = stage.splits.train, stage.provenance["seed"], stage.machine.processes
        count = share_of_images(count, len(train), processes.world_size) * processes.world_size
        chosen = balanced_subset(train.targets, count, seed)
        # Class after class, as a folder has them, a batch would speak of one class alone.
        self._images = train.subset(np.random.default_rng(seed).permutation(chosen))
        self._stage = stage
        self.count = count

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(self._batches())

    def without_targets(self) -> Iterator[Tensor]:
        """Batches without their targets."""
        for images, _ in self._batches():
            yield images

    def _batches(self) -> EvalBatches:
        stage = self._stage
        processes = stage.machine.processes
        return eval_batches(
            self._images,
            stage.preprocessing,
            batch_size=stage.recipe.options.batch_size,
            num_workers=0,
            device=stage.machine.device,
            rank=processes.rank,
            world_size=processes.world_size,
        )


def compensated_on(stage: Stage, config: PruneConfig, pruner: Pruner, images: CalibrationImages) -> CalibrationImages | None:
    """What the cut is compensated on; None where it is not."""
    return images if compensates_cut(config, stage.model, pruner, stage.screen.say) else None


def compensates_cut(config: PruneConfig, model: VisionTransformer, pruner: Pruner, say: Callable[[str], object]) -> bool:
    """Whether what this pruner cuts is compensated.

    Args:
        config: settings.
        model: that is pruned.
        pruner: of the model.
        say: is told why not, where compensation would be due and does not cover the model.

    Raises:
        ModelError: compensation is asked for, and does not cover the model.
    """
    asked = config.prune.compensate
    if asked == "off" or (asked == "auto" and not config.one_shot):
        return False
    try:
        require_compensable(model, pruner.layout)
    except ModelError as error:
        if asked == "on":
            raise
        say(f"nothing is compensated: {error}")
        return False
    return True


def calibrate(stage: Stage, pruner: Pruner, images: CalibrationImages, *, order: bool) -> None:
    """Measure what the cut is decided by, and say how long it took."""
    began = time.monotonic()
    pruner.calibrate(images, cross_entropy, order=order)  # images and labels as they are: neither mixed nor smoothed
    seconds = time.monotonic() - began
    stage.screen.say(f"measured on {images.count:,} training images in {seconds:.1f} s; the model computes what it did before")
