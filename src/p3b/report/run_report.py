"""`report.html` of a run, or of several side by side: one file, made from the run folders alone.

It opens with the answer in a sentence and a table; figures, diagnosis and settings follow. Nothing is loaded from elsewhere.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from p3b.errors import RunFolderError
from p3b.report.charts import draw_all, watched_part
from p3b.report.diagnosis import Finding, diagnose
from p3b.report.evaluation import class_accuracies
from p3b.report.figures import whole_file
from p3b.report.record import EXAMPLES_FOLDER, StageRecord, read_run
from p3b.report.svg import Picture
from p3b.report.templates import template
from p3b.report.thresholds import FEWEST_FOR_TOP5

MOST_EXAMPLES = 24
REPORT_FILE = "report.html"
_ROWS = {
    "params": ("parameters", "{:,.0f}"),
    "macs": ("MACs", "{:,.0f}"),
    "bytes": ("size on disk (bytes)", "{:,.0f}"),
    "top1": ("top-1 (%)", "{:.2f}"),
    "top5": ("top-5 (%)", "{:.2f}"),
    "images_per_second": ("images per second", "{:,.0f}"),
}
"""What is told of each figure of a model's summary: its label and its format."""
_RATIOS = {"params", "macs", "bytes", "images_per_second"}


@dataclass(frozen=True)
class Example:
    """An image that the model gets wrong.

    Attributes:
        source: the image as a data URI.
        target: its class.
        predicted: what it is taken for.
    """

    source: str
    target: str
    predicted: str


@dataclass(frozen=True)
class Section:
    """What the page says of one stage."""

    heading: str
    answer: str
    table: Sequence[Sequence[str]]
    table_note: str
    pictures: Sequence[Picture]
    findings: Sequence[Finding]
    examples: Sequence[Example]
    settings: Sequence[tuple[str, str]]
    provenance: Sequence[tuple[str, str]]


def write_run_report(runs: Sequence[Path], out: Path, *, reload_seconds: int | None = None) -> Path:
    """Write the page of one run or of several.

    Args:
        runs: output folders.
        out: the HTML file.
        reload_seconds: the page loads itself again after so long (while a run trains).

    Raises:
        RunFolderError: a folder holds no run, a file is damaged, or the page cannot be written.
    """
    sections = [_section(run, stage) for run in runs for stage in read_run(run)]
    title = " and ".join(run.name or str(run) for run in runs)
    page = template("run.html.j2").render(title=f"P3B: {title}", sections=sections, reload=reload_seconds)
    return _write(out, page)


def answer(stage: StageRecord) -> str:
    """The result in one sentence."""
    if stage.summary is None:
        if not stage.epochs:
            return "The run has not finished an epoch yet."
        last = stage.epochs[-1]
        part = watched_part(stage)
        return (
            f"The run is in the phase {last['phase']}, after {last['epoch']} epochs: {last[f'{part}_top1']:.2f} % top-1 "
            f"({part}) with {last['kept_params']:,} parameters."
        )
    if stage.name != "prune":
        figures = stage.summary["model"]
        return f"{figures['params']:,} parameters, {figures['top1']:.2f} % top-1 ({_part(stage)})."
    dense, pruned = stage.summary["dense"], stage.summary["pruned"]
    gone = 1 - pruned["params"] / dense["params"]
    accuracy = f"{pruned['top1']:.2f} % top-1 ({_part(stage)})"
    if dense["top1"] is not None:
        change = pruned["top1"] - dense["top1"]
        accuracy = f"{abs(change):.2f} points {'more' if change > 0 else 'less'} top-1 ({_part(stage)}: {pruned['top1']:.2f} %)"
    speed = pruned["images_per_second"] / dense["images_per_second"]
    size = f"{gone:.0%} smaller ({pruned['params']:,} parameters)"
    return f"The network is {size} and runs {speed:.2f} times as fast, with {accuracy}."


def _section(run: Path, stage: StageRecord) -> Section:
    summary = stage.summary or {}
    return Section(
        f"{run.name}: {stage.name}",
        answer(stage),
        _table(stage),
        f"Accuracy on the {_part(stage)} part." if summary else "",
        draw_all(stage),
        diagnose(stage),
        _examples(stage),
        list(_flat(stage.config)),
        list(_flat(summary.get("provenance", {}))),
    )


def _part(stage: StageRecord) -> str:
    accuracy: Mapping[str, Any] = (stage.summary or {}).get("accuracy", {})
    return "test" if "test" in accuracy else "validation"


def _table(stage: StageRecord) -> list[list[str]]:
    """Head and rows: dense against pruned, or the model alone."""
    if stage.summary is None:
        return []
    columns = {name: stage.summary[name] for name in ("dense", "pruned", "model") if name in stage.summary}
    both = len(columns) == 2
    rows = [["", *columns, *(["ratio"] if both else [])]]
    for key, (label, form) in _ROWS.items():
        if key == "top5" and len(stage.class_names) < FEWEST_FOR_TOP5:
            continue
        values = [figures.get(key) for figures in columns.values()]
        row = [label, *("" if value is None else form.format(value) for value in values)]
        if both:
            known = key in _RATIOS and None not in values
            row.append(f"x {values[1] / values[0]:.2f}" if known else "")
        rows.append(row)
    return rows


def _examples(stage: StageRecord) -> list[Example]:
    """Kept images that are taken for another class, those of the classes that lost most first."""
    found, folder = stage.predictions, stage.folder / EXAMPLES_FOLDER
    if found is None or not folder.is_dir():
        return []
    order = {entry.name: place for place, entry in enumerate(class_accuracies(stage))}
    names, wrong = stage.class_names, []
    for index, target, predicted in zip(found.index, found.target, found.predicted, strict=True):
        file = folder / f"{index}.png"
        if target != predicted and file.is_file():
            source = "data:image/png;base64," + b64encode(file.read_bytes()).decode()
            wrong.append(Example(source, names[target], names[predicted]))
    return sorted(wrong, key=lambda example: order[example.target])[:MOST_EXAMPLES]


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Sequence[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    for key, value in settings.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            found += _flat(value, f"{name}.")
        else:
            found.append((name, str(value)))
    return found


def _write(out: Path, page: str) -> Path:
    """Replace the file as a whole or not at all."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(out) as file:
            file.write(page.encode())
    except OSError as error:
        raise RunFolderError(f"Cannot write the report {out}: {error}. Choose another --out.") from error
    return out
