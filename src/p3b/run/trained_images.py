"""The images that a saved model was trained on: remembered when it is saved, told apart when it is evaluated or trained on.

A model's provenance holds a sketch of the training images by their bytes, and the rule by which they were cut from the data
set (`p3b.data.train_record`). An accuracy over images that a model was trained on is not one over images that it has never
seen: the former are left out where that can be done exactly, and counted where it cannot.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from p3b.data import DataSplits, LabelledImages, TrainRecord, record_training, seen_in_training
from p3b.data.train_record import Seen
from p3b.errors import DataError
from p3b.storage import artifact
from p3b.storage.model_config import TRAINING_IMAGES

ALL, UNSEEN = "all", "unseen"
"""Parts of a folder that has none: all its images, or those that the model was not trained on."""


@dataclass(frozen=True)
class TrainedOn:
    """What a saved model says of its training images: the sketch, and the rule that cut them from their data set."""

    record: TrainRecord
    rule: Mapping[str, Any]


@dataclass(frozen=True)
class Parts:
    """Images to evaluate by part, and what must be said of them."""

    images: dict[str, LabelledImages]
    said: tuple[str, ...]


def remember(splits: DataSplits) -> dict[str, Any]:
    """The entry for a saved model's provenance; empty where the images have no bytes to know them by."""
    record = record_training(splits.train)
    return {} if record is None else {TRAINING_IMAGES: {**record.to_dict(), "rule": splits.rule}}


def trained_on(path: Path | None) -> TrainedOn | None:
    """What the model saved at a path says of its training images; None where it says nothing, or is none of ours.

    Raises:
        WeightsError: the saved model is damaged. DataError: the entry is.
    """
    if path is None or not artifact.is_artifact(path):
        return None
    entry = (artifact.read_config(path)["provenance"] or {}).get(TRAINING_IMAGES)
    if not isinstance(entry, dict):
        return None
    return TrainedOn(TrainRecord.from_dict(entry), _checked(entry.get("rule"), path))


def _checked(rule: Any, path: Path) -> Mapping[str, Any]:
    """A rule as `DataSplits` has it; a saved model may come from anywhere."""
    kinds: dict[str, Any] = {"data_set": str, "val_share": float | int | None, "seed": int, "max_train_images": int | None}
    if isinstance(rule, dict) and all(isinstance(rule.get(key), kind) for key, kind in kinds.items()):
        return rule
    raise DataError(f"{path} says of its training images that they were cut by {str(rule)[:200]}, which is no rule of p3b.")


def parts_to_evaluate(
    splits: DataSplits, known: TrainedOn | None, cut: Callable[[Mapping[str, Any]], DataSplits | None]
) -> Parts:
    """The parts of a data set to evaluate a saved model on.

    Args:
        splits: that were opened for evaluation.
        known: of the model's training images.
        cut: opens the same data once more, cut by a rule as the model's training did; None where it cannot be.
    """
    named = {name: images for name, images in (("val", splits.val), ("test", splits.test)) if images is not None}
    if named:
        said = [line for name, images in named.items() if (line := said_of_part(name, images, known)) is not None]
        return Parts(named, tuple(said))
    images = splits.train
    seen = None if known is None else seen_in_training(known.record, images)
    if known is None or seen is None or not len(seen.trained_on):
        return Parts({ALL: images}, ())
    return _kept_back(known, cut, len(images)) or _unseen(known, images, seen) or _all_of(known, images, seen)


def said_of_part(name: str, images: LabelledImages, known: TrainedOn | None) -> str | None:
    """A sentence where a part holds images that the model was trained on."""
    seen = None if known is None else seen_in_training(known.record, images)
    if known is None or seen is None or not len(seen.trained_on):
        return None
    return (
        f"{_how_many(known.record, seen, len(images))} of {name} were trained on by this model: its accuracy there is partly "
        "that of images that it has seen"
    )


def _kept_back(known: TrainedOn, cut: Callable[[Mapping[str, Any]], DataSplits | None], total: int) -> Parts | None:
    """The validation part that was cut off when the model was trained, where the same cut gives the same images."""
    again = cut(known.rule) if known.rule["val_share"] else None
    if again is None or again.val is None or len(again.train) != known.record.images:
        return None
    train, val = seen_in_training(known.record, again.train), seen_in_training(known.record, again.val)
    if train is None or val is None or len(val.trained_on) or len(train.trained_on) < len(train.looked_at):
        return None
    said = (
        f"{len(again.train):,} of these {total:,} images were trained on by this model: evaluated are the {len(again.val):,} "
        f"that were kept back then for validation (--val-share {known.rule['val_share']:g}, seed {known.rule['seed']})"
    )
    return Parts({"val": again.val}, (said,))


def _unseen(known: TrainedOn, images: LabelledImages, seen: Seen) -> Parts | None:
    """The images that were not trained on, where each of them can be told."""
    rest = np.setdiff1d(np.arange(len(images)), seen.trained_on)
    if not known.record.complete or not len(rest):
        return None
    said = (
        f"{len(seen.trained_on):,} of these {len(images):,} images were trained on by this model: evaluated are the other "
        f"{len(rest):,}"
    )
    return Parts({UNSEEN: images.subset(rest)}, (said,))


def _all_of(known: TrainedOn, images: LabelledImages, seen: Seen) -> Parts:
    said = (
        f"{_how_many(known.record, seen, len(images))} were trained on by this model: this accuracy is that of images that it "
        "has seen, and says little of others. Give images that were kept back (--val-path or --test-path)"
    )
    return Parts({ALL: images}, (said,))


def _how_many(record: TrainRecord, seen: Seen, total: int) -> str:
    """So many of a part's images, exactly or by a sample."""
    if record.complete:
        return f"{len(seen.trained_on):,} of the {total:,} images"
    return f"about {seen.share or 0.0:.0%} of the {total:,} images (by a sample of {len(seen.looked_at):,})"
