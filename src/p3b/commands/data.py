"""`p3b data`: what is in a folder of images, before anything is trained."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Console

from p3b.data import DataSplits
from p3b.data.survey import Survey, survey, survey_lines
from p3b.run.inputs import open_splits
from p3b.run.options import DataConfig
from p3b.train.distributed import Processes


def show_data(config: DataConfig) -> list[str]:
    """Print what was found; returns the lines.

    Raises:
        DataError: a data set that cannot be used, as a run would refuse it.
    """
    lines = data_lines(open_splits(config.data, config.seed, Processes()), config.look_at)
    console = Console(highlight=False)
    for line in lines:
        console.print(line, markup=False, soft_wrap=True)
    return lines


def data_lines(splits: DataSplits, look_at: int) -> list[str]:
    """Parts, classes, and what so many images of each part are like."""
    return [splits.description, *splits.notes, *balance_line(splits), *survey_lines(surveys(splits, look_at))]


def surveys(splits: DataSplits, look_at: int) -> Mapping[str, Survey]:
    """A look at each part that is there."""
    parts = {"train": splits.train, "val": splits.val, "test": splits.test}
    return {name: survey(images, look_at) for name, images in parts.items() if images is not None and len(images)}


def balance_line(splits: DataSplits) -> list[str]:
    """A line where one class has much more training images than another."""
    counts = [int((splits.train.targets == number).sum()) for number in range(len(splits.class_names))]
    few, many = min(counts), max(counts)
    if many < 3 * max(few, 1):
        return []
    names = splits.class_names
    return [
        f"imbalanced: {names[counts.index(many)]} has {many:,} training images, {names[counts.index(few)]} {few:,}; what is "
        "rare is learnt less, and the mean over images hides it"
    ]
