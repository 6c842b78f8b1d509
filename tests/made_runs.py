"""Folders of runs and lines of a comparison, written by hand, that pages are made from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image

CLASSES = ["bird", "cat", "<dog>"]


def epoch(number: int, phase: str, top1: float, **more: Any) -> dict[str, Any]:
    return {
        "epoch": number, "step": 100 * number, "phase": phase, "train_loss": 2.0 / number, "val_top1": top1, "val_top5": 100.0,
        "val_loss": 1.0 / number, "kept_params": 1000 - 100 * number, "lr": 1e-3, "skipped_steps": 0, "train_seconds": 3.0,
        "seconds": 4.0, **more,
    }  # fmt: skip


def update(at: float, kept: int, benefit: float = 0.1) -> dict[str, Any]:
    blocks = [
        {
            "name": f"blocks.{depth}.{kind}", "kind": kind, "benefit_cls": benefit, "benefit_patch": benefit, "importance": 1.0,
            "keep_ratio_goal": 0.5, "keep_ratio": kept / 100, "kept_params": kept if kind == "attn" else 50, "params": 100,
        }
        for depth in range(2) for kind in ("attn", "mlp")
    ]  # fmt: skip
    return {"epoch": at, "step": int(100 * at), "phase": "sparsify", "progress": 0.5, "tau": 0.1, "blocks": blocks}


EPOCHS = [
    epoch(1, "warm-up", 60), epoch(2, "sparsify", 70), epoch(3, "sparsify", 40), epoch(4, "fine-tune", 65),
    epoch(5, "fine-tune", 66), epoch(6, "fine-tune", 68),
]  # fmt: skip
FIGURES = {"params": 500, "macs": 5000, "bytes": 2000, "top1": 66.67, "top5": 100.0, "images_per_second": 300.0}
SUMMARY = {
    "stage": "prune",
    "dense": {**FIGURES, "params": 1000, "top1": 83.33, "images_per_second": 200.0},
    "pruned": FIGURES,
    "accuracy": {"val": {}, "test": {}},
    "provenance": {"versions": {"torch": "2.14"}},
}


def make_run(folder: Path, *, finished: bool = True, **config: Any) -> Path:
    """A finished pruning run with a dense one beside it, written by hand."""
    stage = folder / "prune"
    (stage / "examples").mkdir(parents=True)
    settings = {
        "model": {"model": "vit", "model_path": "weights.pth"},
        "resolved": {"steps_per_epoch": 100, "class_names": CLASSES, "classes": 3},
    }
    (stage / "config.json").write_text(json.dumps({**settings, **config}))
    (stage / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in EPOCHS))
    updates = [update(1.5, 100), update(2.0, 90), update(2.5, 60), update(3.0, 0)]
    (stage / "blocks.jsonl").write_text("".join(json.dumps(line) + "\n" for line in updates))
    if finished:
        (stage / "summary.json").write_text(json.dumps(SUMMARY))
        rows = [
            (0, 0, 0, 0.9, 0),
            (1, 0, 1, 0.4, 0),
            (2, 1, 1, 0.8, 1),
            (3, 1, 1, 0.7, 0),
            (4, 2, 0, 0.6, 2),
            (5, 2, 0, 0.55, 2),
        ]
        lines = [["part", "index", "target", "predicted", "probability", "dense_predicted"], *(["test", *row] for row in rows)]
        (stage / "predictions.csv").write_text("".join(",".join(map(str, line)) + "\n" for line in lines))
        Image.new("RGB", (8, 8), "red").save(stage / "examples" / "4.png")
    return folder


def compare_lines() -> list[dict[str, Any]]:
    """Lines of a comparison of three methods at two budgets, with speeds: every column that a table can have."""
    lines: list[dict[str, Any]] = []
    for row, ratio, top1 in (
        ("dense", None, 90.0), ("smaller", 0.5, 80.0), ("block_benefit", 0.5, 88.0), ("uniform", 0.5, 86.5),
        ("smaller", 0.75, 71.0), ("block_benefit", 0.75, 84.0), ("uniform", 0.75, 80.5),
    ):  # fmt: skip
        name, params = f"{row}-{ratio}-seed0", round(2_395_014 * (1 - (ratio or 0)))
        lines.append(
            {
                "kind": "run", "name": name, "row": row, "ratio": ratio, "seed": 0, "command": f"p3b prune {'x' * 300}",
                "status": "done", "part": "test", "images": 6000, "classes": 100, "top1": top1, "top5": 99.0, "params": params,
                "macs": 150 * params, "train_seconds": 600.0, "device": "cpu", "processes": 1, "precision": "float32",
                "versions": {"torch": "2.14"}, "commit": "0" * 40, "date": "2026-01-01", "network": "vit_tiny_patch16_224",
                "data": "FOLDER from photos: train 1,080 images of 6 classes, val 120 images of 6 classes, test 6,000 images",
            }
        )  # fmt: skip
    speeds = {line["name"]: 400.0 - 20 * number for number, line in enumerate(reversed(lines))}
    for size in (1, 32):
        lines.append(
            {
                "kind": "speed", "batch_size": size, "images_per_second": speeds, "device": "cpu", "precision": "float32",
                "threads": 2,
            }
        )  # fmt: skip
    return lines
