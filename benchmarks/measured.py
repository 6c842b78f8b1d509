"""What the measured table and the ablations share: one recipe, runs that are recorded once, and pages made of the record.

A study is a list of runs of `p3b train` and `p3b prune` on real transfer: `source_vit`, trained on CIFAR-10's vehicles, is
moved to its six animals. They are carried out by the machinery of `p3b compare` (`p3b.run.series`) in one folder for all
studies, so that a warm-up is trained once, a finished run is not repeated, and an interrupted one is resumed. Each adds one
JSON line to the record of its study; a page is made of these lines alone. One process at a time works in the folder.

The choice of images and epochs: 10,000 of the training images, one epoch of dense training (shared by all runs that can
share it), one of pruning and one of fine-tuning, in batches of 32 so that an epoch has 312 steps. With 3,000
and 6,000 images and 14 or 20 epochs, 75 % of the parameters could be pruned without visible loss by any method: what is cut
wrongly is learnt again. A short recovery and a budget of 90 % tell methods apart. An image costs about 9 ms of one core in
dense training (bf16), so a run takes 3 to 5 minutes of one core. Two series with other seeds and folders can run at once:

    OMP_NUM_THREADS=1 python benchmarks/table.py run --seeds 0 --work runs/measured-0
    OMP_NUM_THREADS=1 python benchmarks/table.py run --seeds 1 --work runs/measured-1
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import tyro
from timm.models.vision_transformer import VisionTransformer

from animals import AUGMENTATION, MODEL, NORMALIZATION, TARS
from harness.pages import Part, Tables, folded, how_it_was_run
from harness.records import RESULTS, Line, add_line, read_lines
from p3b.commands.command_line import STOPPED, USER_ERROR
from p3b.commands.prune import prune
from p3b.commands.train import train
from p3b.deploy.choice import with_layout
from p3b.deploy.speed import images_per_second
from p3b.errors import BudgetError, ConfigError, Stopped, UserError
from p3b.run.flags import command_line
from p3b.run.inputs import open_model, open_splits
from p3b.run.options import CompareConfig
from p3b.run.products import PRODUCTS
from p3b.run.series import Commands, open_series
from p3b.run.series_plan import SMALLER, Run, config_of, shared_warm_ups
from p3b.run.series_speed import SPEED_BATCHES
from p3b.storage import artifact
from p3b.train.distributed import Processes
from p3b.vit.cost import count_macs, count_parameters

P3B = "block_benefit"
SEEDS = (0, 1)
IMAGES, PRUNE_EPOCHS, FINETUNE_EPOCHS = 10_000, 2, 1
DATA = f"--data-set FOLDER {TARS} --val-share 0.05 --max-train-images {IMAGES} --num-workers 0"
RECIPE = f"--batch-size 32 --lr 8e-3 {AUGMENTATION}"
PHASES = f"--epochs {PRUNE_EPOCHS} --finetune-epochs {FINETUNE_EPOCHS} --prune-start-epoch 1 --prune-steps-update-mask 30"
SETTINGS = f"{DATA} {MODEL} {NORMALIZATION} {RECIPE} {PHASES}"
"""Flags of `p3b compare`; SHARED is the folder with the images and the weights."""
SERIES = "measured"
TOLERANCE = 0.001
"""By which the share of parameters that a method leaves may miss the budget: 0.1 percentage points."""
TOLERANCE_OF_SMALLER = 0.02
"""By which a smaller model may miss its number of parameters: its widths are whole heads (`p3b.vit.smaller`)."""


@dataclass(frozen=True)
class Study:
    """A list of runs with its record and its page.

    Attributes:
        name: of the tool, `benchmarks/<name>.py`, and of its files.
        about: what the tool says of itself.
        runs: from the settings that all runs share to the runs in their order.
        tables: the part of the page that is made from the lines.
        draw: draws the figure of the page, <name>.png, from the lines, where it has one.
        borrows: record of another study whose lines are taken over where a run is the same.
    """

    name: str
    about: str
    runs: Callable[[CompareConfig], list[Run]]
    tables: Tables
    draw: Callable[[Sequence[Line], Path], object] | None = None
    borrows: Path | None = None

    @property
    def record(self) -> Path:
        return RESULTS / f"{self.name}.jsonl"

    def part(self, record: Path) -> Part:
        """The page is beside the record."""
        return Part(f"{self.name}.py", record, record.with_suffix(".md"), self.tables)


def main(study: Study, arguments: Sequence[str] | None = None, *, flags: str = SETTINGS) -> int:
    """The command line of a study; returns the exit status: 0 done, 2 a run failed or was refused, 75 stopped."""
    parser = argparse.ArgumentParser(description=study.about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("run", "table"))
    parser.add_argument("--only", default="", metavar="NAME", help="runs whose name begins so, e.g. block_benefit-0.9")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), help="seeds of the runs, one after the other")
    parser.add_argument("--shared", type=Path, default=Path("../shared"), help="folder that holds data/ with the images")
    parser.add_argument("--work", type=Path, default=Path("runs/measured"), help="folder for the run folders, of all studies")
    parser.add_argument(
        "--record", type=Path, default=study.record, help="file of the JSON lines; the page is written beside it"
    )
    given = parser.parse_args(arguments)
    status = 0
    try:
        if given.action == "run":
            config = settings(given.shared / "data", given.work, given.seeds, flags)
            wrong = carry_out(study, config, given.only, given.record, lambda run: plain_command(run, flags))
            print(
                "".join(f"{study.name}: {name} is not in the record; the same command tries it again\n" for name in wrong),
                end="",
            )
            status = USER_ERROR if wrong else 0
    except UserError as error:
        print(f"{study.name}: {error}", file=sys.stderr)
        status = USER_ERROR
    except Stopped as stop:
        print(f"{study.name}: {stop}; the same command resumes.", file=sys.stderr)
        status = STOPPED
    if status == 0 or read_lines(given.record):
        write_page(study, given.record)
    return status


def settings(data: Path, work: Path, seeds: Sequence[int] = SEEDS, flags: str = SETTINGS) -> CompareConfig:
    """What all runs of all studies share.

    Args:
        data: folder with the images and the weights.
        work: folder for the runs.
        seeds: that are asked for.
        flags: of `p3b compare`, with SHARED for the folder.
    """
    words = [word.replace("SHARED", str(data)) for word in shlex.split(flags)]
    words += ["--seeds", *map(str, seeds), "--output-dir", str(work)]
    return tyro.cli(CompareConfig, args=words, config=(tyro.conf.OmitArgPrefixes,))


def carry_out(study: Study, config: CompareConfig, only: str, record: Path, command: Callable[[Run], str]) -> list[str]:
    """Make the runs that are not in the record yet, and add their lines.

    Args:
        study, config: what to run.
        only: how the names begin of the runs that are asked for.
        record: file of the lines.
        command: the `p3b` command of a run, as it is recorded.

    Returns:
        Names of the runs that failed or were refused.

    Raises:
        ConfigError: no run has a name that begins as asked.
    """
    planned = study.runs(config)
    asked = [run for run in planned if run.name.startswith(only)]
    if not asked:
        raise ConfigError(
            f"No run has a name that begins with {only!r}; the first are {', '.join(r.name for r in planned[:4])}."
        )
    recorded = {line["name"] for line in read_lines(record)}
    due = [run for run in asked if run.name not in recorded]
    if study.borrows is not None and record == study.record:
        elsewhere = {line["name"]: line for line in read_lines(study.borrows)}
        for run in [run for run in due if run.name in elsewhere]:
            add_line(record, {**elsewhere[run.name], "command": again(study, run)})
            due.remove(run)
    if not due:
        return []
    references: list[VisionTransformer] = []

    def require(processes: Processes, _lines: list[dict[str, Any]]) -> None:
        seed = config.compare.seeds[0]
        classes = len(open_splits(config.data, seed, processes).class_names)
        references.append(open_model(config.model, classes, seed).model)

    wrong = []
    with open_series(config, SERIES, shared_warm_ups(config, planned), Commands(train, prune), require) as series:
        for number, run in enumerate(due, start=1):
            found = series.carry_out(run, f"run {number} of {len(due)}: {run}")
            try:
                if found["status"] == "done":
                    line = line_of(run, found, config, references[0].to(series.device))
                    add_line(record, {**line, "command": again(study, run), "p3b": command(run)})
                else:
                    wrong.append(run.name)
            except BudgetError as error:
                wrong.append(run.name)
                print(f"{study.name}: {error}", file=sys.stderr)
    return wrong


def line_of(run: Run, found: Line, config: CompareConfig, dense: VisionTransformer) -> dict[str, Any]:
    """The line of a run that is done: what the series says of it, and what it left in its folder.

    Args:
        run, config: which run.
        found: its line in the series.
        dense: the model that it started from, on the device where speed is measured; its weights play no part.

    Raises:
        BudgetError: the model is not of the size that was asked for.
    """
    assert config.run.output_dir is not None and config.data.data_path is not None
    folder = config.run.output_dir / "runs" / run.name
    stage = folder / run.stage
    last = next(reversed(read_lines(stage / "blocks.jsonl")), {"blocks": []})
    summary = json.loads((stage / "summary.json").read_text())
    line = {
        **found,
        "data": found["data"].replace(str(config.data.data_path.parent), "SHARED"),  # where the images lie is nobody's business
        "seconds": round(sum(epoch["seconds"] for epoch in read_lines(stage / "metrics.jsonl")), 1),
        "dense_params": count_parameters(dense),
        "dense_macs": count_macs(dense, tuple(dense.patch_embed.img_size)),
        "keep_ratios": {block["name"]: block["kept_params"] / block["params"] for block in last["blocks"]},
        "returned": summary.get("returned"),
    }
    require_budget(line)
    layouts = {choice["batch_size"]: choice["layout"] for choice in summary.get("layouts", [])}
    saved = artifact.load(folder / PRODUCTS[run.stage], next(dense.parameters()).device)
    return {**line, "speed": {str(size): _speed(saved, dense, size, layouts.get(size, "index")) for size in SPEED_BATCHES}}


def require_budget(line: Line, nearly: Mapping[str, float] = MappingProxyType({})) -> None:
    """Refuse a line whose model is not of the size that was asked for.

    Args:
        line: of a run.
        nearly: by how much the share of parameters that stays may miss the one asked for, in rows that need more room.

    Raises:
        BudgetError: says by how much.
    """
    if line["ratio"] is None:
        return
    share, asked = line["params"] / line["dense_params"], 1 - line["ratio"]
    allowed = {SMALLER: TOLERANCE_OF_SMALLER * asked, **nearly}.get(line["row"], TOLERANCE)
    if abs(share - asked) > allowed:
        raise BudgetError(
            f"{line['name']} keeps {share:.3%} of the parameters; expected {asked:.1%} within {100 * allowed:.2g} points. The "
            "run is not recorded: see in its folder why the method missed its budget."
        )


def again(study: Study, run: Run) -> str:
    """The command that makes a run again and records it elsewhere, from nothing."""
    elsewhere = f"--work again --record again/{study.name}.jsonl"
    return f"python benchmarks/{study.name}.py run --only {run.name} --seeds {run.seed} {elsewhere}"


def plain_command(run: Run, flags: str = SETTINGS) -> str:
    """The `p3b train` or `p3b prune` that a run is, with SHARED for the folder of the images and WORK for that of the runs.

    What it does not say is as published: `--recipe paper`, which was the only way when the runs were recorded.
    """
    return command_line(run.stage, config_of(_published(flags), run), leave_out=("resume", "report", "recipe"))


@cache
def _published(flags: str) -> CompareConfig:
    return settings(Path("SHARED"), Path("WORK"), flags=flags)


def _speed(model: VisionTransformer, dense: VisionTransformer, batch_size: int, layout: str) -> dict[str, Any]:
    """Images per second of a model and of the dense one, taking turns; a small model in the layout that was the quickest when
    it was pruned.
    """
    shape = (dense.patch_embed.proj.in_channels, *dense.patch_embed.img_size)
    sides = [with_layout(model, layout), dense]
    mine, reference = images_per_second(sides, shape, batch_size=batch_size, device=next(dense.parameters()).device)
    return {"images_per_second": mine, "dense": reference, "layout": layout}


# --- what the lines say


@dataclass(frozen=True)
class Difference:
    """Top-1 of one row less that of another, in points, over the seeds that both have.

    Attributes:
        mean: over these seeds.
        of_test: standard error from the test images. Both rows see the same images in every seed, so more seeds do not make it
            smaller; and since both tend to fail on the same images it is rather too large.
        of_seeds: standard error of the mean over the seeds, from their spread; None with one seed.
        seeds: how many.
    """

    mean: float
    of_test: float
    of_seeds: float | None
    seeds: int

    @property
    def error(self) -> float:
        """Both together."""
        return math.hypot(self.of_test, self.of_seeds or 0.0)


def difference(ours: Iterable[Line], theirs: Iterable[Line]) -> Difference | None:
    """How much better the first row is than the second; None without a common seed."""
    first, second = ({line["seed"]: line for line in lines} for lines in (ours, theirs))
    seeds = sorted(first.keys() & second.keys())
    if not seeds:
        return None
    by_seed = [first[seed]["top1"] - second[seed]["top1"] for seed in seeds]
    shares = [statistics.fmean(row[seed]["top1"] for seed in seeds) / 100 for row in (first, second)]
    of_test = 100 * math.sqrt(sum(share * (1 - share) for share in shares) / first[seeds[0]]["images"])
    of_seeds = statistics.stdev(by_seed) / math.sqrt(len(seeds)) if len(seeds) > 1 else None
    return Difference(statistics.fmean(by_seed), of_test, of_seeds, len(seeds))


def difference_cell(found: Difference | None) -> str:
    """In a table: the difference, its standard error, and whether it is more than twice that."""
    if found is None:
        return ""
    mark = " *" if abs(found.mean) > 2 * found.error else ""
    return f"{found.mean:+.2f} ± {found.error:.2f}{mark}"


def spread_cell(lines: Sequence[Line]) -> str:
    """Mean top-1 of a row over its seeds and their standard deviation; without one where there is one seed."""
    values = [line["top1"] for line in lines]
    return f"{statistics.fmean(values):.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")


DIFFERENCES = (
    '"vs. P3B" is the difference in top-1 to P3B over the seeds that both have, ± its standard error: the binomial one of '
    "two rows on so many test images, which no seed makes smaller, and that of the mean over the seeds, taken together. `*`: "
    "more than two standard errors; without it the two cannot be told apart. ± at top-1 is the standard deviation over the "
    "seeds; one seed has none."
)


def circumstances(lines: Sequence[Line]) -> list[str]:
    """The end of every page: recipe, and folded the commands of each run."""
    facts = [
        f"{line['seconds'] / 60:.0f} minutes with evaluation, {line['epochs']} epochs, {line['precision']}" for line in lines
    ]
    text = [
        f"Data: {lines[0]['data']}. {PRUNE_EPOCHS + FINETUNE_EPOCHS} epochs for every row: a pruned model is trained dense in "
        "the first, pruned in the second and fine-tuned in the third. SAViT prunes once, at the end of the first, and is "
        "fine-tuned in the other two. The best epoch is chosen on the validation images. Settings: `SETTINGS` in "
        "`benchmarks/measured.py`.",
        "",
        "Each command below repeats one run from nothing, beside this record.",
        "",
        *how_it_was_run([{key: line[key] for key in line.keys() - {"seconds"}} for line in lines], *facts),
    ]
    commands = [f"    {line['p3b']}" for line in lines]
    return text + folded(
        "The `p3b` command of each run (with `--recipe paper`; SHARED: the folder with the images, WORK: that of `--work`)",
        [*commands, ""],
    )


def in_order(runs: Callable[[CompareConfig], Sequence[Run]], lines: Sequence[Line]) -> list[Line]:
    """Lines in the order of the runs; other names come last, and of a run that stands twice the last one counts."""
    by_name = {line["name"]: line for line in lines}
    planned = runs(settings(Path("SHARED"), Path("WORK"), sorted({line["seed"] for line in lines})))
    place = {run.name: number for number, run in enumerate(planned)}
    return sorted(by_name.values(), key=lambda line: place.get(line["name"], len(place)))


def write_page(study: Study, record: Path) -> None:
    """Write the page of a record beside it, and its figure."""
    lines = read_lines(record)
    if lines and study.draw is not None:
        study.draw(lines, record.with_suffix(".png"))
    study.part(record).write()
