"""`p3b prune`: transfer a model to a data set and prune it on the way, and fine-tune where asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from timm.models.vision_transformer import VisionTransformer

from p3b.data import DataSplits
from p3b.deploy.card import write_card
from p3b.deploy.choice import AUTO, LayoutChoice, choose_layout, with_layout
from p3b.deploy.layouts import check_layout
from p3b.methods import effective_options, options_of_one_shot, own_in_warm_up
from p3b.pruner import Pruner
from p3b.run.dense_run import read_dense_run, require_same_images
from p3b.run.distillation import SelfDistillation, open_distillation
from p3b.run.final_table import (
    as_deployed,
    figures_of,
    measure_speeds,
    plain,
    reported_part,
    show_figures,
)
from p3b.run.inputs import open_model
from p3b.run.method_options import method_options_of
from p3b.run.one_shot import CalibrationImages, calibrate, compensated_on, require_trained
from p3b.run.option_checks import check
from p3b.run.options import ModelOptions, PruneConfig, PruneOptions
from p3b.run.pace import Course
from p3b.run.prune_plan import PrunePlan, phases_of, plan_pruning
from p3b.run.recipe import answer_teacher_apart
from p3b.run.stage import Stage, finished_summary, open_stage
from p3b.run.training import Epochs, train_epochs
from p3b.run.warm_up import WARM_UP, WarmUp, depends_on
from p3b.storage.artifact import model_config
from p3b.vit.architecture import build_dense
from p3b.vit.cost import count_parameters, dense_params

LAYOUT_BATCHES = (1, 32)
"""Batch sizes that layouts are measured with at the end: a single image, and many."""


def prune(config: PruneConfig, warm_up: Path | None = None, splits: DataSplits | None = None) -> dict[str, Any]:
    """Transfer and prune on the way, and fine-tune where asked for; returns the summary.

    Args:
        config: settings.
        warm_up: folder of a warm-up (`p3b.run.warm_up`) of the same settings, to go on from in place of training it again;
            the result is the same.
        splits: the data where they are open already; else they are opened.

    Raises:
        UserError: settings, data or weights that cannot be used, or a warm-up of other settings. Stopped: a signal asked for
            it; --resume goes on.
    """
    options, lr = config.prune, config.training.lr
    method_options = method_options_of(options, config.run.seed)
    check_layout(options.layout, [AUTO])
    check(config)
    if (summary := finished_summary(config, "prune")) is not None:
        return summary
    dense_run = None if options.dense_run is None else read_dense_run(options.dense_run)
    with open_stage(config, "prune", splits) as stage:
        model, recipe = stage.model, stage.recipe
        _require_same_images(stage, dense_run, options.dense_run)
        all_params = count_parameters(model)
        plan = plan_pruning(options, config.training.epochs, recipe.steps_per_epoch, recipe.options.grad_accum_steps)
        distillation = open_distillation(stage, config, plan.schedule.start)
        pruner = _pruner(model, options, plan, method_options)
        images = CalibrationImages(stage, options.calibration_images)
        fitted_on = compensated_on(stage, config, pruner, images)
        dense = None if plan.epochs else plain(require_trained(stage))
        checkpoint = _begin(stage, pruner, options.prune_method, method_options, warm_up)
        _say_plan(stage, pruner, options, method_options, plan)
        stage.screen.follow(Course(phases_of(plan, recipe.steps_per_epoch), all_params, _goal_params(pruner, options)))
        if checkpoint is None:
            stage.warn_of_little(plan.epochs + plan.finetune_epochs, plan.gradual, options.prune_steps_update_mask)

        if checkpoint is None or checkpoint["progress"]["place"]["part"] in ("prune", WARM_UP):
            if plan.at_once:
                pruner.detach()  # it has seen that the budget can be met; it is to measure the model after the warm-up
                epochs = Epochs(WARM_UP, plan.epochs, lr, until=plan.schedule.start, keeps_best=False)
                train_epochs(stage, model, epochs, distillation=distillation, checkpoint=checkpoint)
                pruner = _pruner(model, options, plan, method_options)
            elif plan.epochs:
                epochs = Epochs("prune", plan.epochs, lr)
                train_epochs(stage, model, epochs, pruner=pruner, distillation=distillation, checkpoint=checkpoint)
            if plan.one_shot:
                calibrate(stage, pruner, images, order=options.order_heads)
            _decide(stage, pruner, plan)
            _shrink(stage, pruner, model, all_params, fitted_on)
            checkpoint = None
        else:
            model = _reopen_small(stage, config.model, distilled=recipe.options.teacher_model is not None)
        if plan.finetune_epochs:
            epochs = Epochs("fine-tune", plan.finetune_epochs, options.finetune_lr or lr, first=plan.epochs)
            train_epochs(stage, model, epochs, distillation=distillation, checkpoint=checkpoint)
        folder = stage.products.save(model)
        accuracy = dense if dense_run is None else dense_run["accuracy"]
        summary = _tell(stage, model, folder, options, accuracy, distillation, config.run.figure_format)
        stage.machine.on_main(lambda: write_card(folder, name=str(folder)))
        return summary


def _pruner(model: VisionTransformer, options: PruneOptions, plan: PrunePlan, method_options: Mapping[str, Any]) -> Pruner:
    ratio, method, compute = options.prune_ratio, options.prune_method, options.prune_compute
    return Pruner(model, ratio, method, plan.gradual, compute=compute, **method_options)


def _require_same_images(stage: Stage, dense_run: Mapping[str, Any] | None, folder: Path | None) -> None:
    """Refuse a dense run that was measured on other images."""
    if dense_run is not None and folder is not None:
        parts = {name: len(images) for name, images in stage.evaluation.parts.items()}
        require_same_images(dense_run["accuracy"], parts, folder)


def _begin(
    stage: Stage, pruner: Pruner, method: str, method_options: Mapping[str, Any], warm_up: Path | None
) -> dict[str, Any] | None:
    """Begin the stage, after the warm-up where there is one; the checkpoint to go on from."""
    if warm_up is None:
        return stage.begin()
    shared = WarmUp(warm_up)
    shared.require(depends_on(stage, method, method_options, pruner.schedule))
    checkpoint = stage.begin()
    if checkpoint is not None:
        return checkpoint
    return shared.take_up(stage, pruner, keeps_method=bool(own_in_warm_up(method, method_options)))


def _say_plan(stage: Stage, pruner: Pruner, options: PruneOptions, method_options: Mapping[str, Any], plan: PrunePlan) -> None:
    schedule, say = plan.schedule, stage.screen.say
    if plan.at_once:
        say(f"schedule in optimizer steps: a warm-up of {schedule.start}, then the model is cut in one shot")
    elif pruner.one_shot:
        say("one shot: the model is cut as it is, nothing is trained before")
    else:
        say(
            f"schedule in optimizer steps: pruning starts at {schedule.start}, reaches its target at {schedule.sparse}, ends "
            f"at {schedule.final}; masks are updated every {schedule.update_every}"
        )
    taken = options_of_one_shot(options.prune_method, method_options) if pruner.one_shot else method_options
    estimator = effective_options(options.prune_method, taken).get("estimator")
    if estimator is not None and not options.prune_keep_ratios:
        say(f"block benefit is estimated by --prune-benefit {estimator}")
    if options.prune_blocks_only:
        say("the prune ratio applies to the blocks only")


def _goal_params(pruner: Pruner, options: PruneOptions) -> int:
    """Parameters that are to stay, all of the model counted."""
    layout = pruner.layout
    sizes = [dense_params(block) for block in layout.blocks]
    if options.prune_keep_ratios:
        return layout.other_params + round(
            sum(ratio * size for ratio, size in zip(options.prune_keep_ratios, sizes, strict=True))
        )
    if options.prune_blocks_only:
        return layout.other_params + round((1 - options.prune_ratio) * sum(sizes))
    return round((1 - options.prune_ratio) * (layout.other_params + sum(sizes)))


def _decide(stage: Stage, pruner: Pruner, plan: PrunePlan) -> None:
    """Make the last decision and record it."""
    steps = plan.schedule.start if plan.one_shot else plan.schedule.final
    stage.records.log_decision(pruner.decide_last(), "finalize", steps, pruner.kept_params())
    if plan.one_shot:
        return
    found = stage.records.returned()
    stage.screen.detail(
        f"pruned elements that came back: {found.elements:,} of {found.chances:,}, in {found.updates} mask updates"
    )


def _shrink(
    stage: Stage, pruner: Pruner, model: VisionTransformer, dense_params: int, images: CalibrationImages | None
) -> None:
    """Make the model small, compensated on images where there are some, evaluate it, and save it: what follows can be resumed
    from there.
    """
    if images is not None:
        stage.screen.say(f"compensating what goes on {images.count:,} training images")
    pruner.shrink(None if images is None else images.without_targets())
    part, accuracy = stage.evaluation.watched(model)
    kept = f"{count_parameters(model):,} of {dense_params:,} parameters"
    stage.screen.say(f"shrunk to {kept}: {part} top-1 {accuracy.top1:.2f} %")
    stage.products.save_sparse_checkpoint(model)
    stage.products.save(model)


def _reopen_small(stage: Stage, options: ModelOptions, *, distilled: bool) -> VisionTransformer:
    """The shrunk model before fine-tuning, in the state of training that it was shrunk in."""
    small = replace(options, model_path=stage.products.sparse_checkpoint, model_pretrained=False)
    opened = open_model(small, len(stage.splits.class_names), stage.provenance["seed"])
    answer_teacher_apart(opened.model, enable=distilled)
    return stage.machine.put(opened.model)


def _tell(
    stage: Stage,
    model: VisionTransformer,
    folder: Path,
    options: PruneOptions,
    dense_accuracy: Mapping[str, Any] | None,
    distillation: SelfDistillation | None,
    figure_format: str,
) -> dict[str, Any]:
    """Evaluate the small model, compare it with the dense one, and write the summary."""
    accuracies = stage.evaluation.final(model)
    dense = build_dense(model_config(model)["architecture"]).to(stage.machine.device)
    choices = _layout_choices(as_deployed(model, stage.machine), options.layout) if stage.machine.is_main else []
    timed = model if not choices else with_layout(model, choices[-1].layout)
    image_shape, batch_size = stage.preprocessing.input_size, stage.recipe.options.batch_size
    speeds = measure_speeds([dense, timed], image_shape, stage.machine, batch_size=batch_size)
    part = reported_part(accuracies)
    found = accuracies[part]
    columns = {
        "dense": figures_of(dense, *_dense_accuracy(dense_accuracy, part), speeds[0]),
        "pruned": figures_of(model, found.top1, found.top5, speeds[1]),
    }
    drawn = stage.records.draw(figure_format)
    classes = len(stage.splits.class_names)
    show_figures(stage.screen, stage.splits.description, columns, part=part, images=found.images, classes=classes)
    stage.warn_of_guessing("the pruned model", accuracies)
    _say_where(stage, folder, choices, drawn, options.dense_run)
    return stage.write_summary(
        {
            **{name: asdict(figures) for name, figures in columns.items()},
            "part": part,
            "accuracy": plain(accuracies),
            "layouts": [asdict(choice) for choice in choices],
            **({} if distillation is None else {"distillation": distillation.summary()}),
            "reached_prune_ratio": 1 - columns["pruned"].params / columns["dense"].params,
            "returned": asdict(stage.records.returned()),
            "figures": [str(figure) for figure in drawn],
        },
        options.dense_run,
    )


def _say_where(
    stage: Stage, folder: Path, choices: Sequence[LayoutChoice], drawn: Sequence[Path], dense_run: Path | None
) -> None:
    say = stage.screen.say
    if dense_run is None and stage.settings.given["training"]["epochs"] == 0:
        say("dense accuracy: that of the model before the cut")
    elif dense_run is None:
        say("dense accuracy: not measured; give --dense-run to compare")
    else:
        say(f"dense accuracy: from {dense_run}")
    for choice in choices:
        say(f"layout:  {choice.layout} for batches of {choice.batch_size}")
    say(f"model:   {folder}")
    say(f"run:     {stage.folder.path}")
    for figure in drawn:
        say(f"figure:  {figure}")


def _dense_accuracy(accuracy: Mapping[str, Any] | None, part: str) -> tuple[float | None, float | None]:
    """Top-1 and top-5 of the dense model, on the part that final figures are taken from."""
    return (None, None) if accuracy is None else (accuracy[part]["top1"], accuracy[part]["top5"])


def _layout_choices(model: VisionTransformer, layout: str) -> list[LayoutChoice]:
    """The layout for each batch size, measured where --layout is auto."""
    if layout == AUTO:
        return [choose_layout(model, batch_size=batch_size) for batch_size in LAYOUT_BATCHES]
    return [LayoutChoice(layout, batch_size, {}) for batch_size in LAYOUT_BATCHES]
