"""`p3b train`: transfer a dense model to a data set. `p3b finetune` is the same with a small model."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from p3b.data import DataSplits
from p3b.run.final_table import as_deployed, figures_of, measure_speeds, plain, reported_part, show_figures
from p3b.run.option_checks import check
from p3b.run.options import TrainConfig
from p3b.run.pace import Course, Phase
from p3b.run.stage import finished_summary, open_stage
from p3b.run.training import Epochs, train_epochs
from p3b.vit.cost import count_parameters


def train(config: TrainConfig, name: str = "train", splits: DataSplits | None = None) -> dict[str, Any]:
    """Train a model without pruning it; returns the summary.

    Args:
        config: settings.
        name: of the stage: "train", or "finetune" for a small model.
        splits: the data where they are open already; else they are opened.

    Raises:
        UserError: settings, data or weights that cannot be used. Stopped: a signal asked for it; --resume goes on.
    """
    check(config)
    if (summary := finished_summary(config, name)) is not None:
        return summary
    with open_stage(config, name, splits) as stage:
        model = stage.model
        checkpoint = stage.begin()
        if checkpoint is None:
            stage.warn_of_little(config.training.epochs)
        steps = config.training.epochs * stage.recipe.steps_per_epoch
        stage.screen.follow(Course((Phase(name, steps),), count_parameters(model)))
        train_epochs(stage, model, Epochs(name, config.training.epochs, config.training.lr), checkpoint=checkpoint)
        folder = stage.products.save(model)

        accuracies = stage.evaluation.final(model)
        timed = as_deployed(model, stage.machine)
        (speed,) = measure_speeds([timed], stage.preprocessing.input_size, stage.machine, batch_size=config.training.batch_size)
        part = reported_part(accuracies)
        found = accuracies[part]
        figures = figures_of(model, found.top1, found.top5, speed)
        title, classes = f"{name} on {stage.splits.description}", len(stage.splits.class_names)
        show_figures(stage.screen, title, {"model": figures}, part=part, images=found.images, classes=classes)
        stage.warn_of_guessing("the model", accuracies)
        stage.screen.say(f"model: {folder}")
        stage.screen.say(f"run:   {stage.folder.path}")
        return stage.write_summary({"model": asdict(figures), "part": part, "accuracy": plain(accuracies)})
