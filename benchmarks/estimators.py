"""How well do cheap estimators of block benefit stand in for the paper's probes?

    python benchmarks/estimators.py run                          # all that is not in the record yet; resumable
    python benchmarks/estimators.py run --only animals-watch-    # those whose name begins so
    python benchmarks/estimators.py table                        # the part of docs/performance.md made from the JSON lines

Three figures judge an estimator on real transfer (CIFAR-10's vehicles to its animals; printed letters to handwritten digits):

- watch: one run in which the paper's probes decide and all others observe the same features and decide nothing. Spearman's
  rank correlation over blocks between an estimator's benefits and the paper's, for every interval between two mask updates.
- top-1 on the test part after pruning by it to 50 % and 75 %, with the same seeds, data and recipe.
- speed: the time of a step against a plain step, in turns.

A run that is in docs/results/estimators.jsonl already is not made again; one that was interrupted is resumed.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor

from animals import MODEL, NORMALIZATION, RECIPE
from harness.command import Bench, Given, main
from harness.pages import Part, how_it_was_run, table
from harness.records import RESULTS, ROOT, Line, add_line, read_lines, write_lines
from harness.turns import CPU, take_turns
from p3b.commands.demo import demo_configs
from p3b.commands.prune import prune
from p3b.core.masks import rank_scores
from p3b.run.options import DemoConfig, PruneConfig
from p3b.scoring.estimator import BenefitEstimator, Criterion
from p3b.scoring.estimators import ESTIMATORS, ProbeSettings
from training import CYCLES, Shape, Training

JUDGED = ("paper", "linear", "ridge", "low_rank", "subsampled")
SEEDS, RATIOS = (0, 1), (0.5, 0.75)
IMAGES, PRUNE_EPOCHS, FINETUNE_EPOCHS = 1500, 6, 5
ANIMALS = (
    "--data-set FOLDER --data-path SHARED/cifar10-animals-train.tar --test-path SHARED/cifar10-animals-test.tar "
    f"--val-share 0.02 --max-train-images {IMAGES} {MODEL} {NORMALIZATION} {RECIPE} "
    f"--epochs {PRUNE_EPOCHS} --finetune-epochs {FINETUNE_EPOCHS} --prune-start-epoch 1 --prune-sparse-epoch 3"
)
"""The recipe of `benchmarks/animals.py`, with half of its images and fewer epochs, so that many runs fit into an evening."""


@dataclass(frozen=True)
class Transfer:
    """A data set with its source model: the shape that speed is measured with, and what the tables call it."""

    title: str
    shape: Shape


TRANSFERS: Mapping[str, Transfer] = {
    "animals": Transfer(
        f"vehicles to animals ({IMAGES:,} images)",
        Shape("animals", "vit_tiny_patch16_224", 64, 5, {"img_size": 32, "patch_size": 4, "embed_dim": 128, "num_heads": 4}),
    ),
    "digits": Transfer(
        "letters to digits",
        Shape(
            "digits",
            "vit_tiny_patch16_224",
            64,
            9,
            {"img_size": 16, "patch_size": 4, "embed_dim": 64, "depth": 6, "num_heads": 4},
        ),
    ),
}


class Panel:
    """Estimators that observe the same stream at the same steps; only the first one's benefits are used.

    A `BenefitEstimator`. What all of them found is added, step by step, to a file of JSON lines.
    """

    every = 1

    def __init__(self, members: Mapping[str, BenefitEstimator], record: Path) -> None:
        self._members, self._record = members, record
        self._steps_done = 0
        self._found: dict[str, Tensor] = {}

    def due(self) -> bool:
        return True

    def observe(self, stream_SND: Sequence[Tensor], criterion: Criterion, targets: Tensor) -> tuple[Tensor, Tensor]:
        losses = []
        for name, member in self._members.items():
            if member.due():
                self._found[name], loss = member.observe(stream_SND, criterion, targets)
                losses.append(loss)
        return self._found[next(iter(self._members))], torch.stack(losses).sum()

    def train(self, gradients_finite: Tensor, scaler: torch.amp.GradScaler | None) -> None:
        for member in self._members.values():
            member.train(gradients_finite, scaler)
        add_line(self._record, {"step": self._steps_done, **{name: found.tolist() for name, found in self._found.items()}})
        self._found = {}
        self._steps_done += 1

    def state_dict(self) -> dict[str, Any]:
        members = {name: member.state_dict() for name, member in self._members.items()}
        return {"panel": members, "panel_steps": self._steps_done}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, member in self._members.items():
            member.load_state_dict(state["panel"][name])
        self._steps_done = int(state["panel_steps"])
        write_lines(self._record, [line for line in read_lines(self._record) if line["step"] < self._steps_done])


def names() -> list[str]:
    """All runs: DATA-speed, DATA-watch-SEED, DATA-PERCENT-ESTIMATOR-SEED; the short ones first."""
    found = [f"{data}-speed" for data in TRANSFERS]
    for data in reversed(TRANSFERS):
        found += [f"{data}-watch-{seed}" for seed in SEEDS]
        found += [f"{data}-{ratio:.0%}-{name}-{seed}".replace("%", "") for seed in SEEDS for ratio in RATIOS for name in JUDGED]
    return found


def measure(name: str, given: Given) -> dict[str, Any]:
    """Make one run."""
    shared, work = given.shared / "data", given.work
    data, *rest = name.split("-")
    if rest == ["speed"]:
        result = _speed(TRANSFERS[data].shape)
    elif rest[0] == "watch":
        result = _watch(_config(data, shared, work / name, 0.5, "paper", int(rest[1])), work / f"{name}.jsonl")
    else:
        result = _top1(_config(data, shared, work / name, int(rest[0]) / 100, rest[1], int(rest[2])))
    return {"threads": torch.get_num_threads(), "result": result}


def _config(data: str, shared: Path, folder: Path, ratio: float, estimator: str, seed: int) -> PruneConfig:
    """Settings of a run of `p3b prune`; an interrupted one is resumed."""
    if data == "digits":
        _, config = demo_configs(DemoConfig(output_dir=folder, prune_ratio=ratio, seed=seed))
    else:
        flags = shlex.split(ANIMALS.replace("SHARED", str(shared)))
        config = tyro.cli(PruneConfig, args=flags, config=(tyro.conf.OmitArgPrefixes,))
    return replace(
        config,
        prune=replace(config.prune, prune_ratio=ratio, prune_benefit=estimator, dense_run=None),
        run=replace(config.run, output_dir=folder, seed=seed, resume=True, overwrite=False, device="cpu"),
    )


def _top1(config: PruneConfig) -> dict[str, Any]:
    summary = prune(config)
    model = summary["pruned"]
    return {"top1": model["top1"], "params": model["params"]}


def _watch(config: PruneConfig, record: Path) -> dict[str, Any]:
    """Prune by the paper's probes while all others watch; without fine-tuning, where there is nothing to watch."""

    def panel(settings: ProbeSettings) -> Panel:
        return Panel({member: ESTIMATORS[member](settings) for member in JUDGED}, record)

    folder = config.run.output_dir
    assert folder is not None
    if not folder.exists():
        record.unlink(missing_ok=True)  # of a run that came to nothing
    ESTIMATORS["panel"] = panel
    try:
        prune(replace(config, prune=replace(config.prune, prune_benefit="panel", finetune_epochs=0)))
    finally:
        del ESTIMATORS["panel"]
    edges = [line["step"] for line in read_lines(folder / "prune" / "blocks.jsonl")]
    return agreement(read_lines(record), edges)


