"""`p3b evaluate`: accuracy, size and speed of a saved model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import timm

from p3b.data import DataSplits, Preprocessing
from p3b.deploy.choice import AUTO, with_layout
from p3b.deploy.layouts import check_layout
from p3b.errors import ConfigError, DataError, WeightsError
from p3b.run.evaluation import Evaluation
from p3b.run.failures import explained
from p3b.run.final_table import Figures, figures_of, measure_speeds, plain
from p3b.run.folder import StageFolder
from p3b.run.inputs import OpenedModel, count_unreadable, num_workers, open_model, open_splits, saved_class_names
from p3b.run.machine import Machine, open_machine
from p3b.run.option_checks import check_evaluation
from p3b.run.options import EvaluateConfig, ModelOptions, to_plain
from p3b.run.products import PRODUCTS
from p3b.run.screen import Screen, open_screen
from p3b.train.evaluate import Accuracy
from p3b.vit.deployment import compact_of, layout_of


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Accuracy of a saved model on every part of a data set that it was not trained on, its size and its speed.

    With an output folder the result is written there, as stage "evaluate".

    Raises:
        ConfigError: no weights. WeightsError, DataError: the model's classes are not the data's.
    """
    check_evaluation(config)
    check_layout(config.layout, [AUTO])
    if config.model.model_path is None and not config.model.model_pretrained:
        raise ConfigError(f"--model-path is missing: the model to evaluate, such as run/{PRODUCTS['prune']}.")
    run = config.run
    with open_machine(run.device, run.timeout_minutes, config.precision) as machine:
        screen = open_screen(run, machine.is_main)
        folder = None if run.output_dir is None else StageFolder(run.output_dir, "evaluate")
        if folder is not None:
            folder.check(resume=False, overwrite=run.overwrite)
        names = saved_class_names(config.model)
        splits = open_splits(config.data, run.seed, machine.processes, for_evaluation=True, class_names=names)
        opened = _open_trained(config.model, splits.class_names, run.seed)
        with _claimed(folder, config, machine, screen), explained(machine.processes, run.output_dir, lambda: True):
            notes = opened.report.notes if opened.report is not None else ()
            for line in (f"data: {splits.description}", *splits.notes, *notes):
                screen.say(line)
            with machine.precision.autocast():
                model = machine.put(opened.model).eval()
                model = with_layout(model, config.layout, batch_size=config.batch_size)
            accuracies = _evaluation(config, splits, opened.preprocessing, machine).final(model)
            with machine.precision.autocast():
                image_shape = opened.preprocessing.input_size
                (speed,) = measure_speeds([model], image_shape, machine, batch_size=config.batch_size)
            figures = figures_of(compact_of(model), speed=speed)
            summary = {
                "stage": "evaluate",
                "model": asdict(figures),
                "accuracy": plain(accuracies),
                "layout": layout_of(model),
                "unreadable_images": count_unreadable(splits),
            }
            _tell(screen, str(config.model.model_path or config.model.model), accuracies, figures, summary, machine)
            if folder is not None:
                machine.on_main(lambda: folder.write_json("summary.json", summary))
            return summary


def _open_trained(options: ModelOptions, class_names: tuple[str, ...], seed: int) -> OpenedModel:
    """The model to evaluate, refused unless it was trained for the classes of the data."""
    opened = open_model(options, len(class_names), seed)
    pretrained = timm.get_pretrained_cfg(options.model) if opened.report is None else None
    known = len(class_names) if pretrained is None else pretrained.num_classes
    if known != len(class_names):
        raise WeightsError(f"timm's {options.model} knows {known} classes, the data has {len(class_names)}; train it first.")
    if opened.report is not None and (untrained := opened.report.replaced + opened.report.missing):
        raise WeightsError(f"The model was not trained for these {len(class_names)} classes: {'; '.join(untrained)}")
    if opened.class_names is not None and opened.class_names != class_names:
        raise DataError(
            f"The model was trained for the classes {', '.join(opened.class_names[:8])} ..., the data has "
            f"{', '.join(class_names[:8])} ...; they must be the same in the same order."
        )
    return opened


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


def _evaluation(config: EvaluateConfig, splits: DataSplits, preprocessing: Preprocessing, machine: Machine) -> Evaluation:
    """On val and test; on all images where there are no such parts."""
    parts = {name: images for name, images in (("val", splits.val), ("test", splits.test)) if images is not None}
    return Evaluation(
        parts or {"all": splits.train},
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
    rows = [(name, f"{a.top1:.2f}", f"{a.top5:.2f}", f"{a.loss:.4f}", f"{a.images:,}") for name, a in accuracies.items()]
    screen.table(title, ("part", "top-1 %", "top-5 %", "loss", "images"), rows)
    screen.result(
        f"{figures.params:,} parameters, {figures.macs / 1e6:,.1f} M MACs, {figures.images_per_second or 0:,.0f} images/s on "
        f"{machine.device} in the layout {summary['layout']}"
    )
    if unreadable := summary["unreadable_images"]:
        screen.warn(f"{unreadable} unreadable image(s) were skipped")
