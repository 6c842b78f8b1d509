"""What a run folder holds, read for the report: settings, epochs, mask updates, the summary and the predictions.

    <run>/<stage>/config.json, metrics.jsonl, summary.json        as every stage leaves them
                  blocks.jsonl                                    of a stage that prunes
                  predictions.csv                                 part, index, target, predicted, probability and, where a dense
                                                                  run was given, dense_predicted: one line an evaluated image
                  examples/<index>.png                            small copies of some of these images

Everything but config.json may be missing, since a report can be made while the run trains.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from p3b.errors import RunFolderError
from p3b.report.updates import Update, lines_so_far, read_updates

STAGES = ("train", "prune", "finetune")
"""Stages that a report is made of, in the order in which they are run."""
PREDICTIONS_FILE, EXAMPLES_FOLDER = "predictions.csv", "examples"


@dataclass(frozen=True)
class Predictions:
    """One entry for each evaluated image, in the order of the data set.

    Attributes:
        part: "test" or "val".
        index: place of the image in its part.
        target, predicted: class indices.
        probability: of the predicted class, in [0, 1].
        dense_predicted: the dense model's class indices; empty where there is no dense run.
    """

    part: str
    index: tuple[int, ...]
    target: tuple[int, ...]
    predicted: tuple[int, ...]
    probability: tuple[float, ...]
    dense_predicted: tuple[int, ...]


@dataclass(frozen=True)
class StageRecord:
    """One stage of a run.

    Attributes:
        folder: its folder, `<run>/<stage>`.
        name: "train", "prune" or "finetune".
        config: settings, with what they were resolved to.
        epochs: one mapping an epoch, in order.
        updates: mask updates; empty where nothing was pruned.
        summary: None until the stage has ended.
        predictions: None where none were written.
    """

    folder: Path
    name: str
    config: Mapping[str, Any]
    epochs: tuple[Mapping[str, Any], ...]
    updates: tuple[Update, ...]
    summary: Mapping[str, Any] | None
    predictions: Predictions | None

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, or their indices where the run did not record names."""
        resolved = self.config.get("resolved", {})
        return tuple(resolved.get("class_names") or map(str, range(int(resolved.get("classes", 0)))))


def read_run(run: Path) -> tuple[StageRecord, ...]:
    """All stages of a run that have begun, in the order of `STAGES`.

    Args:
        run: an output folder, or the folder of one stage.

    Raises:
        RunFolderError: it holds no run, or a file is damaged; the message names the file.
    """
    folders = [run / stage for stage in STAGES if (run / stage / "config.json").is_file()]
    if not folders and run.name in STAGES and (run / "config.json").is_file():
        folders = [run]
    if not folders:
        raise RunFolderError(
            f"{run} holds no run: expected the output folder of 'p3b train', 'prune' or 'finetune', with "
            f"{' or '.join(f'{stage}/config.json' for stage in STAGES)} in it."
        )
    return tuple(_read_stage(folder) for folder in folders)


def _read_stage(folder: Path) -> StageRecord:
    summary = folder / "summary.json"
    running = not summary.exists()
    return StageRecord(
        folder,
        folder.name,
        _read_json(folder / "config.json"),
        tuple(_read_lines(folder / "metrics.jsonl", running=running)),
        tuple(read_updates(folder, running=running)) if (folder / "blocks.jsonl").exists() else (),
        None if running else _read_json(summary),
        _read_predictions(folder / PREDICTIONS_FILE),
    )


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunFolderError(f"{file} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise RunFolderError(f"{file} is damaged: expected a JSON object.")
    return content


def _read_lines(file: Path, *, running: bool) -> list[dict[str, Any]]:
    if not file.exists():
        return []
    try:
        return [json.loads(line) for line in lines_so_far(file.read_text(encoding="utf-8"), running=running) if line.strip()]
    except (OSError, ValueError) as error:
        raise RunFolderError(f"{file} cannot be read: {error}. A line is damaged; remove it.") from error


def _read_predictions(file: Path) -> Predictions | None:
    if not file.exists():
        return None
    try:
        with file.open(newline="", encoding="utf-8") as lines:
            rows = list(csv.DictReader(lines))
        if not rows:
            return None
        has_dense = bool(rows[0].get("dense_predicted"))
        return Predictions(
            rows[0]["part"],
            tuple(int(row["index"]) for row in rows),
            tuple(int(row["target"]) for row in rows),
            tuple(int(row["predicted"]) for row in rows),
            tuple(float(row["probability"]) for row in rows),
            tuple(int(row["dense_predicted"]) for row in rows) if has_dense else (),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunFolderError(f"{file} is damaged ({error}). Remove it; the report is then made without it.") from error
