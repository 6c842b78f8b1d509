"""`p3b sweep`: one method at several budgets, from one warm-up; or the largest budget that loses at most so many points.

The runs are those of `p3b compare` (`p3b.run.series`), with one method and one seed. The search is a bisection over a grid of
prune ratios. It asks the validation part alone; what the test part says is told once, of the answer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from timm.models.vision_transformer import VisionTransformer

from p3b.commands.compare import plan, require_taken
from p3b.commands.prune import method_options_of
from p3b.data import DataSplits
from p3b.errors import BudgetError, ComparisonError, ConfigError, RunFolderError
from p3b.methods import create_method, method_dims
from p3b.report.comparison import write_report
from p3b.run.folder import StageFolder
from p3b.run.options import CompareConfig, CompareOptions, PruneConfig, SweepConfig, SweepOptions, check
from p3b.run.series import (
    DENSE,
    Run,
    Series,
    config_of,
    finished,
    open_inputs,
    open_series,
    results,
    shared_warm_ups,
    show_tables,
)
from p3b.run.stage import PRODUCTS
from p3b.train.distributed import Processes
from p3b.vit.layout import read_layout

_GIVEN = f"{DENSE}-given"
MOST_RATIOS = 10_000
"""Prune ratios on a grid, at most."""


def grid(lowest: float, highest: float, step: float) -> list[float]:
    """Prune ratios lowest, lowest + step, ... up to `highest`, which is the last; ascending.

    Args:
        lowest, highest: 0 <= lowest < highest < 1.
        step: above 0.

    Raises:
        ConfigError: out of range, or a grid of more than `MOST_RATIOS`.
    """
    if not 0 <= lowest < highest < 1:
        raise ConfigError(f"--lowest {lowest} and --highest {highest} are no range: expected 0 <= lowest < highest < 1.")
    if not (highest - lowest) / MOST_RATIOS <= step <= highest - lowest:
        raise ConfigError(
            f"--ratio-step {step} does not fit between --lowest {lowest} and --highest {highest}: expected a step above 0, at "
            f"most their distance, and at most {MOST_RATIOS:,} steps."
        )
    steps = math.ceil(round((highest - lowest) / step, 6))
    return [*(round(lowest + number * step, 10) for number in range(steps)), highest]


def candidates(ratios: Sequence[float], known: Mapping[float, bool]) -> list[float]:
    """The ratios that are still in question in a bisection for the largest one that holds.

    They lie above the largest ratio that is known to hold and below the next one that is known not to. Should a larger ratio
    hold where a smaller one does not, the one that holds counts. With the middle one tried next, m of them take at most
    ceil(log2(m + 1)) tries; where none is left, `largest(known)` is the answer.

    Args:
        ratios: that may be tried, ascending.
        known: whether a ratio holds, for those that have been tried; others than `ratios` too.
    """
    best = largest(known)
    above = -math.inf if best is None else best
    below = min((ratio for ratio, holds in known.items() if not holds and ratio > above), default=math.inf)
    return [ratio for ratio in ratios if above < ratio < below]


def middle(ratios: Sequence[float]) -> float:
    """The ratio to try next; of two in the middle the smaller one."""
    return ratios[(len(ratios) - 1) // 2]


def largest(known: Mapping[float, bool]) -> float | None:
    """The largest ratio that holds; None where none does."""
    return max((ratio for ratio, holds in known.items() if holds), default=None)


def standard_error(top1: float, images: int) -> float:
    """Of an accuracy in percent over so many images, in points: that of a proportion."""
    share = top1 / 100
    return 100 * math.sqrt(share * (1 - share) / images)


@dataclass(frozen=True)
class Budget:
    """A budget that was tried, on the validation part.

    Attributes:
        ratio: share of the parameters that goes.
        top1: percent.
        loss: points under the dense model; below 0 where it is better.
        standard_error: of `loss` in points, as if both accuracies were of different images. They are of the same ones, on which
            the models mostly agree, so the true one is smaller.
        holds: whether the loss is small enough.
    """

    ratio: float
    top1: float
    loss: float
    standard_error: float
    holds: bool


def judge(dense: Mapping[str, Any], pruned: Mapping[str, Any], ratio: float, max_loss: float) -> Budget:
    """Whether a pruned model loses at most `max_loss` points against the dense one.

    Args:
        dense, pruned: "top1" in percent and "images" of the validation part.
        ratio: share of the parameters that went.
        max_loss: in points of top-1, >= 0.
    """
    # Accuracies are quotients of whole numbers: what differs by rounding alone must not decide.
    loss = round(dense["top1"] - pruned["top1"], 9)
    error = math.hypot(*(standard_error(each["top1"], each["images"]) for each in (dense, pruned)))
    return Budget(ratio, pruned["top1"], loss, error, loss <= max_loss)


def sweep(config: SweepConfig) -> list[Path]:
    """Carry out what is not done yet, and write the tables; returns the files of these.

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
        runs = [run for run in runs if run.row != DENSE]
    require_taken(series_config, runs)
    for run in runs:
        check(config_of(series_config, run))
    searched = asked.max_loss is not None
    given = None if asked.dense_run is None else _line_of(asked.dense_run, asked)

    def require(processes: Processes, lines: list[dict[str, Any]]) -> None:
        splits, model = open_inputs(series_config, processes)
        if searched and splits.val is None:
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
            _require_comparable(given, splits, asked.dense_run)

    with open_series(series_config, "sweep", shared_warm_ups(series_config, runs), require) as series:
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
    options = method_options_of(pruning)
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
        tried = _budgets(_ours(series.lines, asked), asked)
        left = candidates(list(by_ratio), _known(tried))
        if not left:
            return []
        run = by_ratio[middle(left)]
        steps = [(run, f"budget {len(tried) + 1} of at most {len(tried) + len(left).bit_length()}: {run}")]


