"""The lines of a series: what a finished run says of its model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def finished(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Lines of the runs that are not run again, by name."""
    return {line["name"]: line for line in lines if line["kind"] == "run" and line["status"] == "done"}


def results(summary: Mapping[str, Any], stage: Path) -> dict[str, Any]:
    """What a finished run says of its model, from its summary and its epochs."""
    figures = summary["pruned" if summary["stage"] == "prune" else "model"]
    part = "test" if "test" in summary["accuracy"] else "val"
    accuracy, provenance = summary["accuracy"][part], summary["provenance"]
    epochs = [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]
    return {
        "part": part,
        "images": accuracy["images"],
        "top1": accuracy["top1"],
        "top5": accuracy["top5"],
        "accuracy": summary["accuracy"],
        "params": figures["params"],
        "macs": figures["macs"],
        "epochs": len(epochs),
        "train_seconds": sum(epoch["train_seconds"] for epoch in epochs),
        "data": provenance["data"],
        "device": provenance["device"],
        "processes": provenance["processes"],
        "precision": provenance["precision"],
        "versions": provenance["versions"],
    }
