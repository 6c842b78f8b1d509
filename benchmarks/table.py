"""How accurate is each method at the same size, on equal terms, on real transfer: dense, a smaller model, every method?

    python benchmarks/table.py run                              # all that is not in the record yet; resumable
    python benchmarks/table.py run --only block_benefit-0.9     # those whose name begins so
    python benchmarks/table.py run --seeds 0 1 2                # more seeds
    python benchmarks/table.py table                            # docs/results/table.md from docs/results/table.jsonl

A run takes 3 to 5 minutes of one core. Names are METHOD-RATIO-seedSEED; the order is seed 0 at 90 %, 75 % and 50 %, then
seed 1, so that a table of use is there early. Recipe, subset, epochs and how two seeds run at once: `benchmarks/measured.py`.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from harness.pages import folded, table
from harness.records import Line
from measured import DIFFERENCES, P3B, Study, circumstances, difference, difference_cell, in_order, main, spread_cell
from p3b.commands.compare import plan
from p3b.report.comparison import summarise
from p3b.report.comparison_page import draw_comparison
from p3b.run.options import CompareConfig
from p3b.run.series_plan import DENSE, SMALLER, Run
from p3b.run.series_speed import SPEED_BATCHES

METHODS = (P3B, "random", "uniform", "magnitude", "taylor", "wdpruning", "savit")
RATIOS = (0.9, 0.75, 0.5)
TITLES = {P3B: "P3B (block_benefit)"}
ONE_SHOT = {"savit": (("prune_start_epoch", "0.8"), ("prune_finalize_epoch", "1"), ("savit_every", 2))}
"""Methods that prune once and then have to recover: they do it before the epoch in which others prune step by step, and
fine-tune the small model for one epoch more. All see as many images. Interactions are averaged over thirty looks: with the six
that come of the default in so short an epoch their signs are those of the noise."""


def runs(config: CompareConfig) -> list[Run]:
    """All runs in their order."""
    planned = plan(replace(config, compare=replace(config.compare, methods=METHODS, prune_ratios=RATIOS, smaller=True)))
    return [replace(run, changed=ONE_SHOT.get(run.row, ())) for run in planned]


def tables(lines: Sequence[Line]) -> list[str]:
    """Top-1 of every method at every size, then a table for each size."""
    lines = in_order(runs, lines)
    rows = {row: [line for line in lines if line["row"] == row] for row in (DENSE, SMALLER, *METHODS)}
    text = [*_overview(rows), "![Accuracy against parameters](table.png)", "", *HOW_TO_READ, ""]
    for ratio in [ratio for ratio in RATIOS if any(line["ratio"] == ratio for line in lines)]:
        here = {name: [line for line in found if line["ratio"] in (ratio, None)] for name, found in rows.items()}
        here = {name: found for name, found in here.items() if found}
        text += [f"## {ratio:.0%} of the parameters pruned", ""]
        text += table(_HEAD, [_cells(name, found, here.get(P3B, [])) for name, found in here.items()])
        kept = [_kept(name, found) for name, found in here.items() if found[0]["keep_ratios"]]
        title = "Percent of its parameters that each block keeps, from the first to the last, mean over seeds"
        text += folded(title, table(["", "attention", "MLP"], kept))
    return [*text, "## How the runs were made", "", *circumstances(lines)]


HOW_TO_READ = (
    f"- Top-1 on the test images, mean over the seeds. {DIFFERENCES}",
    "- Pruned models are within 0.1 percentage points of the budget, or their run is not recorded; the smaller ViT, whose",
    "  widths are whole heads, is within 2 % of its size.",
    "- Images per second: in float32, timed in turns with the dense model; in brackets relative to it. Small models are",
    "  timed in the layout that was the quickest when they were pruned. Training minutes are those of all epochs",
    "  without evaluation, on a machine that may have done other work too.",
)


def _overview(rows: Mapping[str, Sequence[Line]]) -> list[str]:
    cells = []
    for name, lines in rows.items():
        found = [[line for line in lines if line["ratio"] in (ratio, None)] for ratio in RATIOS]
        if lines:
            cells.append([TITLES.get(name, name), *(spread_cell(each) if each else "" for each in found)])
    tested = " and ".join(sorted({f"{line['images']:,} {line['part']} images" for lines in rows.values() for line in lines}))
    head = ["top-1 (%)", *(f"{ratio:.0%} of the parameters pruned" for ratio in RATIOS)]
    return [f"Accuracy on {tested}:", "", *table(head, cells)]


_HEAD = ["model", "seeds", "top-1 (%)", "vs. P3B (points)", "parameters", "of dense", "MACs (M)", "of dense"]
_HEAD += [f"images/s, batch {size}" for size in SPEED_BATCHES] + ["training (min)"]


def _cells(name: str, lines: Sequence[Line], reference: Sequence[Line]) -> list[str]:
    def mean(key: str) -> float:
        return statistics.fmean(line[key] for line in lines)

    return [
        TITLES.get(name, name),
        ", ".join(str(line["seed"]) for line in lines),
        spread_cell(lines),
        "" if name == P3B else difference_cell(difference(lines, reference)),
        f"{mean('params'):,.0f}",
        f"{mean('params') / mean('dense_params'):.2%}",
        f"{mean('macs') / 1e6:,.1f}",
        f"{mean('macs') / mean('dense_macs'):.1%}",
        *(_speed([line["speed"][str(size)] for line in lines]) for size in SPEED_BATCHES),
        f"{mean('train_seconds') / 60:.1f}",
    ]


def _speed(found: Sequence[dict[str, Any]]) -> str:
    speed = statistics.fmean(each["images_per_second"] for each in found)
    return f"{speed:,.0f} (x {statistics.fmean(each['images_per_second'] / each['dense'] for each in found):.2f})"


def _kept(name: str, lines: Sequence[Line]) -> list[str]:
    def of_kind(kind: str) -> str:
        blocks = [block for block in lines[0]["keep_ratios"] if block.endswith(kind)]
        return " ".join(f"{100 * statistics.fmean(line['keep_ratios'][block] for line in lines):.0f}" for block in blocks)

    return [TITLES.get(name, name), of_kind(".attn"), of_kind(".mlp")]


def draw(lines: Sequence[Line], out: Path) -> object:
    """Top-1 against parameters."""
    return draw_comparison(summarise(lines), out)


STUDY = Study("table", __doc__ or "", runs, tables, draw)

if __name__ == "__main__":
    sys.exit(main(STUDY))