def _ours(lines: Sequence[dict[str, Any]], asked: SweepOptions) -> list[dict[str, Any]]:
    """The lines without the runs of another method, seed or dense model that were asked for in this folder before."""
    dense = _GIVEN if asked.dense_run is not None else Run(DENSE, None, asked.seed).name

    def is_ours(line: Mapping[str, Any]) -> bool:
        if line["kind"] != "run":
            return line["kind"] == "speed"
        return line["name"] == dense or (line["row"], line["seed"]) == (asked.prune_method, asked.seed)

    return [line for line in lines if is_ours(line)]


def _known(tried: Sequence[Budget]) -> dict[float, bool]:
    return {budget.ratio: budget.holds for budget in tried}


def _budgets(lines: Sequence[Mapping[str, Any]], asked: SweepOptions) -> list[Budget]:
    """What is known of the budgets in the range that is searched, ascending; nothing before the dense model is done."""
    done = finished(lines).values()
    dense = next((line for line in done if line["row"] == DENSE), None)
    if dense is None or asked.max_loss is None:
        return []
    found = [
        judge(dense["accuracy"]["val"], line["accuracy"]["val"], line["ratio"], asked.max_loss)
        for line in done
        if line["row"] != DENSE and asked.lowest <= line["ratio"] <= asked.highest
    ]
    return sorted(found, key=lambda budget: budget.ratio)


def _report(series: Series, config: SweepConfig) -> list[Path]:
    """Write what there is so far, and show it; with the answer where the search has come to its end."""
    asked = config.sweep
    out = config.run.output_dir
    assert out is not None
    told: list[str] = []
    lines = _ours(series.lines, asked)
    if asked.max_loss is not None:
        tried = _budgets(lines, asked)
        if tried and not candidates(grid(asked.lowest, asked.highest, asked.ratio_step), _known(tried)):
            answer = _answer(lines, tried, asked)
            if answer not in series.lines:
                series.add(answer)
            told = _sentences(answer)
        else:
            told = ["The search has not come to its end; the same command goes on."]
        # The search looks at validation images alone, and so does its table.
        lines = [_on_validation(line) for line in lines]
    told = [*told, *_unequal_epochs(lines)]
    written = write_report(out, config.run.figure_format, "sweep", lines, told)
    show_tables(lines, written, "sweep", series.display)
    for sentence in told:
        series.display.say(sentence)
    return written


def _answer(lines: Sequence[Mapping[str, Any]], tried: Sequence[Budget], asked: SweepOptions) -> dict[str, Any]:
    """What the search has come to, as a line. The test part comes in here, for the dense model and the answer alone."""
    done = finished(lines).values()
    ratio = largest(_known(tried))
    chosen = {
        "dense": next(line for line in done if line["row"] == DENSE),
        "answer": next((line for line in done if line["ratio"] is not None and line["ratio"] == ratio), None),
    }
    return {
        "kind": "answer",
        "max_loss": asked.max_loss,
        "searched": [asked.lowest, asked.highest, asked.ratio_step],
        "ratio": ratio,
        "name": None if chosen["answer"] is None else chosen["answer"]["name"],
        "budgets": [asdict(budget) for budget in tried],
        "dense_top1": chosen["dense"]["accuracy"]["val"]["top1"],
        "images": chosen["dense"]["accuracy"]["val"]["images"],
        "test": {name: line["accuracy"]["test"] for name, line in chosen.items() if line and "test" in line["accuracy"]},
    }


