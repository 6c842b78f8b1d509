"""`p3b report`: the page of a run, or of several side by side. `--follow` writes it again while the run trains."""

from __future__ import annotations

import time
from pathlib import Path

from p3b.errors import ConfigError
from p3b.report.record import read_run
from p3b.report.run_report import REPORT_FILE, write_run_report
from p3b.run.look_options import ReportConfig


def report(config: ReportConfig) -> Path:
    """Write the page; returns the file.

    Raises:
        ConfigError: no run was named, or --seconds is below 1. RunFolderError: a folder holds no run or is damaged.
    """
    if not config.runs:
        raise ConfigError("Name at least one run: p3b report run")
    if config.seconds < 1:
        raise ConfigError(f"--seconds is {config.seconds}; expected 1 or more.")
    out = config.out or config.runs[0] / REPORT_FILE
    reload_seconds = config.seconds if config.follow else None
    print(write_run_report(config.runs, out, reload_seconds=reload_seconds))
    while config.follow and not _ended(config.runs):
        time.sleep(config.seconds)
        write_run_report(config.runs, out, reload_seconds=reload_seconds)
    if config.follow:
        write_run_report(config.runs, out)  # the last page need not be loaded again
    return out


def _ended(runs: tuple[Path, ...]) -> bool:
    return all(stage.summary is not None for run in runs for stage in read_run(run))
