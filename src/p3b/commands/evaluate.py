"""`p3b evaluate`: accuracy, size and speed of a saved model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

import timm

from p3b.data import DataSplits, Preprocessing
from p3b.deploy.choice import AUTO, with_layout
from p3b.deploy.hub import local_copy
from p3b.deploy.layouts import check_layout
from p3b.errors import ConfigError, WeightsError
from p3b.report.thresholds import FEWEST_FOR_TOP5
from p3b.run.class_match import with_classes_of
from p3b.run.evaluation import Evaluation
from p3b.run.failures import explained
from p3b.run.final_table import Figures, figures_of, measure_speeds, plain
from p3b.run.folder import StageFolder
from p3b.run.inputs import OpenedModel, count_unreadable, num_workers, open_model, open_splits, saved_class_names
from p3b.run.machine import Machine, open_machine
from p3b.run.option_checks import check_evaluation
from p3b.run.options import DataOptions, EvaluateConfig, ModelOptions, to_plain
from p3b.run.products import PRODUCTS
from p3b.run.screen import Screen, open_screen
from p3b.run.trained_images import Parts, parts_to_evaluate, trained_on
from p3b.train.evaluate import Accuracy
from p3b.vit.deployment import compact_of, layout_of


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Accuracy of a saved model on every part of a data set that it was not trained on, its size and its speed.

    With an output folder the result is written there, as stage "evaluate".

    Raises:
        ConfigError: no weights. WeightsError: it was not trained to classify. DataError: the data have classes that it does not
            know.
    """
    check_evaluation(config)
    check_layout(config.layout, [AUTO])
    if config.model.model_path is None and not config.model.model_pretrained:
        raise ConfigError(f"--model-path is missing: the model to evaluate, such as run/{PRODUCTS['prune']}.")
    title = str(config.model.model_path or config.model.model)
    if config.model.model_path is not None:
        config = replace(config, model=replace(config.model, model_path=local_copy(str(config.model.model_path))))
    run = config.run
    with open_machine(run.device, run.timeout_minutes, config.precision) as machine:
        screen = open_screen(run, machine.is_main)
        folder = None if run.output_dir is None else StageFolder(run.output_dir, "evaluate")
        if folder is not None:
            folder.check(resume=False, overwrite=run.overwrite)
        splits = _open_splits(config.data, config.model, run.seed, machine)
        opened = _open_trained(config.model, splits.class_names, run.seed)
        parts = _parts(config, splits, machine)
        with _claimed(folder, config, machine, screen), explained(machine.processes, run.output_dir, lambda: True):
            _tell_before(screen, splits, opened, parts)
            with machine.precision.autocast():
                model = machine.put(opened.model).eval()
                model = with_layout(model, config.layout, batch_size=config.batch_size)
            evaluation = _evaluation(config, parts, opened.preprocessing, machine)
            accuracies = evaluation.final(model)
            with machine.precision.autocast():
                image_shape = opened.preprocessing.input_size
                (speed,) = measure_speeds([model], image_shape, machine, batch_size=config.batch_size)
            figures = figures_of(compact_of(model), speed=speed)
            summary = {
                "stage": "evaluate",
                "model": asdict(figures),
                "accuracy": plain(accuracies),
                "classes": len(splits.class_names),
                "chance": evaluation.chances,
                "assumed": opened.assumed,
                "said": list(parts.said),
                "layout": layout_of(model),
                "unreadable_images": count_unreadable(splits),
            }
            _tell(screen, title, accuracies, figures, summary, machine)
            if folder is not None:
                machine.on_main(lambda: folder.write_json("summary.json", summary))
            return summary


def _open_splits(data: DataOptions, model: ModelOptions, seed: int, machine: Machine) -> DataSplits:
    """The data, under the class indices of the model where it says its classes."""
    names = saved_class_names(model)
    return with_classes_of(open_splits(data, seed, machine.processes, for_evaluation=True, class_names=names), names)


