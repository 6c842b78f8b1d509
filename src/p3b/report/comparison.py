"""The table of a comparison or a sweep, made from its lines alone: numbers, cells and notes (`comparison_page` shows them).

A line is a run that has come to an end (`"kind": "run"`), a measurement of speed (`"kind": "speed"`) or what a search came to
(`"kind": "answer"`), see docs/compare.md and docs/sweep.md. The last line of a run, and of a batch size, counts.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from p3b.errors import RunFolderError
from p3b.report.thresholds import FEWEST_FOR_TOP5


@dataclass(frozen=True)
class Spread:
    """Mean over seeds and how far single ones are from it.

    Attributes:
        mean: over seeds.
        deviation: standard deviation over seeds (n - 1); with one seed the standard error of a proportion, in points.
    """

    mean: float
    deviation: float


@dataclass(frozen=True)
class Row:
    """A line of the table: one row of the comparison at one prune ratio, over its seeds.

    Attributes:
        name: "dense", "smaller" or a method's name.
        ratio: share of parameters that was to go; None for dense.
        seeds: that are done.
        top1, top5: percent.
        params, macs, train_seconds: means over seeds.
        speeds: mean images per second by batch size, where measured.
    """

    name: str
    ratio: float | None
    seeds: tuple[int, ...]
    top1: Spread
    top5: Spread
    params: float
    macs: float
    train_seconds: float
    speeds: Mapping[int, float]


@dataclass(frozen=True)
class Comparison:
    """What the lines of a comparison say: its rows in the order of the table, runs that failed, and the lines that count."""

    rows: tuple[Row, ...]
    failed: tuple[Mapping[str, Any], ...]
    runs: tuple[Mapping[str, Any], ...]
    speeds: tuple[Mapping[str, Any], ...]


def read_lines(folder: Path, name: str = "compare") -> list[dict[str, Any]]:
    """The lines of a comparison, or of a sweep, in `<folder>/<name>.jsonl`; none where there is no file.

    Raises:
        RunFolderError: the file is damaged; the message names the line.
    """
    file = folder / f"{name}.jsonl"
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise RunFolderError(f"{file} cannot be read: {error}") from error
    lines = []
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            content = json.loads(line)
            if content["kind"] not in ("run", "speed", "answer"):
                raise ValueError(f"it is of the kind {content['kind']!r}")
        except (ValueError, TypeError, KeyError) as error:
            raise RunFolderError(
                f"Line {number} of {file} is not of a comparison ({error}). Remove it; the run that it stands for is not done "
                "again if its folder is still there."
            ) from error
        lines.append(content)
    return lines


def summarise(lines: Sequence[Mapping[str, Any]]) -> Comparison:
    """The table's numbers from the lines; the last line of a run wins, and the last of a batch size."""
    latest = {line["name"]: line for line in lines if line["kind"] == "run"}
    runs = tuple(line for line in latest.values() if line["status"] == "done")
    speeds = {line["batch_size"]: line for line in lines if line["kind"] == "speed"}
    groups: dict[tuple[str, float | None], list[Mapping[str, Any]]] = {}
    for line in runs:
        groups.setdefault((line["row"], line["ratio"]), []).append(line)
    # Dense first, then ratio by ratio in the order in which their rows were run.
    rows = [_row(name, ratio, group, speeds) for (name, ratio), group in groups.items()]
    rows.sort(key=lambda row: -1.0 if row.ratio is None else row.ratio)
    failed = tuple(line for line in latest.values() if line["status"] != "done")
    return Comparison(tuple(rows), failed, runs, tuple(speeds.values()))