def _sentences(answer: Mapping[str, Any]) -> list[str]:
    """The answer in words, for the page, the table and the screen."""
    lowest, highest, step = answer["searched"]
    within = f"between {lowest:g} and {highest:g} in steps of {step:g}"
    told = []
    if answer["ratio"] is None:
        told.append(f"No prune ratio {within} was found that loses at most {answer['max_loss']:g} points of top-1.")
    else:
        told.append(
            f"The largest prune ratio found {within} that loses at most {answer['max_loss']:g} points of top-1: "
            f"{answer['ratio']:g} (runs/{answer['name']}/{PRODUCTS['prune']})."
        )
    told.append(f"On {answer['images']:,} validation images, where the dense model has {answer['dense_top1']:.2f} %:")
    for budget in answer["budgets"]:
        sign = "holds" if budget["holds"] else "does not hold"
        told.append(
            f"- {budget['ratio']:g}: {budget['top1']:.2f} %, {_loss(budget['loss'])} (standard error at most "
            f"{budget['standard_error']:.2f} points): {sign}"
        )
    if answer["test"].get("answer"):
        dense, found = answer["test"]["dense"], answer["test"]["answer"]
        judged = judge(dense, found, answer["ratio"], answer["max_loss"])
        told.append(
            f"On {found['images']:,} test images, which had no part in the choice: {found['top1']:.2f} %, {_loss(judged.loss)} "
            f"({dense['top1']:.2f} %; standard error at most {judged.standard_error:.2f} points)."
        )
    errors = [budget["standard_error"] for budget in answer["budgets"]]
    if errors and answer["max_loss"] < 2 * max(errors):
        told.append(
            f"Below the noise: {answer['max_loss']:g} points are less than two standard errors of a difference on so many "
            f"images ({2 * max(errors):.2f} points). Chance has a say in which budgets hold; more validation images, or "
            "another seed, may give another answer."
        )
    return told


def _loss(points: float) -> str:
    return f"{abs(points):.2f} points {'under' if points >= 0 else 'above'} the dense model"


def _unequal_epochs(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """A sentence where a given dense model was not trained for as many epochs as the pruned ones."""
    done = finished(lines)
    pruned = {line["epochs"] for line in done.values() if line["row"] != DENSE}
    if _GIVEN not in done or not pruned - {done[_GIVEN]["epochs"]}:
        return []
    return [
        f"The dense model of --dense-run was trained for {done[_GIVEN]['epochs']} epochs, the pruned ones for "
        f"{' or '.join(map(str, sorted(pruned)))}: what they lose or gain against it is not of pruning alone. Leave "
        "--dense-run out to have one trained for as many."
    ]


def _on_validation(line: dict[str, Any]) -> dict[str, Any]:
    if line["kind"] != "run" or line["status"] != "done":
        return line
    accuracy = line["accuracy"]["val"]
    return {**line, "part": "val", **{key: accuracy[key] for key in ("top1", "top5", "images")}}


def _line_of(dense_run: Path, asked: SweepOptions) -> dict[str, Any]:
    """The line of a dense run that is there already.

    Raises:
        RunFolderError: it is not, or it has not come to its end.
    """
    stage = StageFolder(dense_run, "train")
    if not stage.finished:
        raise RunFolderError(f"{dense_run} holds no finished `p3b train`; give --dense-run the output folder of one.")
    summary = stage.read_json("summary.json")
    return {
        "kind": "run",
        "name": _GIVEN,
        "row": DENSE,
        "ratio": None,
        "seed": asked.seed,
        "command": f"(the dense model is that of --dense-run {dense_run})",
        "status": "done",
        **results(summary, stage.path),
        "model": str(dense_run / PRODUCTS["train"]),
        "commit": None,
        "hardware": None,
        "date": summary["provenance"]["date"],
    }


def _require_comparable(given: Mapping[str, Any], splits: DataSplits, dense_run: Path) -> None:
    """Refuse a dense run that was measured on other images than the budgets will be."""
    for name, part in (("val", splits.val), ("test", splits.test)):
        found = given["accuracy"].get(name, {}).get("images", 0)
        expected = 0 if part is None else len(part)
        if found != expected:
            raise ConfigError(
                f"--dense-run {dense_run} was measured on {found} {name} images, the budgets will be on {expected}: they would "
                "not compare. Train it on the same data, or leave it out."
            )