def _parts(config: EvaluateConfig, splits: DataSplits, machine: Machine) -> Parts:
    """What to evaluate on: val and test, or else what the model was not trained on, or else all images."""

    def cut(rule: Mapping[str, Any]) -> DataSplits | None:
        if rule["data_set"].upper() != config.data.data_set.upper():
            return None
        data = replace(config.data, val_share=rule["val_share"], max_train_images=rule["max_train_images"])
        return _open_splits(data, config.model, rule["seed"], machine)

    return parts_to_evaluate(splits, trained_on(config.model.model_path), cut)


def _open_trained(options: ModelOptions, class_names: tuple[str, ...], seed: int) -> OpenedModel:
    """The model to evaluate, refused unless it was trained for the classes of the data."""
    opened = open_model(options, len(class_names), seed)
    pretrained = timm.get_pretrained_cfg(options.model) if opened.report is None else None
    known = len(class_names) if pretrained is None else pretrained.num_classes
    if known != len(class_names):
        raise WeightsError(f"timm's {options.model} knows {known} classes, the data has {len(class_names)}; train it first.")
    if opened.report is not None and (untrained := opened.report.replaced + opened.report.missing):
        raise WeightsError(
            f"The model was not trained for these {len(class_names)} classes, and does not say the names of its own: "
            f"{'; '.join(untrained)}. Give data of all its classes; or save your own model with class_names, and some of them "
            "are enough."
        )
    return opened


def _tell_before(screen: Screen, splits: DataSplits, opened: OpenedModel, parts: Parts) -> None:
    """What was found, and what must be known of the figures to come."""
    notes = opened.report.notes if opened.report is not None else ()
    for line in (f"data: {splits.description}", *splits.notes, *notes):
        screen.say(line)
    if opened.class_names is None:
        first = ", ".join(splits.class_names[:8])
        screen.say(f"the model does not say its classes; they are taken in the order of the data: {first} ...")
    for line in (*([opened.assumed] if opened.assumed is not None else []), *parts.said):
        screen.warn(f"warning: {line}")


@contextmanager
def _claimed(folder: StageFolder | None, config: EvaluateConfig, machine: Machine, screen: Screen) -> Iterator[None]:
    """Hold the output folder, where there is one; what lay in it of an earlier evaluation is gone."""
    if folder is None:
        yield
        return
    overwrite = config.run.overwrite
    folder.claim_for_all(machine.is_main, screen.warn, resume=False, overwrite=overwrite)
    try:
        machine.on_main(lambda: folder.begin(to_plain(config), overwrite))
        screen.log_to(folder.path / "log.txt")
        yield
    finally:
        folder.release()


def _evaluation(config: EvaluateConfig, parts: Parts, preprocessing: Preprocessing, machine: Machine) -> Evaluation:
    return Evaluation(
        parts.images,
        preprocessing,
        machine,
        batch_size=config.batch_size,
        num_workers=num_workers(config.data, machine.processes, machine.device),
        shared=config.run.dist_eval,
    )


def _tell(
    screen: Screen,
    title: str,
    accuracies: Mapping[str, Accuracy],
    figures: Figures,
    summary: Mapping[str, Any],
    machine: Machine,
) -> None:
    top5 = summary["classes"] >= FEWEST_FOR_TOP5
    rows = [
        (name, f"{a.top1:.2f}", *([f"{a.top5:.2f}"] if top5 else []), f"{a.loss:.4f}", f"{a.images:,}")
        for name, a in accuracies.items()
    ]
    screen.table(title, ("part", "top-1 %", *(["top-5 %"] if top5 else []), "loss", "images"), rows)
    screen.result(
        f"{figures.params:,} parameters, {figures.macs / 1e6:,.1f} M MACs, {figures.images_per_second or 0:,.0f} images/s on "
        f"{machine.device} in the layout {summary['layout']}"
    )
    if unreadable := summary["unreadable_images"]:
        screen.warn(f"{unreadable} unreadable image(s) were skipped")
