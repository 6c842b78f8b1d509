"""`p3b sweep`: one method at several budgets, from one warm-up; or the largest budget that loses at most so many points.

The runs are those of `p3b compare` (`p3b.run.series`), with one method and one seed. The search is a bisection over a grid of
prune ratios. It asks the validation part alone; what the test part says is told once, of the answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from timm.models.vision_transformer import VisionTransformer

from p3b.commands.compare import plan
from p3b.commands.prune import prune
from p3b.commands.train import train
from p3b.data import DataSplits
from p3b.errors import BudgetError, ComparisonError, ConfigError
from p3b.methods import create_method, method_dims
from p3b.run.bisection import candidates, grid, middle
from p3b.run.dense_run import GIVEN, line_of_dense_run, require_same_images
from p3b.run.distillation import teacher_digest
from p3b.run.method_options import method_options_of, require_taken
from p3b.run.option_checks import check, require_training
from p3b.run.options import CompareConfig, CompareOptions, PruneConfig, SweepConfig, SweepOptions
from p3b.run.products import PRODUCTS
from p3b.run.series import Commands, Series, open_inputs, open_series, show_tables
from p3b.run.series_lines import dense_guesses, finished
from p3b.run.series_plan import DENSE, Run, config_of, is_pruned, shared_warm_ups
from p3b.run.sweep_answer import answer_of, budgets_of, known, sentences
from p3b.train.distributed import Processes
from p3b.vit.layout import read_layout


def sweep(config: SweepConfig, splits: DataSplits | None = None) -> list[Path]:
    """Carry out what is not done yet, and write the tables; returns the files of these. The arguments are those of `compare`.

    Raises:
        UserError: settings that cannot be used, before anything is written.
        ComparisonError: some budgets failed.
        Stopped: a signal asked for it; the same call goes on.
    """
    _check(config)
    asked, series_config = config.sweep, _as_series(config)
    out = config.run.output_dir
    if out is None:
        raise ConfigError("--output-dir is missing: the folder that everything is written to.")
    runs = plan(series_config)
    if asked.dense_run is not None:
        runs = [replace(run, dense_run=asked.dense_run) for run in runs if run.row != DENSE]
    require_taken(config.prune, [run.row for run in runs if is_pruned(run.row)])
    for run in runs:
        check(config_of(series_config, run))
    searched = asked.max_loss is not None
    given = None if asked.dense_run is None else line_of_dense_run(asked.dense_run, asked.seed)

    def require(processes: Processes, lines: list[dict[str, Any]]) -> None:
        data, model = open_inputs(series_config, processes, splits)
        if searched and data.val is None:
            raise ConfigError(
                "--max-loss is judged on validation images, and there are none: give --val-path or a --val-share above 0. (The "
                "test images must not choose the budget.)"
            )
        budgets = sorted((run for run in runs if run.ratio is not None), key=lambda run: run.ratio or 0.0)
        for run, flag in ((budgets[0], "--lowest"), (budgets[-1], "--highest")):
            try:
                _require_budget(series_config, run, model)
            except BudgetError as error:
                raise BudgetError(f"{flag if searched else '--prune-ratios'}: {error}") from error
        if given is not None and asked.dense_run is not None:
            parts = {name: len(part) for name, part in (("val", data.val), ("test", data.test)) if part is not None}
            require_same_images(given["accuracy"], parts, asked.dense_run)
            if config.prune.distill_from == "dense-run":
                _require_one_teacher(lines, asked.dense_run)

    with open_series(series_config, "sweep", shared_warm_ups(series_config, runs), Commands(train, prune), require) as series:
        written: list[Path] = []
        try:
            if given is not None and finished(series.lines).get(given["name"]) != given:
                series.add(given)
            failed = _search(series, runs, asked) if searched else _all(series, runs)
            series.measure_speed()
        finally:
            if series.is_main and finished(series.lines):
                written = _report(series, config)
        if failed:
            raise ComparisonError(
                f"{len(failed)} run(s) failed: {'; '.join(failed)}. What is done is in {out / 'sweep.md'}; the same command "
                "tries again."
            )
        return written


def _check(config: SweepConfig) -> None:
    asked, defaults = config.sweep, SweepOptions()
    if bool(asked.prune_ratios) == (asked.max_loss is not None):
        raise ConfigError(
            "Give either --prune-ratios, the budgets to prune to, or --max-loss, the points of top-1 that the largest budget "
            f"may lose; got {'both' if asked.prune_ratios else 'neither'}."
        )
    if asked.dense_run is None:
        require_training(
            config.training.epochs + config.prune.finetune_epochs, "--dense-run, the output folder of its training"
        )
    if asked.max_loss is None:
        for name in ("lowest", "highest", "ratio_step"):
            if getattr(asked, name) != getattr(defaults, name):
                raise ConfigError(f"--{name.replace('_', '-')} belongs to --max-loss and means nothing to --prune-ratios.")
        return
    if not 0 <= asked.max_loss < 100:
        raise ConfigError(f"--max-loss is in points of top-1 and must lie in [0, 100), got {asked.max_loss}.")
    grid(asked.lowest, asked.highest, asked.ratio_step)


def _require_budget(config: CompareConfig, run: Run, model: VisionTransformer) -> None:
    """Refuse a budget as the method itself will, which may reach further than others or less far.

    Raises:
        ConfigError, ModelError: the method cannot be used with its options, or on this model. BudgetError: nor to this ratio.
    """
    pruning = config_of(config, run)
    assert isinstance(pruning, PruneConfig) and run.ratio is not None
    options = method_options_of(pruning.prune, pruning.run.seed)
    layout = read_layout(model, method_dims(run.row, options))
    create_method(run.row, model, layout, run.ratio, lambda tensor: tensor, options).detach()


def _as_series(config: SweepConfig) -> CompareConfig:
    """The runs that may come up, as a comparison of one method with one seed."""
    asked = config.sweep
    ratios = asked.prune_ratios
    if asked.max_loss is not None:
        ratios = tuple(grid(asked.lowest, asked.highest, asked.ratio_step))
    rows = CompareOptions(methods=(asked.prune_method,), prune_ratios=ratios, seeds=(asked.seed,), smaller=False)
    return CompareConfig(rows, config.data, config.model, config.training, config.augment, config.prune, config.run)


def _all(series: Series, runs: Sequence[Run]) -> list[str]:
    """Carry out every run; returns the names of those that failed."""
    failed = []
    for number, run in enumerate(runs, start=1):
        line = series.carry_out(run, f"run {number} of {len(runs)}: {run}")
        failed += [f"{run.name} ({line['message']})"] if line["status"] == "failed" else []
    return failed


def _search(series: Series, runs: Sequence[Run], asked: SweepOptions) -> list[str]:
    """Carry out what the bisection asks for; returns the name of the run that failed, where one did."""
    by_ratio = {run.ratio: run for run in runs if run.ratio is not None}
    steps = [(run, f"the dense model: {run}") for run in runs if run.row == DENSE]
    while True:
        for run, heading in steps:
            line = series.carry_out(run, heading)
            if line["status"] == "failed":
                return [f"{run.name} ({line['message']})"]
        tried = budgets_of(_ours(series.lines, asked), asked)
        left = candidates(list(by_ratio), known(tried))
        if not left:
            return []
        run = by_ratio[middle(left)]
        steps = [(run, f"budget {len(tried) + 1} of at most {len(tried) + len(left).bit_length()}: {run}")]


def _ours(lines: Sequence[dict[str, Any]], asked: SweepOptions) -> list[dict[str, Any]]:
    """The lines without the runs of another method, seed or dense model that were asked for in this folder before."""
    dense = GIVEN if asked.dense_run is not None else Run(DENSE, None, asked.seed).name

    def is_ours(line: Mapping[str, Any]) -> bool:
        if line["kind"] != "run":
            return line["kind"] == "speed"
        return line["name"] == dense or (line["row"], line["seed"]) == (asked.prune_method, asked.seed)

    return [line for line in lines if is_ours(line)]


def _report(series: Series, config: SweepConfig) -> list[Path]:
    """Write what there is so far, and show it; with the answer where the search has come to its end."""
    from p3b.report.comparison_page import write_report  # matplotlib would take half a second of every start

    asked = config.sweep
    out = config.run.output_dir
    assert out is not None
    told: list[str] = []
    lines = _ours(series.lines, asked)
    if asked.max_loss is not None:
        tried = budgets_of(lines, asked)
        if tried and not candidates(grid(asked.lowest, asked.highest, asked.ratio_step), known(tried)):
            answer = answer_of(lines, tried, asked)
            if answer not in series.lines:
                series.add(answer)
            told = sentences(answer)
        else:
            told = ["The search is not finished; run the same command again to continue."]
        # The search looks at validation images alone, and so does its table.
        lines = [_on_validation(line) for line in lines]
    told = [*dense_guesses(lines), *told, *_unequal_epochs(lines)]
    written = write_report(out, config.run.figure_format, "sweep", lines, told)
    show_tables(lines, written, "sweep", series.screen)
    for sentence in told:
        series.screen.result(sentence)
    return written


def _unequal_epochs(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """A sentence where a given dense model was not trained for as many epochs as the pruned ones."""
    done = finished(lines)
    pruned = {line["epochs"] for line in done.values() if line["row"] != DENSE}
    if GIVEN not in done or not pruned - {0, done[GIVEN]["epochs"]}:  # 0: cut in one shot, and nothing is trained
        return []
    return [
        f"The dense model of --dense-run was trained for {done[GIVEN]['epochs']} epochs, the pruned ones for "
        f"{' or '.join(map(str, sorted(pruned)))}: what they lose or gain against it is not of pruning alone. Leave "
        "--dense-run out to have one trained for as many."
    ]


def _on_validation(line: dict[str, Any]) -> dict[str, Any]:
    if line["kind"] != "run" or line["status"] != "done":
        return line
    accuracy = line["accuracy"]["val"]
    return {**line, "part": "val", **{key: accuracy[key] for key in ("top1", "top5", "images")}}


def _require_one_teacher(lines: Sequence[Mapping[str, Any]], dense_run: Path) -> None:
    """Refuse a dense run that is not the one that the models which are done have learnt from."""
    now = teacher_digest(dense_run / PRODUCTS["train"])
    taught = [line["name"] for line in finished(lines).values() if line.get("teacher", now) != now]
    if taught:
        raise ConfigError(
            f"{', '.join(taught)} learnt from another dense run than --dense-run {dense_run}: their rows would not compare. "
            "Give the same one, or choose another --output-dir."
        )