def table(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Head and cells of the table."""
    sizes = sorted({size for row in comparison.rows for size in row.speeds})
    top5 = not 0 < max((line.get("classes") or 0 for line in comparison.runs), default=0) < FEWEST_FOR_TOP5
    accuracies = ["top-1 (%)", "top-5 (%)"] if top5 else ["top-1 (%)"]
    head = ["model", "goes", "seeds", *accuracies, "parameters", "of dense", "MACs (M)", "of dense"]
    head += [f"images/s, batch {size}" for size in sizes] + ["training (min)"]
    dense = next((row for row in comparison.rows if row.name == "dense"), None)
    cells = []
    for row in comparison.rows:
        cells.append(
            [
                row.name,
                "-" if row.ratio is None else f"{100 * row.ratio:g} %",
                ", ".join(map(str, row.seeds)),
                f"{row.top1.mean:.2f} ± {row.top1.deviation:.2f}",
                *([f"{row.top5.mean:.2f} ± {row.top5.deviation:.2f}"] if top5 else []),
                f"{row.params:,.0f}",
                _share(row.params, None if dense is None else dense.params),
                f"{row.macs / 1e6:,.1f}",
                _share(row.macs, None if dense is None else dense.macs),
                *(_speed(row.speeds.get(size), None if dense is None else dense.speeds.get(size)) for size in sizes),
                f"{row.train_seconds / 60:,.1f}",
            ]
        )
    return head, cells


def subject(comparison: Comparison) -> str:
    """Model and data that are compared, as far as the lines say."""
    dense = next((row for row in comparison.rows if row.name == "dense"), None)
    models = dict.fromkeys(line["network"] for line in comparison.runs if line.get("network"))
    size = f" ({dense.params:,.0f} parameters)" if dense is not None and len(models) == 1 else ""
    data = dict.fromkeys(line["data"] for line in comparison.runs if line.get("data"))
    return "; ".join(filter(None, [" and ".join(models) + size, *data]))


def notes(comparison: Comparison) -> list[str]:
    """What must be said beside the table."""
    said = []
    tested = sorted({(line["part"], line["images"]) for line in comparison.runs})
    if tested:
        said.append(f"Accuracy on {' and '.join(f'{images:,} {part} images' for part, images in tested)}.")
    if any(len(row.seeds) > 1 for row in comparison.rows):
        said.append("± is the standard deviation over the seeds (n - 1).")
    if any(len(row.seeds) == 1 for row in comparison.rows):
        said.append(
            "Where there is one seed only, ± is the standard error of a proportion of so many images; the spread over seeds, "
            "which may be larger, is not in it."
        )
    if any(row.name == "smaller" for row in comparison.rows):
        said.append(
            "smaller: a ViT of the same depth and head width with as many parameters, trained for as many epochs from evenly "
            "spaced channels of the same weights."
        )
    for line in comparison.speeds:
        said.append(
            f"Images per second at batch {line['batch_size']}: all models in one go, taking turns, on {line['device']}, "
            f"{line['precision']}, {line['threads']} threads."
        )
    if any(len({line[key] for line in comparison.runs}) > 1 for key in ("device", "processes", "precision")):
        said.append("The runs were not all made on the same hardware: their training times do not compare.")
    return said


def _row(name: str, ratio: float | None, group: Sequence[Mapping[str, Any]], speeds: Mapping[int, Mapping[str, Any]]) -> Row:
    def mean(key: str) -> float:
        return statistics.fmean(line[key] for line in group)

    measured = {
        size: [line["images_per_second"][run["name"]] for run in group if run["name"] in line["images_per_second"]]
        for size, line in speeds.items()
    }
    return Row(
        name=name,
        ratio=ratio,
        seeds=tuple(sorted(line["seed"] for line in group)),
        top1=_spread(group, "top1"),
        top5=_spread(group, "top5"),
        params=mean("params"),
        macs=mean("macs"),
        train_seconds=mean("train_seconds"),
        speeds={size: statistics.fmean(values) for size, values in measured.items() if values},
    )


def _spread(group: Sequence[Mapping[str, Any]], key: str) -> Spread:
    values = [line[key] for line in group]
    if len(values) > 1:
        return Spread(statistics.fmean(values), statistics.stdev(values))
    share = values[0] / 100
    return Spread(values[0], 100 * math.sqrt(share * (1 - share) / group[0]["images"]))


def _share(value: float, dense: float | None) -> str:
    return "-" if dense is None else f"{value / dense:.1%}"


def _speed(value: float | None, dense: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" + ("" if dense is None else f" (x {value / dense:.2f})")
