"""`p3b plan`: what `p3b prune` with the same words would do. Nothing is trained and nothing is written."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from timm.models.vision_transformer import VisionTransformer

from p3b.commands.data import data_lines
from p3b.data import DataSplits
from p3b.errors import BudgetError
from p3b.pruner import Pruner
from p3b.run.forecast import BudgetForecast, Seconds, budget_forecasts, largest_ratio, seconds_of_cut, seconds_of_run
from p3b.run.inputs import open_model, open_splits
from p3b.run.machine import Machine, open_machine
from p3b.run.method_options import method_options_of
from p3b.run.one_shot import compensates_cut, share_of_images
from p3b.run.option_checks import check
from p3b.run.options import PlanConfig
from p3b.run.prune_plan import PrunePlan, plan_pruning
from p3b.run.recipe_choice import recipe_lines
from p3b.run.recipe_facts import steps_of_epoch
from p3b.run.screen import Screen, open_screen
from p3b.storage import artifact


def show_plan(config: PlanConfig, splits: DataSplits | None = None) -> list[BudgetForecast]:
    """Print data, recipe, time and budgets; returns what each budget gives, the dense model first.

    Args:
        config: settings.
        splits: the data where they are open already; else they are opened.

    Raises:
        UserError: settings, data or a model that `p3b prune` would refuse; a budget that cannot be met.
    """
    check(config)
    run = config.run
    with open_machine(run.device, run.timeout_minutes, config.training.precision) as machine:
        screen = open_screen(run, machine.is_main)
        splits = splits or open_splits(config.data, run.seed, machine.processes)
        for line in (*data_lines(splits, config.plan.look_at), "", *recipe_lines(config), ""):
            screen.say(line)
        model = machine.put(_shape(config, len(splits.class_names)))
        ratio, method = config.prune.prune_ratio, config.prune.prune_method
        pruning = {"prune_ratio": ratio, "method": method, **method_options_of(config.prune, run.seed)}
        narrows = pruning.get("stream", 0) != 0  # then embeddings and head shrink as well
        largest = 1.0 if narrows else largest_ratio(model)
        if ratio > largest and not config.prune.prune_blocks_only:
            raise BudgetError(f"A prune ratio of {ratio:g} cannot be met; the largest is {largest:.3f}.")
        steps_per_epoch = steps_of_epoch(len(splits.train), config.training, machine.processes.world_size)
        plan = plan_pruning(config.prune, config.training.epochs, steps_per_epoch, config.training.grad_accum_steps)
        seconds = _seconds(config, model, pruning, splits, plan, steps_per_epoch, machine)
        if plan.one_shot:
            cut = _seconds_of_cut(config, model, pruning, len(splits.train), screen, machine)
            seconds = replace(seconds, cut=cut)
        _say_run(screen, plan, steps_per_epoch, seconds)
        ratios = sorted({*config.plan.budgets, ratio} - {0.0})
        forecasts = budget_forecasts(model, ratios, machine, pruning)
        met = {forecast.prune_ratio for forecast in forecasts}
        _show_budgets(screen, config.model.model, forecasts, [ratio for ratio in ratios if ratio not in met])
        if not narrows:
            screen.result(f"at most {largest:.1%} of the parameters can go: the rest lies outside the blocks and stays")
        return forecasts


def _shape(config: PlanConfig, num_classes: int) -> VisionTransformer:
    """The model that would be pruned, with random weights unless a file brings its shape."""
    path = config.model.model_path
    is_saved = path is not None and artifact.is_artifact(path)
    options = replace(config.model, model_pretrained=False, model_path=path if is_saved else None)
    return open_model(options, num_classes, config.run.seed).model


def _seconds(
    config: PlanConfig,
    model: VisionTransformer,
    pruning: Mapping[str, Any],
    splits: DataSplits,
    plan: PrunePlan,
    steps_per_epoch: int,
    machine: Machine,
) -> Seconds:
    watched = splits.val if splits.val is not None else splits.test
    epochs = plan.epochs + plan.finetune_epochs
    return seconds_of_run(
        model,
        pruning,
        config.training,
        machine,
        steps=(plan.schedule.start if plan.one_shot else plan.schedule.final, plan.finetune_epochs * steps_per_epoch),
        evaluated=epochs * (0 if watched is None else len(watched)),
        measured_steps=config.plan.measured_steps,
        gradual=not plan.one_shot,
    )


def _seconds_of_cut(
    config: PlanConfig,
    model: VisionTransformer,
    pruning: Mapping[str, Any],
    train_images: int,
    screen: Screen,
    machine: Machine,
) -> float:
    cut = copy.deepcopy(model)
    pruner = Pruner(cut, **pruning)
    return seconds_of_cut(
        cut,
        pruner,
        machine,
        images=share_of_images(config.prune.calibration_images, train_images, machine.processes.world_size),
        at_a_time=config.training.batch_size,
        order=config.prune.order_heads,
        compensated=compensates_cut(config, cut, pruner, screen.say),
    )


def _say_run(screen: Screen, plan: PrunePlan, steps_per_epoch: int, seconds: Seconds) -> None:
    schedule = plan.schedule
    if plan.epochs == 0:
        screen.say(f"run: one shot, and {plan.finetune_epochs} epochs of fine-tuning, {steps_per_epoch} steps each")
    elif plan.at_once:
        screen.say(
            f"run: {schedule.start} steps of warm-up, the cut in one shot, and {plan.finetune_epochs} epochs of fine-tuning, "
            f"{steps_per_epoch} steps each"
        )
    else:
        screen.say(
            f"run: {plan.epochs} epochs of pruning and {plan.finetune_epochs} of fine-tuning, {steps_per_epoch} steps each; "
            f"pruning starts at step {schedule.start}, is sparse at {schedule.sparse}, ends at {schedule.final}; masks are "
            f"updated every {schedule.update_every}"
        )
    parts = {
        "warm-up" if plan.one_shot else "pruning": seconds.pruning,
        "the cut": seconds.cut,
        "fine-tuning": seconds.fine_tuning,
        "evaluation": seconds.evaluation,
    }
    told = ", ".join(f"{duration(taken)} {what}" for what, taken in parts.items() if taken)
    screen.result(f"time: about {duration(seconds.total)} on this machine as it is now ({told})")


def _show_budgets(screen: Screen, name: str, forecasts: Sequence[BudgetForecast], cannot: Sequence[float]) -> None:
    rows = [
        (
            f"{1 - each.prune_ratio:g}",
            f"{each.prune_ratio:g}",
            f"{each.params:,}",
            f"{each.macs / 1e6:,.1f}",
            f"{each.latency_ms:.2f}",
            f"{each.images_per_second:,.0f}",
        )
        for each in forecasts
    ]
    columns = ("--keep", "goes", "parameters", "MACs (M)", "ms an image", "images/s by 32")
    screen.table(f"{name}, evenly pruned stand-ins", columns, rows)
    for ratio in cannot:
        screen.result(f"a prune ratio of {ratio:g} cannot be met")


def duration(seconds: float) -> str:
    """In words: 40 s, 12 min, 3.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
