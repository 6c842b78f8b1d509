"""The lines of a series: what a finished run says of its model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from p3b.run.final_table import reported_part
from p3b.run.guessing import said_of_guessing
from p3b.run.series_plan import DENSE


def finished(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Lines of the runs that are not run again, by name."""
    return {line["name"]: line for line in lines if line["kind"] == "run" and line["status"] == "done"}


def dense_guesses(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """A sentence for each dense model that has learned nothing: then it says little that pruned ones are as good."""
    said = []
    for line in finished(lines).values():
        by_chance = line.get("chance", {}).get(line["part"])
        guess = said_of_guessing("The dense model", line["part"], line["top1"], by_chance, line["images"])
        if line["row"] == DENSE and guess is not None:
            said.append(
                f"{guess} What pruned models lose against it says nothing: train it better first (pretrained weights, more "
                "--epochs, a larger --lr)."
            )
    return said


def results(summary: Mapping[str, Any], stage: Path) -> dict[str, Any]:
    """What a finished run says of its model, from its summary and its epochs."""
    figures = summary["pruned" if summary["stage"] == "prune" else "model"]
    part = reported_part(summary["accuracy"])
    accuracy, provenance = summary["accuracy"][part], summary["provenance"]
    metrics = stage / "metrics.jsonl"  # there is none where nothing was trained
    epochs = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
    return {
        "part": part,
        "images": accuracy["images"],
        "top1": accuracy["top1"],
        "top5": accuracy["top5"],
        "accuracy": summary["accuracy"],
        "chance": summary.get("chance", {}),
        "classes": summary.get("classes"),
        "params": figures["params"],
        "macs": figures["macs"],
        "epochs": len(epochs),
        **({"teacher": summary["distillation"]["digest"]} if "distillation" in summary else {}),
        "train_seconds": sum(epoch["train_seconds"] for epoch in epochs),
        **_processor_seconds(epochs),
        "data": provenance["data"],
        "network": provenance["model"],
        "device": provenance["device"],
        "processes": provenance["processes"],
        "precision": provenance["precision"],
        "versions": provenance["versions"],
    }


def _processor_seconds(epochs: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Processor seconds of the training without evaluation; nothing where a version that did not measure them trained."""
    if not all("processor_seconds" in epoch for epoch in epochs):
        return {}
    return {"processor_seconds": sum(epoch["processor_seconds"] for epoch in epochs)}
