"""What a model says of every evaluated image, for the report: predictions.csv, and small copies of its mistakes."""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from p3b.report.record import EXAMPLES_FOLDER, PREDICTIONS_FILE, read_run
from p3b.storage.files import write_atomically
from p3b.train.evaluate import Answers

MOST_EXAMPLES, EXAMPLE_SIDE = 24, 96
"""Images that are copied, and the longer side of a copy in pixels."""


def write_predictions(folder: Path, part: str, answers: Answers, images: Any, dense_run: Path | None) -> None:
    """Write predictions.csv and the examples into the folder of a stage.

    Args:
        folder: of the stage.
        part: "val" or "test".
        answers: for all images of the part, in their order.
        images: data set of the part: (image, target) by index.
        dense_run: output folder of a dense run; its predictions stand beside these if they are of the same images.
    """
    dense = _dense_predictions(dense_run, part, answers.target)
    head = ["part", "index", "target", "predicted", "probability", "dense_predicted"]
    columns = zip(answers.target, answers.predicted, answers.probability, dense, strict=True)
    rows = [[part, index, *row[:2], f"{row[2]:.6f}", row[3]] for index, row in enumerate(columns)]

    def write(path: Path) -> None:
        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([head, *rows])

    write_atomically(folder / PREDICTIONS_FILE, write)
    _write_examples(folder / EXAMPLES_FOLDER, _to_show(answers), images)


def _dense_predictions(dense_run: Path | None, part: str, targets: Sequence[int]) -> Sequence[Any]:
    """Class indices by the dense model, or empty texts where there are none of these images."""
    found = None if dense_run is None else next(iter(read_run(dense_run))).predictions
    if found is None or found.part != part or list(found.target) != list(targets):
        return [""] * len(targets)
    return found.predicted


def _to_show(answers: Answers) -> list[int]:
    """Indices of mistakes, from every class in turn, the surest first."""
    by_class: dict[int, list[int]] = defaultdict(list)
    for index in sorted(range(len(answers.target)), key=lambda place: -answers.probability[place]):
        if answers.target[index] != answers.predicted[index]:
            by_class[answers.target[index]].append(index)
    turns = [[wrong[turn] for wrong in by_class.values() if turn < len(wrong)] for turn in range(MOST_EXAMPLES)]
    return [index for turn in turns for index in turn][:MOST_EXAMPLES]


def _write_examples(folder: Path, indices: Sequence[int], images: Any) -> None:
    folder.mkdir(exist_ok=True)
    for old in folder.glob("*.png"):
        old.unlink()
    for index in indices:
        image = images[index][0].convert("RGB")
        image.thumbnail((EXAMPLE_SIDE, EXAMPLE_SIDE))
        write_atomically(folder / f"{index}.png", lambda path, image=image: image.save(path, format="PNG"))  # type: ignore[misc]