def agreement(steps: Sequence[Mapping[str, Any]], edges: Sequence[int]) -> dict[str, Any]:
    """Spearman's correlation with the paper's benefits over blocks, interval by interval.

    Args:
        steps: one line a step: "step" and, by estimator, (2, B) benefits where it observed that step.
        edges: steps at whose end an interval ends; the first one is of the length of the second.

    Returns:
        By estimator: "cls" and "patch", one correlation for each interval in which it observed a step.
    """
    length = edges[1] - edges[0] if len(edges) > 1 else edges[0]
    found: dict[str, dict[str, list[float]]] = {name: {"cls": [], "patch": []} for name in JUDGED if name != "paper"}
    for start, end in zip([max(0, edges[0] - length), *edges], edges, strict=False):
        within = [line for line in steps if start <= line["step"] < end]
        means = {name: _mean([line[name] for line in within if name in line]) for name in JUDGED}
        for name, by_kind in found.items():
            if means[name] is not None and means["paper"] is not None:
                for kind, mine, theirs in zip(("cls", "patch"), means[name], means["paper"], strict=True):
                    by_kind[kind].append(spearman(mine, theirs))
    return found


def spearman(a: Tensor, b: Tensor) -> float:
    """Pearson's correlation of the ranks."""
    return float(torch.corrcoef(torch.stack([rank_scores(a), rank_scores(b)]))[0, 1])


