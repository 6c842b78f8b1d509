"""`p3b predict`: labels with probabilities as a table, JSON lines or CSV; what cannot be read is named at the end."""

from __future__ import annotations

import csv
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TextIO

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table

from p3b.deploy.choice import AUTO
from p3b.deploy.hub import local_copy
from p3b.deploy.layouts import check_layout
from p3b.deploy.prediction import STANDARD_INPUT, Prediction, Source, predict, sources
from p3b.deploy.runners import ONNX, open_runner
from p3b.errors import DataError, RunFolderError
from p3b.run.deploy_options import PredictConfig, check_predict
from p3b.storage.files import write_atomically
from p3b.train.distributed import process_group

MOST_NAMED = 20
"""Unreadable images that are named at the end; the others are counted (JSON lines and CSV have them all)."""


def predict_images(config: PredictConfig) -> list[Prediction]:
    """Write the answers; returns those of the images that cannot be read.

    Raises:
        UserError: settings, model or images that cannot be used; none of the images can be read.
    """
    check_predict(config)
    check_layout(config.layout, [AUTO])
    found = sources([*config.images, *_listed(config.files_from)], sys.stdin.buffer)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    model = local_copy(str(config.model))
    on_cpu = model.suffix == ONNX and config.device == "auto"
    with process_group("cpu" if on_cpu else config.device) as (_, device):
        runner = open_runner(model, layout=config.layout, device=device)
        answers = predict(
            runner,
            _with_progress(found),
            top=config.top,
            batch_size=config.batch_size,
            workers=config.workers or cores(),
            max_pixels=config.max_pixels,
        )
        unreadable: list[Prediction] = []
        write = partial(WRITERS[config.format], _collecting(answers, unreadable), config.top)
        if config.output is None:
            write(sys.stdout)
        else:
            _to_file(config.output, write)
    name_unreadable(unreadable, len(found))
    return unreadable


def name_unreadable(unreadable: Sequence[Prediction], count: int) -> None:
    """Say on standard error which images could not be read, and why.

    Raises:
        DataError: that is all of them.
    """
    if not unreadable:
        return
    lines = [f"  {each.file}: {each.error}" for each in unreadable[:MOST_NAMED]]
    if len(unreadable) > MOST_NAMED:
        lines.append(f"  ... and {len(unreadable) - MOST_NAMED} more")
    text = "\n".join([f"{len(unreadable)} of {count} image(s) cannot be read:", *lines])
    if len(unreadable) == count:
        raise DataError(text)
    print(text, file=sys.stderr)


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def _listed(file: str | None) -> list[str]:
    """Names in a text file, one a line."""
    if file is None:
        return []
    try:
        content = sys.stdin.buffer.read() if file == STANDARD_INPUT else Path(file).read_bytes()
    except OSError as error:
        raise DataError(f"--files-from {file} cannot be read ({error.strerror}).") from error
    return [os.fsdecode(line) for line in content.splitlines() if line.strip()]


def _with_progress(found: Sequence[Source]) -> Iterable[Source]:
    """The images, with a bar on standard error where that is a terminal."""
    console = Console(stderr=True)
    shown = console.is_terminal and len(found) > 1
    return track(found, "predicting", console=console, transient=True, disable=not shown)


def _collecting(answers: Iterable[Prediction], unreadable: list[Prediction]) -> Iterator[Prediction]:
    for answer in answers:
        if answer.error is not None:
            unreadable.append(answer)
        yield answer


def _to_file(file: Path, write: partial[None]) -> None:
    def written(path: Path) -> None:
        with path.open("w", encoding="utf-8", newline="") as opened:
            write(opened)

    try:
        write_atomically(file, written)
    except OSError as error:
        raise RunFolderError(f"Cannot write {file}: {error.strerror}. Choose another --output.") from error


def _write_table(answers: Iterable[Prediction], top: int, to: TextIO) -> None:
    table = Table("image", *(f"{place}." for place in range(1, top + 1)))
    for answer in answers:
        if answer.error is None:
            labels = [f"{escape(label.name)} {label.probability:.1%}" for label in answer.labels]
            table.add_row(escape(answer.file), *labels)
    if table.row_count:
        Console(file=to, highlight=False).print(table)


def _write_json_lines(answers: Iterable[Prediction], _top: int, to: TextIO) -> None:
    for answer in answers:
        if answer.error is not None:
            line: dict[str, object] = {"file": answer.file, "error": answer.error}
        else:
            labels = [{"label": each.name, "probability": round(each.probability, 6)} for each in answer.labels]
            line = {"file": answer.file, "labels": labels}
        print(json.dumps(line, ensure_ascii=False), file=to, flush=True)


def _write_csv(answers: Iterable[Prediction], top: int, to: TextIO) -> None:
    lines = csv.writer(to, lineterminator="\n")
    lines.writerow(["file", *(f"{kind}_{place}" for place in range(1, top + 1) for kind in ("label", "probability")), "error"])
    for answer in answers:
        cells = [cell for each in answer.labels for cell in (each.name, f"{each.probability:.6f}")]
        lines.writerow([answer.file, *cells, *[""] * (2 * top - len(cells)), answer.error or ""])


WRITERS = {"table": _write_table, "jsonl": _write_json_lines, "csv": _write_csv}
