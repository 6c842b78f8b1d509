"""`p3b runs`: the runs below a folder in one table, the newest last."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from p3b.errors import RunFolderError
from p3b.report.record import STAGES, StageRecord, read_run
from p3b.run.look_options import RunsConfig

_NOT_WALKED = {"checkpoints", "examples", "warm-ups"}


def runs(config: RunsConfig) -> list[list[str]]:
    """Print the table; returns its rows.

    Raises:
        RunFolderError: there is no folder, or no run in it.
    """
    if not config.folder.is_dir():
        raise RunFolderError(f"{config.folder} is no folder; expected one whose sub-folders hold runs.")
    stages = [(run, stage) for run in _find(config.folder) for stage in read_run(run)]
    if not stages:
        raise RunFolderError(f"{config.folder} holds no run: nothing in it was written by p3b train, prune or finetune.")
    stages.sort(key=lambda each: (each[1].folder / "config.json").stat().st_mtime)
    rows = [_row(config.folder, run, stage) for run, stage in stages]
    table = Table()
    for position, name in enumerate(("run", "stage", "method", "ratio", "epochs", "top-1 %", "params", "state")):
        table.add_column(name, justify="right" if position in (3, 4, 5, 6) else "left", no_wrap=position > 0)
    for row in rows:
        table.add_row(*row)
    Console(highlight=False).print(table)
    return rows


def _find(folder: Path) -> list[Path]:
    """Output folders with a stage in them, the folder itself first."""
    if any((folder / stage / "config.json").is_file() for stage in STAGES):
        return [folder]
    below = sorted(path for path in folder.iterdir() if path.is_dir() and not path.is_symlink())
    return [run for path in below if path.name not in _NOT_WALKED and path.name[0] != "." for run in _find(path)]


def _row(folder: Path, run: Path, stage: StageRecord) -> list[str]:
    pruning: dict[str, Any] = stage.config.get("prune", {})
    summary = stage.summary or {}
    figures = summary.get("pruned" if stage.name == "prune" else "model", {})
    last = stage.epochs[-1] if stage.epochs else {}
    top1 = figures.get("top1", last.get("val_top1", last.get("test_top1")))
    params = figures.get("params", last.get("kept_params"))
    return [
        str(run.relative_to(folder)),
        stage.name,
        str(pruning.get("prune_method", "")),
        f"{pruning['prune_ratio']:g}" if pruning else "",
        str(len(stage.epochs)),
        "" if top1 is None else f"{top1:.2f}",
        "" if params is None else f"{params:,}",
        "finished" if summary else "unfinished",
    ]