def _mean(benefits: Sequence[Any]) -> Tensor | None:
    return torch.tensor(benefits, dtype=torch.float64).mean(0) if benefits else None


def _speed(shape: Shape) -> dict[str, Any]:
    sides = {name: Training(shape, CPU, "bf16", shape.prune_options(name)) for name in ("plain", *JUDGED)}
    return {"sides": take_turns(CPU, {name: side.step for name, side in sides.items()}, shape.rounds, CYCLES)}


# --- tables


def tables(lines: Sequence[Line]) -> list[str]:
    """One table for each transfer, made from the lines alone."""
    by_name = {line["name"]: line for line in lines}
    head = ["estimator", "rank correlation, class token", "patches"]
    head += [*(f"test top-1 at {ratio:.0%} (%)" for ratio in RATIOS), "step, relative to a plain one"]
    text: list[str] = []
    for data, transfer in TRANSFERS.items():
        if any(name.startswith(data) for name in by_name):
            rows = [_row(by_name, data, name) for name in JUDGED]
            text += [f"### {transfer.title[0].upper()}{transfer.title[1:]}", "", *table(head, rows)]
    hours = sum(line["seconds"] for line in lines) / 3600
    text += [f"{len(lines)} of {len(names())} runs, {hours:.1f} hours, seeds {', '.join(map(str, SEEDS))}.", ""]
    return text + how_it_was_run(lines)


def _row(by_name: Mapping[str, Line], data: str, estimator: str) -> list[str]:
    def of_seeds(name: str) -> Iterator[Any]:
        return (by_name[f"{name}-{seed}"]["result"] for seed in SEEDS if f"{name}-{seed}" in by_name)

    cells = [estimator]
    for kind in ("cls", "patch"):
        found = [value for result in of_seeds(f"{data}-watch") for value in result.get(estimator, {}).get(kind, ())]
        cells.append(f"{statistics.median(found):.2f} (least {min(found):.2f})" if found else "1" * (estimator == "paper"))
    for ratio in RATIOS:
        top1 = [result["top1"] for result in of_seeds(f"{data}-{100 * ratio:.0f}-{estimator}")]
        cells.append(f"{statistics.mean(top1):.2f} ({', '.join(f'{value:.2f}' for value in top1)})" if top1 else "")
    speed = by_name.get(f"{data}-speed")
    return [*cells, f"{speed['result']['sides'][estimator]['ratio']:.2f}" if speed else ""]


def _flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shared", type=Path, default=Path("../shared"), help="folder that holds data/ with the images")
    parser.add_argument("--work", type=Path, default=Path("runs/estimators"), help="folder for the run folders")


PART = Part("estimators.py", RESULTS / "estimators.jsonl", ROOT / "docs" / "performance.md", tables)
BENCH = Bench(__doc__, PART, names(), measure, _flags, keeps=True)

if __name__ == "__main__":
    sys.exit(main(BENCH))
