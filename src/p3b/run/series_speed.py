"""Images per second of the models of a series, measured side by side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from p3b.deploy.speed import images_per_second
from p3b.report.comparison import Comparison
from p3b.run.products import PRODUCTS
from p3b.run.provenance import circumstances, device_name, versions
from p3b.run.series_plan import is_pruned
from p3b.storage import artifact
from p3b.vit.families import images_of

SPEED_BATCHES = (1, 32)
"""Batch sizes that models are timed with."""
SECONDS_OF_SPEED = 3.0
"""That each model is measured for, about, at each batch size."""


def due_batch_sizes(comparison: Comparison) -> list[int]:
    """Batch sizes at which some model that is done has not been timed together with all others."""
    names = {run["name"] for run in comparison.runs}
    known = {line["batch_size"]: set(line["images_per_second"]) for line in comparison.speeds}
    return [size for size in SPEED_BATCHES if names and known.get(size) != names]


def speed_lines(
    runs: Sequence[Mapping[str, Any]], batch_sizes: Sequence[int], folder: Path, device: torch.device, most_seconds: float
) -> Iterator[dict[str, Any]]:
    """Time the models of finished runs, which take turns.

    Args:
        runs: their lines.
        batch_sizes: to time with.
        folder: that holds the output folder of each run, under its name.
        device: to time on.
        most_seconds: that the rounds of a batch size may take.

    Yields:
        A line for each batch size.
    """
    saved = [Path(run.get("model") or folder / run["name"] / _product(run["row"])) for run in runs]
    models = [artifact.load(path, device) for path in saved]
    image_shape = images_of(models[0]).shape
    seconds = min(SECONDS_OF_SPEED * len(models), most_seconds)
    for batch_size in batch_sizes:
        speeds = images_per_second(models, image_shape, batch_size=batch_size, device=device, seconds=seconds)
        yield {
            "kind": "speed",
            "batch_size": batch_size,
            "images_per_second": {run["name"]: speed for run, speed in zip(runs, speeds, strict=True)},
            "device": device_name(device),
            "precision": "float32",
            "threads": torch.get_num_threads(),
            "versions": versions(),
            **circumstances(),
        }


def _product(row: str) -> str:
    return PRODUCTS["prune" if is_pruned(row) else "train"]
