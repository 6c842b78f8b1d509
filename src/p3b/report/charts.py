"""The figures of a run's report, each with the numbers it shows, from the records of its stages.

Every function returns a `Picture`, or None where the run has no numbers for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from p3b.report.evaluation import ClassAccuracy, ConfusedPair, calibration, class_accuracies, confused_pairs
from p3b.report.figures import SOFT_INK, STYLE, draw_benefit, draw_keep_ratios, new_figure
from p3b.report.record import StageRecord
from p3b.report.svg import Picture, picture

BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"
"""Okabe and Ito: told apart by every eye."""
NARROW = 5.4
"""Width in inches of a figure that stands beside another one, and that a phone shows whole."""
MOST_CLASSES, MOST_PAIRS = 30, 12
"""Rows of the figures of classes; where there are more classes, those that lost most are shown."""


def learning_curves(stage: StageRecord) -> Picture | None:
    """Loss, accuracy and parameters over the epochs, with the phases shaded."""
    epochs = stage.epochs
    if not epochs:
        return None
    part = watched_part(stage)
    xs = [epoch["epoch"] for epoch in epochs]
    with matplotlib.rc_context(STYLE):
        figure = new_figure(width=NARROW, height=5.6)
        loss, accuracy, params = figure.subplots(3, 1, sharex=True, height_ratios=(1, 1, 0.6))
        loss.plot(xs, [epoch["train_loss"] for epoch in epochs], color=BLUE, label="training")
        loss.plot(xs, [epoch[f"{part}_loss"] for epoch in epochs], color=ORANGE, linestyle="--", label=part)
        loss.set_ylabel("loss")
        loss.legend(loc="upper right")
        accuracy.plot(xs, [epoch[f"{part}_top1"] for epoch in epochs], color=GREEN)
        accuracy.set_ylabel(f"{part} top-1 (%)")
        params.step(xs, [epoch["kept_params"] / 1e6 for epoch in epochs], where="post", color=SOFT_INK)
        params.set_ylabel("parameters (M)")
        params.set_ylim(bottom=0)
        params.set_xlabel("epoch")
        for panel in (loss, accuracy, params):
            _shade(panel, epochs, with_names=panel is loss)
    head = ("epoch", "phase", "train_loss", f"{part}_loss", f"{part}_top1", "kept_params", "lr")
    rows = [[epoch.get(key) for key in head] for epoch in epochs]
    says = (
        f"Training loss, {part} loss, {part} top-1 accuracy and parameters over {len(epochs)} epochs; "
        f"the last {part} top-1 is {epochs[-1][f'{part}_top1']:.2f} %."
    )
    return picture(figure, "learning-curves", "Loss and accuracy", says, head, rows)


def benefit(stage: StageRecord) -> Picture | None:
    """The benefit of every block over the epochs (the figure of arXiv 2506.23675)."""
    figure = draw_benefit(list(stage.updates))
    if figure is None:
        return None
    keys = ("benefit_cls", "benefit_patch", "importance")
    last = stage.updates[-1].blocks
    best = max(last, key=lambda block: block["benefit_cls"] or 0.0)
    says = f"Benefit of each block over the epochs, class token above, patches below. At the end {best['name']} helps most."
    return picture(
        figure, "benefit", "What each block does for the task", says, ("epoch", "block", *keys), _by_block(stage, keys)
    )


def keep_ratios(stage: StageRecord) -> Picture | None:
    """The share of its parameters that every block keeps: over depth, and over time."""
    figure = draw_keep_ratios(list(stage.updates))
    if figure is None:
        return None
    keys = ("keep_ratio", "keep_ratio_goal", "kept_params", "params")
    last = stage.updates[-1].blocks
    most, least = (choose(last, key=lambda block: block["keep_ratio"]) for choose in (max, min))
    says = (
        f"Share of its parameters that each block keeps. {most['name']} keeps most ({most['keep_ratio']:.0%}) "
        f"and {least['name']} least ({least['keep_ratio']:.0%})."
    )
    return picture(
        figure, "keep-ratios", "Where the parameters stayed", says, ("epoch", "block", *keys), _by_block(stage, keys)
    )


def network(stage: StageRecord) -> Picture | None:
    """The network before and after, every block as wide as its parameters."""
    if not stage.updates:
        return None
    blocks = stage.updates[-1].blocks
    widest = max(block["params"] for block in blocks)
    with matplotlib.rc_context(STYLE):
        figure = new_figure(width=NARROW, height=0.8 + 0.26 * len(blocks))
        panel = figure.subplots()
        for row, block in enumerate(blocks):
            colour = BLUE if block["kind"] == "attn" else ORANGE
            panel.add_patch(Rectangle((-block["params"] / 2, row - 0.4), block["params"], 0.8, fill=False, edgecolor=SOFT_INK))
            panel.add_patch(Rectangle((-block["kept_params"] / 2, row - 0.4), block["kept_params"], 0.8, color=colour))
        panel.set_xlim(-0.52 * widest, 0.52 * widest)
        panel.set_ylim(len(blocks) - 0.4, -0.6)
        panel.set_yticks(range(len(blocks)), [block["name"].removeprefix("blocks.") for block in blocks])
        panel.set_xticks([])
        for spine in panel.spines.values():
            spine.set_visible(False)
        panel.tick_params(length=0)
    kept, dense = (sum(block[key] for block in blocks) for key in ("kept_params", "params"))
    says = (
        f"The blocks to scale: outlines are the dense network, filled bars what stays ({kept:,} of {dense:,} parameters). "
        "Attention is blue, MLP orange."
    )
    rows = [(block["name"], block["params"], block["kept_params"]) for block in blocks]
    return picture(figure, "network", "The network to scale", says, ("block", "dense_params", "kept_params"), rows)


def classes(stage: StageRecord) -> Picture | None:
    """Accuracy of every class, dense and pruned; those that lost most come first."""
    found = class_accuracies(stage)
    if not found:
        return None
    figure = _draw_classes(found[:MOST_CLASSES])
    rows = [(entry.name, entry.images, entry.dense, entry.accuracy) for entry in found]
    return picture(figure, "classes", "Accuracy by class", _classes_say(found), ("class", "images", "dense", "accuracy"), rows)


def _draw_classes(shown: Sequence[ClassAccuracy]) -> Figure:
    with matplotlib.rc_context(STYLE):
        figure = new_figure(width=NARROW, height=1.4 + 0.27 * len(shown))
        panel = figure.subplots()
        dense = [entry.dense for entry in shown if entry.dense is not None]
        for row, (entry, before) in enumerate(zip(shown, dense, strict=False)):
            panel.plot([before, entry.accuracy], [row, row], color=SOFT_INK, linewidth=1.2, zorder=1)
        if dense:
            panel.plot(dense, range(len(dense)), "o", color="none", markeredgecolor=BLUE, label="dense")
        panel.plot([e.accuracy for e in shown], range(len(shown)), "s", color=ORANGE, label="this model", markersize=5)
        panel.set_yticks(range(len(shown)), [f"{entry.name} ({entry.images})" for entry in shown])
        panel.set_ylim(len(shown) - 0.4, -0.6)
        panel.set_xlabel("accuracy (%)")
        panel.grid(axis="x", color="#e4e4e4", linewidth=0.8)
        panel.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    return figure


def confusion(stage: StageRecord) -> Picture | None:
    """The pairs of classes that are taken for each other most often."""
    pairs = confused_pairs(stage)
    if not pairs:
        return None
    shown = pairs[:MOST_PAIRS]
    with matplotlib.rc_context(STYLE):
        figure = new_figure(width=NARROW, height=1.2 + 0.3 * len(shown))
        panel = figure.subplots()
        panel.barh(range(len(shown)), [pair.images for pair in shown], color=ORANGE, height=0.7)
        panel.set_yticks(range(len(shown)), [f"{pair.target}, taken for {pair.predicted}" for pair in shown])
        panel.set_ylim(len(shown) - 0.4, -0.6)
        panel.set_xlabel("images")
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    first: ConfusedPair = shown[0]
    counted = "1 image" if first.images == 1 else f"{first.images} images"
    says = f"The most frequent mistakes. Most often, {first.target} is taken for {first.predicted} ({counted})."
    rows = [(pair.target, pair.predicted, pair.images) for pair in pairs]
    return picture(figure, "confusion", "What is taken for what", says, ("target", "predicted", "images"), rows)


def reliability(stage: StageRecord) -> Picture | None:
    """How often the model is right when it says that it is so sure (a reliability diagram)."""
    found = calibration(stage)
    if found is None:
        return None
    with matplotlib.rc_context(STYLE):
        figure = new_figure(width=NARROW, height=4.6)
        panel = figure.subplots()
        panel.plot([0, 100], [0, 100], color=SOFT_INK, linestyle=(0, (4, 3)), linewidth=0.9)
        places, values = [b.confidence for b in found.bins], [b.accuracy for b in found.bins]
        most = max(b.images for b in found.bins)
        panel.plot(places, values, color=BLUE, linewidth=1.0)
        sizes = [max(6.0, 90.0 * b.images / most) for b in found.bins]
        panel.scatter(places, values, s=sizes, color=BLUE, clip_on=False, zorder=3)
        panel.set_xlabel("stated probability (%)")
        panel.set_ylabel("share that is right (%)")
        panel.set_xlim(0, 100)
        panel.set_ylim(0, 100)
    says = (
        f"Stated probability against the share that is right; the expected calibration error is {found.error:.1f} points. "
        "Above the diagonal the model is right more often than it says; a large point stands for many images."
    )
    rows = [(b.confidence, b.accuracy, b.images) for b in found.bins]
    return picture(figure, "reliability", "Calibration", says, ("confidence", "accuracy", "images"), rows)


def time_by_phase(stage: StageRecord) -> Picture | None:
    """Seconds of training and of everything else, by phase."""
    if not stage.epochs:
        return None
    rows = []
    for phase, group in groupby(stage.epochs, key=lambda epoch: epoch["phase"]):
        epochs = list(group)
        trained = sum(epoch["train_seconds"] for epoch in epochs)
        rows.append((phase, len(epochs), trained, sum(epoch["seconds"] for epoch in epochs) - trained))
    with matplotlib.rc_context(STYLE):
        figure = new_figure(width=NARROW, height=1.4 + 0.4 * len(rows))
        panel = figure.subplots()
        panel.barh(range(len(rows)), [row[2] for row in rows], color=BLUE, height=0.6, label="training")
        panel.barh(
            range(len(rows)),
            [row[3] for row in rows],
            left=[row[2] for row in rows],
            color=ORANGE,
            height=0.6,
            label="evaluation",
        )
        panel.set_yticks(range(len(rows)), [f"{row[0]} ({row[1]} epochs)" for row in rows])
        panel.set_ylim(len(rows) - 0.4, -0.6)
        panel.set_xlabel("seconds")
        panel.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    trained, other = (sum(row[column] for row in rows) for column in (2, 3))
    says = f"Time by phase: {trained:,.0f} s of training and {other:,.0f} s of evaluation."
    return picture(figure, "time", "Where the time went", says, ("phase", "epochs", "train_seconds", "other_seconds"), rows)


CHARTS = (benefit, keep_ratios, network, learning_curves, classes, confusion, reliability, time_by_phase)
"""The figures of a stage, in the order of the page."""


def draw_all(stage: StageRecord) -> list[Picture]:
    """Every figure that the stage has numbers for."""
    return [drawn for chart in CHARTS if (drawn := chart(stage)) is not None]


def watched_part(stage: StageRecord) -> str:
    """The part that was evaluated after each epoch: "val", or "test" where there is no validation part."""
    return "val" if stage.epochs and "val_top1" in stage.epochs[0] else "test"


def _by_block(stage: StageRecord, keys: Sequence[str]) -> list[list[Any]]:
    return [
        [update.epoch, block["name"], *(block.get(key) for key in keys)] for update in stage.updates for block in update.blocks
    ]


def _classes_say(found: Sequence[ClassAccuracy]) -> str:
    first = found[0]
    if first.dense is None:
        return f"Accuracy of each class; {first.name} is the lowest with {first.accuracy:.1f} %."
    if first.accuracy >= first.dense:
        return "Accuracy of each class, dense and after pruning; no class lost accuracy."
    return (
        f"Accuracy of each class, dense and after pruning; {first.name} lost most "
        f"({first.dense:.1f} to {first.accuracy:.1f} %)."
    )


def _shade(panel: Axes, epochs: Sequence[Mapping[str, Any]], *, with_names: bool) -> None:
    """Shade every second phase, and name the phases above the panel."""
    start = epochs[0]["epoch"] - 1
    for number, (phase, group) in enumerate(groupby(epochs, key=lambda epoch: epoch["phase"])):
        end = list(group)[-1]["epoch"]
        if number % 2:
            panel.axvspan(start, end, color="#f1f1ee", linewidth=0, zorder=0)
        if with_names:
            panel.annotate(
                phase, xy=((start + end) / 2, 1), xycoords=("data", "axes fraction"), xytext=(0, 3),
                textcoords="offset points", ha="center", va="bottom", fontsize=9, color=SOFT_INK,
            )  # fmt: skip
        start = end
