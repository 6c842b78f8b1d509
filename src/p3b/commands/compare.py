"""`p3b compare`: methods x prune ratios x seeds on one data set, run after run, into one table."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from p3b.commands.prune import prune
from p3b.commands.train import train
from p3b.data import DataSplits
from p3b.errors import ComparisonError, ConfigError
from p3b.methods import METHODS, ONE_SHOT_METHODS, method_options
from p3b.report.comparison import read_lines
from p3b.run.method_options import require_taken
from p3b.run.option_checks import check, check_screen, require_training
from p3b.run.options import CompareConfig
from p3b.run.screen import Screen, open_screen
from p3b.run.series import Commands, open_inputs, open_series, show_tables
from p3b.run.series_lines import dense_guesses, finished
from p3b.run.series_plan import DENSE, SMALLER, Run, config_of, is_pruned, shared_warm_ups
from p3b.train.distributed import Processes


def plan(config: CompareConfig) -> list[Run]:
    """All runs in their order: seed by seed, and for each seed the dense one first, so that a table of use is there early.

    Raises:
        ConfigError: an unknown method (with the nearest known ones), a ratio or a seed out of range or given twice.
    """
    asked = config.compare
    methods = list(asked.methods or (METHODS if config.training.epochs else ONE_SHOT_METHODS))
    for name in methods:
        method_options(name)  # refuses an unknown one
    for ratio in asked.prune_ratios:
        if not 0 <= ratio < 1:
            raise ConfigError(f"--prune-ratios must lie in [0, 1), got {ratio}: each is the share of parameters that goes.")
    for flag, values in (("methods", methods), ("prune-ratios", asked.prune_ratios), ("seeds", asked.seeds)):
        if not values or len(set(values)) != len(values):
            raise ConfigError(f"--{flag} is {' '.join(map(str, values)) or 'empty'}; expected at least one, each once.")
    rows = ([SMALLER] if asked.smaller else []) + methods
    return [
        run
        for seed in asked.seeds
        for run in (Run(DENSE, None, seed), *(Run(row, ratio, seed) for ratio in asked.prune_ratios for row in rows))
    ]


def compare(config: CompareConfig, splits: DataSplits | None = None) -> list[Path]:
    """Carry out what is not done yet, measure the speed of all models, and write the tables; returns the files of these.

    Args:
        config: settings.
        splits: the data where they are open already, to see that they can be used; every run opens them anew.

    Raises:
        UserError: settings that cannot be used, before anything is written.
        ComparisonError: some runs failed; all others are done.
        Stopped: a signal asked for it; the same call goes on.
    """
    out, fmt = config.run.output_dir, config.run.figure_format
    if out is None:
        raise ConfigError("--output-dir is missing: the folder that everything is written to.")
    check_screen(config.run)
    if config.compare.table_only:
        return _report(out, fmt, open_screen(config.run, is_main=int(os.environ.get("RANK", 0)) == 0))
    require_training(config.training.epochs + config.prune.finetune_epochs, "the same to `p3b sweep` with --dense-run")
    runs = plan(config)
    require_taken(config.prune, [run.row for run in runs if is_pruned(run.row)])
    for run in runs:
        check(config_of(config, run))

    def require(processes: Processes, lines: list[dict[str, Any]]) -> None:
        if {run.name for run in runs} - finished(lines).keys():
            open_inputs(config, processes, splits)

    with open_series(config, "compare", shared_warm_ups(config, runs), Commands(train, prune), require) as series:
        failed, written = [], []
        try:
            for number, run in enumerate(runs, start=1):
                line = series.carry_out(run, f"run {number} of {len(runs)}: {run}")
                failed += [run.name] if line["status"] == "failed" else []
            series.measure_speed()
        finally:
            if series.is_main and series.lines:
                written = _report(out, fmt, series.screen)
        if failed:
            raise ComparisonError(
                f"{len(failed)} of {len(runs)} runs failed: {', '.join(failed)}. What each met with stands in "
                f"{out / 'compare.md'}; the others are done. The same command tries them again."
            )
        return written


def _report(out: Path, fmt: str, screen: Screen) -> list[Path]:
    """Write the tables and show them."""
    from p3b.report.comparison_page import write_report  # matplotlib would take half a second of every start

    lines = read_lines(out)
    told = dense_guesses(lines)
    written = write_report(out, fmt, answer=told)
    show_tables(lines, written, "comparison", screen)
    for sentence in told:
        screen.warn(f"warning: {sentence}")
    return written
