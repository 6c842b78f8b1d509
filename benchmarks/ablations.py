"""What is each part of P3B worth? One setting is changed at a time, on real transfer.

    python benchmarks/ablations.py run                               # all that is not in the record yet; resumable
    python benchmarks/ablations.py run --only block_benefit-masks    # those whose name begins so
    python benchmarks/ablations.py table                             # docs/results/ablations.md from ablations.jsonl

Recipe, folder and machinery are those of `benchmarks/table.py`: P3B itself and uniform shares are runs of that table, and are
taken over from its record, or from the folder of the runs, where they are done. Two budgets, 90 % first, and two seeds.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from harness.pages import table
from harness.records import RESULTS, Line
from measured import DIFFERENCES, P3B, Study, circumstances, difference, difference_cell, in_order, main, spread_cell
from p3b.run.options import CompareConfig
from p3b.run.series_plan import Run

RATIOS = (0.9, 0.75)


@dataclass(frozen=True)
class Variant:
    """P3B with one thing changed: another method, or other settings of pruning."""

    title: str
    method: str = P3B
    changed: tuple[tuple[str, Any], ...] = ()

    def run(self, ratio: float, seed: int) -> Run:
        return Run(self.method, ratio, seed, self.changed)


QUESTIONS: Mapping[str, Sequence[Variant]] = {
    "Does it pay to share the budget by benefit?": (
        Variant("by benefit (P3B)"),
        Variant("the same share of every block (uniform)", "uniform"),
    ),
    "Whose benefit: the class token's or the patches'?": (
        Variant("both alike (P3B, alpha 0.5)"),
        Variant("the class token's alone (alpha 1)", changed=(("prune_alpha", 1.0),)),
        Variant("the patches' alone (alpha 0)", changed=(("prune_alpha", 0.0),)),
    ),
    "Soft or hard masks?": (
        Variant("soft until the end (P3B)"),
        Variant("hard from the first update on", changed=(("prune_masks", "hard"),)),
    ),
    "Is it better to start early or late?": (
        Variant("after 1 of 2 pruning epochs (P3B)"),
        Variant("after 0.25", changed=(("prune_start_epoch", "0.25"),)),
        Variant("after 1.5", changed=(("prune_start_epoch", "1.5"),)),
    ),
    "What do aligned widths cost?": (
        Variant("widths as they come (P3B, align 1)"),
        Variant("multiples of 8, and whole heads (align 8)", changed=(("align", 8),)),
    ),
}
"""What is asked, and the variants that answer it; the first of each is P3B as it is."""


def variants() -> list[Variant]:
    """Each once, by what it changes: P3B first."""
    found: dict[tuple[str, tuple[tuple[str, Any], ...]], Variant] = {}
    for variant in (variant for answers in QUESTIONS.values() for variant in answers):
        found.setdefault((variant.method, variant.changed), variant)
    return list(found.values())


def runs(config: CompareConfig) -> list[Run]:
    """All runs in their order."""
    return [variant.run(ratio, seed) for seed in config.compare.seeds for ratio in RATIOS for variant in variants()]


def tables(lines: Sequence[Line]) -> list[str]:
    """A table for each question, then how often pruned elements return."""
    lines = in_order(runs, lines)
    by_name = {line["name"]: line for line in lines}
    seeds = sorted({line["seed"] for line in lines})

    def found(variant: Variant, ratio: float) -> list[Line]:
        names = (variant.run(ratio, seed).name for seed in seeds)
        return [by_name[name] for name in names if name in by_name]

    text = []
    for question, answers in QUESTIONS.items():
        rows = []
        for ratio, variant in product(RATIOS, answers):
            if ours := found(variant, ratio):
                less = "" if variant is answers[0] else difference_cell(difference(ours, found(answers[0], ratio)))
                rows.append([variant.title, f"{ratio:.0%}", _seeds(ours), spread_cell(ours), less])
        head = ["variant", "pruned", "seeds", "top-1 (%)", "vs. P3B (points)"]
        text += [f"## {question}", "", *(table(head, rows) if rows else ["No run is recorded.", ""])]
    rows = [
        [variant.title, f"{ratio:.0%}", _seeds(ours), *_returned(ours)]
        for ratio, variant in product(RATIOS, variants())
        if (ours := found(variant, ratio))
    ]
    tested = " and ".join(sorted({f"{line['images']:,} {line['part']} images" for line in lines}))
    return [
        *text,
        "## How often do pruned elements return?",
        "",
        "An element (a channel of a gate) returns where its mask was below 0.5 before a mask update and is not after it. The",
        "share is of all elements that were pruned before an update, summed over all updates of a run.",
        "",
        *table(["variant", "pruned", "seeds", "mask updates", "returned, a run", "of those that could"], rows),
        "## How to read it",
        "",
        f"- Accuracy on {tested}. {DIFFERENCES}",
        "",
        "## How the runs were made",
        "",
        *circumstances(lines),
    ]


def _seeds(lines: Sequence[Line]) -> str:
    return ", ".join(str(line["seed"]) for line in lines)


def _returned(lines: Sequence[Line]) -> list[str]:
    elements, chances, updates = (sum(line["returned"][key] for line in lines) for key in ("elements", "chances", "updates"))
    share = f"{elements / chances:.2%}" if chances else "-"
    return [f"{updates / len(lines):.0f}", f"{elements / len(lines):,.0f}", share]


STUDY = Study("ablations", __doc__ or "", runs, tables, borrows=RESULTS / "table.jsonl")

if __name__ == "__main__":
    sys.exit(main(STUDY))
