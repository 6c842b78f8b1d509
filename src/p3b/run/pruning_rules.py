"""Rules of a recipe for pruning: when masks close and how, by what blocks are judged, and what the small model is like."""

from __future__ import annotations

from typing import Any

from p3b.core.schedule import parse_duration
from p3b.run.option_checks import OF_GRADUAL
from p3b.run.options import AT_ONCE
from p3b.run.recipe_terms import Choice, Facts, Rule, Settings, global_batch, is_early, passes_of, steps_of, steps_per_epoch


def prune_schedule(facts: Facts, settled: Settings) -> Choice | None:
    """In one shot after a short warm-up, where that is known to be better: where a narrower stream can be compensated, and the
    warm-up shows enough images of a class for the model to be measured.

    Not where something is given that only masks which close step by step have, or that other forms of the small model need.
    """
    gradual = settled.keys() & set(OF_GRADUAL) or settled.get("prune_benefit", "removal") not in ("removal", "ridge")
    wide = settled.get("prune_stream", "auto") == 0 or settled.get("compensate") == "off"
    by_hand = any(settled.get(other) for other in _BY_HAND)
    if gradual or wide or by_hand or not (facts.narrows and facts.compensates and _narrows_widths(facts, settled)):
        return None
    warm_up = _warm_up_at_once(facts, settled, settled.get("epochs", passes_of(facts, settled)))
    if warm_up * global_batch(facts, settled) < _SEEN * facts.classes:
        return None
    return Choice("prune_schedule", AT_ONCE, "the sooner the model is small, the more it learns in the same time")


_BY_HAND = ("spare", "prune_keep_ratios")


def is_at_once(settled: Settings) -> bool:
    """Whether the model is cut in one shot after its warm-up."""
    return settled.get("prune_schedule") == AT_ONCE


def calibration_images(facts: Facts, settled: Settings) -> Choice | None:
    """What a cut at once is measured on: more images cost more steps and gave nothing (docs/experiments.md)."""
    if not is_at_once(settled):
        return None
    count = max(_FEW_CALIBRATED, min(_MOST_CALIBRATED, 2 * facts.classes))
    return Choice("calibration_images", count, f"enough to measure and compensate the cut, {facts.classes} classes")


_FEW_CALIBRATED, _MOST_CALIBRATED = 128, 1024


def prune_start(facts: Facts, settled: Settings) -> Choice | None:
    """How long the warm-up is: a share of the epochs of pruning, or the steps before a cut at once."""
    if not facts.prunes:
        return None
    if is_at_once(settled):
        in_all = steps_of(facts, settled, settled["epochs"])
        steps = _warm_up_at_once(facts, settled, settled["epochs"])
        return Choice("prune_start_epoch", f"{steps}steps", f"a warm-up of {steps:,} steps in {in_all:,}")
    share = 25 if is_early(facts) else 20
    steps = steps_of(facts, settled, share / 100 * settled["epochs"])
    return Choice("prune_start_epoch", f"{share}%", f"{steps} steps of warm-up")


def _warm_up_at_once(facts: Facts, settled: Settings, epochs: float) -> int:
    """Steps before a cut at once, in a run of so many epochs."""
    in_all = steps_of(facts, settled, epochs)
    return max(1, min(max(_WARM_UP_STEPS, round(_WARM_UP_SHARE * in_all)), in_all // 3))


_WARM_UP_STEPS, _WARM_UP_SHARE = 80, 0.03
"""Steps of the warm-up before a cut at once, and their share of the run in a longer one. With 10,000 animals 78 steps and
eleven epochs of the small model are better than 312 steps and eight (docs/experiments.md)."""


def prune_update(facts: Facts, settled: Settings) -> Choice | None:
    """How often masks are decided anew: a benefit over one or two batches is noise."""
    if not facts.prunes or "prune_steps_update_mask" in settled or is_at_once(settled):
        return None
    epochs, steps = settled["epochs"], steps_per_epoch(facts, settled)
    begin = parse_duration(settled["prune_start_epoch"], epochs, steps)
    end = parse_duration(settled.get("prune_finalize_epoch") or "100%", epochs, steps)
    span = max(1.0, (end - begin) * steps)
    interval = max(1, min(max(30, round(span / 20)), round(span / 3)))
    return Choice(
        "prune_update_every",
        f"{interval}steps",
        f"benefit averaged over {interval} batches, {span / interval:.0f} mask updates",
    )


def _narrow(setting: str, value: Any, reason: str) -> Rule:
    """A rule for what makes the small model an ordinary narrower one: of the methods that can, and where nothing forbids it."""

    def rule(facts: Facts, settled: Settings) -> Choice | None:
        able = facts.narrows and _narrows_widths(facts, settled)
        by_hand = any(settled.get(other) for other in _BY_HAND)
        return Choice(setting, value, reason) if able and not by_hand else None

    return rule


def prune_benefit(facts: Facts, settled: Settings) -> Choice | None:
    """What benefit is measured by while masks close step by step."""
    if not is_early(facts) or is_at_once(settled) or "block_benefit" not in _methods(settled):
        return None
    epochs, steps = settled["epochs"], steps_per_epoch(facts, settled)
    warm_up = parse_duration(settled["prune_start_epoch"], epochs, steps)
    seen = round(facts.images * warm_up / max(1, facts.classes))
    if seen < _SEEN:
        return Choice("prune_benefit", "removal", f"probes would see {seen} images of a class before pruning starts, too few")
    return Choice("prune_benefit", "linear", f"{facts.images:,} images: the probes that cost least are good enough")


_SEEN = 100
"""Images of a class in the warm-up from which on enough is known to judge blocks: with 5 linear probes knew nothing, with 400
they and a cut at once did (docs/results/equal_time_syllables.md, docs/results/equal_time.md).
"""


def prune_compute(facts: Facts, settled: Settings) -> Choice | None:
    if not _narrows_widths(facts, settled) or is_at_once(settled) or settled.get("compile"):
        return None
    return Choice("prune_compute", "active", f"{facts.images:,} images: steps that get quicker as pruning goes on")


def _narrows_widths(facts: Facts, settled: Settings) -> bool:
    """Whether it is early, and a method is asked for that can narrow widths and leave out what is closed."""
    return is_early(facts) and any(method in _NARROWING for method in _methods(settled))


def _methods(settled: Settings) -> tuple[str, ...]:
    """Methods that are asked for."""
    return tuple(settled.get("methods") or ()) or (settled.get("prune_method", "block_benefit"),)


_NARROWING = ("block_benefit", "uniform", "random")
"""Methods that can, and that need not compute all that is closed; block_pr is P3B as published, and keeps its widths."""
WIDTHS = (
    _narrow("prune_stream", "auto", "a narrower residual stream: a small model without indices, which trains and runs faster"),
    _narrow("align", 8, "whole heads and widths in multiples of 8 are faster"),
)


def one_shot_method(_facts: Facts, settled: Settings) -> Choice | None:
    if settled.keys() & _OF_BLOCK_BENEFIT:
        return None
    return Choice("prune_method", "taylor", "one ranking of the network loses least where nothing is trained")


_OF_BLOCK_BENEFIT = {
    "prune_keep_ratios", "prune_benefit", "prune_alpha", "prune_gamma", "prune_benefit_scale", "probe_lr", "align", "spare",
    "prune_stream",
}  # fmt: skip
"""Settings by which somebody asks for block_benefit without naming it."""
