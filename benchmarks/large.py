"""What memory does pruning take beside plain training of ViT-L, H and g? On paper: the cost model, nothing measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import cost_model as cost
from harness.pages import table

MODELS: Mapping[str, tuple[int, int, int, int, int]] = {
    "ViT-L/16": (24, 1024, 16, 14, 16),
    "ViT-H/14": (32, 1280, 16, 16, 14),
    "ViT-g/14": (40, 1408, 16, 16, 14),
}
"""(depth, width, heads, patches along a side, pixels of a patch) at 224 pixels; MLPs of four times the width."""
CLASSES, PER_GPU = 1_000, (16, 64)
DEFAULT = "low_rank"
BUDGET = 0.10
"""What pruning may take beside a plain step."""


def sizes() -> list[tuple[str, cost.Size]]:
    """Every model, with so many images of a GPU, under bf16 (autocast) and in float32."""
    return [
        (name, cost.Size(*shape, CLASSES, images, feature_bytes=bytes_))
        for name, shape in MODELS.items()
        for images in PER_GPU
        for bytes_ in (2, cost.FLOAT)
    ]


def added(estimator: str | None, size: cost.Size) -> float:
    """What pruning takes, as a share of a plain step."""
    probes = cost.memory_probes(estimator, size).total if estimator else 0
    return (cost.memory_gates(size) + probes) / cost.memory_plain(size)


def fewest_images(estimator: str, size: cost.Size) -> int:
    """From how many images of a batch on pruning takes no more than `BUDGET`."""
    shape = (size.depth, size.width, size.heads, size.grid, size.patch, size.classes)
    fits = (n for n in range(1, 1025) if added(estimator, cost.Size(*shape, n, feature_bytes=size.feature_bytes)) <= BUDGET)
    return next(fits)


def tables() -> list[str]:
    """The part of docs/scaling.md on large models."""
    head = [
        "model",
        "precision",
        "images of a GPU",
        "weights, gradients, AdamW",
        "kept for the backward pass",
        "moving average",
    ]
    head += ["gates, scores", "probes, `low_rank`", "probes, `linear`", "more by `low_rank`", "more by `linear`"]
    head += [f"{BUDGET:.0%} or less from, images"]
    return [
        f"### ViT-L, H and g, on paper ({CLASSES:,} classes)",
        "",
        *table(head, [_row(name, size) for name, size in sizes()], text=2),
    ]


def _row(name: str, size: cost.Size) -> list[str]:
    states = size.parameters * cost.TRAINED
    return [
        f"{name} ({size.parameters / 1e9:.2f} billion)",
        "bf16" if size.feature_bytes == 2 else "fp32",
        str(size.batch),
        _gigabytes(states),
        _gigabytes(cost.memory_plain(size) - states),
        _gigabytes(size.parameters * cost.FLOAT),
        # A mask, a sum of scores and a score of each element.
        _gigabytes(cost.memory_gates(size) + 2 * size.elements * cost.FLOAT),
        *(_gigabytes(cost.memory_probes(estimator, size).total) for estimator in (DEFAULT, "linear")),
        *(f"{added(estimator, size):+.1%}" for estimator in (DEFAULT, "linear")),
        _both([fewest_images(estimator, size) for estimator in (DEFAULT, "linear")]),
    ]


def _both(counts: Sequence[int]) -> str:
    return " / ".join(map(str, counts))


def _gigabytes(count: float) -> str:
    return f"{count / 1e9:.2f} GB"
