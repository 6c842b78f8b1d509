"""One stage of a run (train, prune, finetune, warm-up): opened, begun and ended.

What a stage consists of stands in files of their own, each of which knows one matter; `open_stage` puts them together:

    machine       processes, device, number format       recipe       batches, mixup, loss, options of training
    folder        what lies in the run folder            evaluation   accuracy on the parts that are not trained on
    screen        what is shown and logged               records      the lines of metrics.jsonl and blocks.jsonl
    interruption  when to save and when to stop          products     the models that are saved
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from timm.models.vision_transformer import VisionTransformer

from p3b.core.schedule import Schedule
from p3b.data import DataSplits, LabelledImages, Preprocessing, keep_decoded
from p3b.errors import ConfigError
from p3b.run.cautions import Outlook, cautions
from p3b.run.evaluation import Evaluation
from p3b.run.failures import explained
from p3b.run.final_table import reported_part
from p3b.run.folder import StageFolder, launch_name, restarted_by
from p3b.run.guessing import said_of_guessing
from p3b.run.inputs import OpenedModel, count_unreadable, num_workers, open_model, open_splits
from p3b.run.interruption import Interruption
from p3b.run.machine import Machine, open_machine
from p3b.run.option_checks import check
from p3b.run.options import RunOptions, TrainConfig, to_plain
from p3b.run.predictions import write_predictions
from p3b.run.products import PRODUCTS, Products, products_of
from p3b.run.provenance import provenance
from p3b.run.recipe import Recipe, open_recipe
from p3b.run.recipe_choice import recipe_lines
from p3b.run.records import Records
from p3b.run.same_settings import Settings, require_finished_as_asked
from p3b.run.screen import Screen, open_screen
from p3b.run.trackers import trackers_asked_for
from p3b.run.tracking import Tracking
from p3b.run.trained_images import remember, said_of_part, trained_on
from p3b.storage import artifact
from p3b.train.checkpoint import Checkpoint, Checkpoints, newest_for_all, seed_everything
from p3b.train.compiled import require_compiler
from p3b.train.distributed import gather, wait_for_all
from p3b.train.evaluate import Accuracy
from p3b.train.optim import scaled_lr
from p3b.vit.cost import count_parameters


@dataclass(frozen=True)
class Stage:
    """A stage that is open: whatever could refuse has been asked. `begin` is the first to write, `write_summary` the last.

    Attributes:
        name: "train", "prune", "finetune" or "warm-up".
        settings: what it was told.
        resume, overwrite: what may be done with an earlier run in the folder.
        machine, folder, screen, interruption, recipe, evaluation, records, products: see the top of this file.
        checkpoints: to go on from.
        splits: the parts of the data.
        preprocessing: of images.
        model: on the device, with the weights that training starts from.
        provenance: of the models and of the summary.
        opening: lines about model, data and weights.
        doubts: warnings about them.
        unknown_classes: why the model cannot know the classes of the data without training, in a sentence; None where it may.
        opened_at: seconds since the epoch.
        with_report: whether report.html is written at the end.
    """

    name: str
    settings: Settings
    resume: bool
    overwrite: bool
    machine: Machine
    folder: StageFolder
    screen: Screen
    interruption: Interruption
    checkpoints: Checkpoints
    splits: DataSplits
    preprocessing: Preprocessing
    model: VisionTransformer
    recipe: Recipe
    evaluation: Evaluation
    records: Records
    products: Products
    provenance: dict[str, Any]
    opening: tuple[str, ...]
    doubts: tuple[str, ...]
    unknown_classes: str | None
    opened_at: float
    with_report: bool

    def begin(self) -> dict[str, Any] | None:
        """Claim the folder and say what will be done.

        Returns:
            The checkpoint to go on from, where the run is resumed and there is one.

        Raises:
            RunFolderError: the folder is in use, or holds what may not be replaced. ConfigError: resumed with other settings.
            WeightsError: all checkpoints are damaged.
        """
        found: Checkpoint | None = None
        self.folder.claim_for_all(self.machine.is_main, self.screen.warn, resume=self.resume, overwrite=self.overwrite)
        if self.resume and self.folder.has_begun:
            self.settings.require_same(self.folder.read_json("config.json"))
            found = newest_for_all(self.checkpoints)
        if self.resume and self.recipe.options.compile:
            require_compiler(self.machine.device)
        wait_for_all()  # no rank may still be looking when the main one begins to write
        self._open_tracking(goes_on=found is not None)
        self.folder.in_use = True
        self.machine.on_main(lambda: self._prepare_folder(found))
        wait_for_all()
        self.records.tracking.catch_up()
        for line in self.opening:
            self.screen.say(line)
        if found is None:
            return None
        for damaged in found.passed_over:
            self.screen.warn(f"skipped a damaged checkpoint: {damaged}")
        place = found.content["progress"]["place"]
        self.screen.say(f"resumed after {place['epoch']} epochs, at step {place['step']}, from {found.file.name}")
        self.records.show_last_update()
        return found.content

    def _open_tracking(self, *, goes_on: bool) -> None:
        """Open the trackers on the main process; what it meets with is raised on every one."""
        refusal: ConfigError | None = None
        try:
            self.records.tracking.open(goes_on=goes_on)
        except ConfigError as error:
            refusal = error
        if (refused := gather(refusal)[0]) is not None:
            raise refused

    def warn_of_little(self, epochs: int, schedule: Schedule | None = None, asked_interval: int | None = None) -> None:
        """Say what of a training that is about to start can hardly work.

        Args:
            epochs: of the stage, fine-tuning included; 0: nothing is trained, and what is said is of the images alone.
            schedule: of pruning, where the stage prunes.
            asked_interval: mini-batches between two mask updates, as of --prune-steps-update-mask.
        """
        recipe, model, train = self.recipe, self.settings.given["model"], self.splits.train
        counts = np.bincount(train.targets, minlength=len(self.splits.class_names)).tolist()
        outlook = Outlook(
            model=model["model"],
            has_weights=bool(model["model_path"] or model["model_pretrained"]),
            images=dict(zip(self.splits.class_names, counts, strict=True)),
            batch_size=recipe.options.batch_size,
            global_batch=recipe.global_batch,
            steps_per_epoch=recipe.steps_per_epoch,
            epochs=epochs,
            lr=recipe.options.lr,
            rate=scaled_lr(recipe.options.lr, recipe.global_batch),
            schedule=schedule,
            asked_interval=asked_interval,
        )
        for said in (*self.doubts, *(cautions(outlook) if epochs else ())):
            self.screen.warn(f"warning: {said}")

    def warn_of_guessing(self, model: str, accuracies: Mapping[str, Accuracy]) -> None:
        """Say where a model cannot be told from one that has learned nothing.

        Args:
            model: how to call it.
            accuracies: of it, by part.
        """
        part = reported_part(accuracies)
        found = accuracies[part]
        said = said_of_guessing(model, part, found.top1, self.evaluation.chances[part], found.images)
        if said is not None:
            self.screen.warn(f"warning: {said}")

    def _prepare_folder(self, found: Checkpoint | None) -> None:
        """Empty the folder, or let it stand as it was at the checkpoint that was found."""
        if found is None:
            content = {**self.settings.given, "resolved": self.settings.resolved, "launch": launch_name()}
            self.folder.begin(content, self.overwrite or self.resume)
        else:
            self.folder.tidy()
            self.checkpoints.tidy()
            self.folder.cut_lines(found.content["progress"]["lines"])
        self.screen.log_to(self.folder.path / "log.txt")

    def write_summary(self, content: dict[str, Any], dense_run: Path | None = None) -> dict[str, Any]:
        """Write what the report is made of, and summary.json, the last file of the stage; returns the summary.

        Args:
            content: of the summary.
            dense_run: output folder of a dense run to compare with.
        """
        if self.evaluation.answers is not None:
            part, answers = self.evaluation.answers
            images = self.evaluation.parts[part]
            self.machine.on_main(lambda: write_predictions(self.folder.path, part, answers, images, dense_run))
        unreadable = count_unreadable(self.splits)
        seconds = time.time() - self.opened_at
        summary = {"stage": self.name, **content, "seconds": seconds, "unreadable_images": unreadable}
        summary |= {"classes": len(self.splits.class_names), "chance": self.evaluation.chances}
        summary["provenance"] = self.provenance
        if unreadable:
            self.screen.warn(f"{unreadable} unreadable image(s) were skipped")
        self.machine.on_main(lambda: self.folder.write_json("summary.json", summary))
        if self.with_report:
            self.machine.on_main(self._write_report)
        wait_for_all()
        return summary

    def _write_report(self) -> None:
        from p3b.report.run_report import REPORT_FILE, write_run_report  # matplotlib would slow down every start

        report = write_run_report([self.folder.root], self.folder.root / REPORT_FILE)
        self.screen.say(f"report:  {report}")


def finished_summary(config: TrainConfig, name: str) -> dict[str, Any] | None:
    """Summary of a stage that is to be resumed though it is finished; None where there is something left to do.

    Raises:
        ConfigError: it is finished, with other settings than are asked for now. RunFolderError: its files cannot be read.
    """
    run = config.run
    assert run.output_dir is not None
    folder = StageFolder(run.output_dir, name)
    if not folder.finished or run.overwrite:
        return None
    require_finished_as_asked(config, folder.read_json("config.json"), folder.path)
    if not _resumes(run, folder):
        return None
    is_main = int(os.environ.get("RANK", 0)) == 0
    open_screen(run, is_main).say(f"{folder.path} is finished; nothing is left to do.")
    return folder.read_json("summary.json")


@contextmanager
def open_stage(config: TrainConfig, name: str, splits: DataSplits | None = None) -> Iterator[Stage]:
    """Check the config, join the processes, open data, model and folder; at the end let go of them.

    Args:
        config: settings.
        name: of the stage.
        splits: the data where they are open already.

    Raises:
        UserError: whatever the user can mend, also where it shows itself as some library's error in the middle of a run.
    """
    check(config)
    assert config.run.output_dir is not None
    folder = StageFolder(config.run.output_dir, name, products_of(name))
    with (
        open_machine(config.run.device, config.run.timeout_minutes, config.training.precision) as machine,
        explained(machine.processes, folder.root, lambda: folder.in_use),
    ):
        stage: Stage | None = None
        try:
            stage = _open(config, name, machine, folder, splits)
            yield stage
        finally:
            if stage is not None:
                stage.records.tracking.close()
            folder.release()


def _open(config: TrainConfig, name: str, machine: Machine, folder: StageFolder, splits: DataSplits | None) -> Stage:
    """Put a stage together. What can refuse quickly comes first; what draws random numbers keeps its order."""
    opened_at = time.time()
    run, training = config.run, config.training
    screen = open_screen(run, machine.is_main)
    resume = _resumes(run, folder)
    overwrite = run.overwrite and not resume
    folder.check(resume, overwrite)
    interruption = Interruption(run.checkpoint_minutes, machine.is_main)
    if training.compile and not resume:  # a resumed run is first told which settings differ: that takes no compiler
        require_compiler(machine.device)

    seed_everything(run.seed, machine.processes.rank)
    splits = splits or open_splits(config.data, run.seed, machine.processes)
    evaluated = {part: images for part, images in (("val", splits.val), ("test", splits.test)) if images is not None}
    if not evaluated:
        raise ConfigError("There is nothing to evaluate on: give --val-path, --test-path or a --val-share above 0.")
    cache = keep_decoded(splits, config.data.cache, machine.processes.local_world_size)
    opened = open_model(config.model, len(splits.class_names), run.seed)
    artifact.model_config(opened.model)  # what could not be saved is refused now, not after hours
    workers = num_workers(config.data, machine.processes, machine.device)
    recipe = open_recipe(
        training, config.augment, splits, opened.preprocessing, opened.model, machine, seed=run.seed, num_workers=workers
    )
    origin = provenance(machine, stage=name, model=config.model.model, data=splits.description, seed=run.seed)
    return Stage(
        name=name,
        settings=_settings(config, splits, opened, recipe, machine, workers),
        resume=resume,
        overwrite=overwrite,
        machine=machine,
        folder=folder,
        screen=screen,
        interruption=interruption,
        checkpoints=Checkpoints(folder.path / "checkpoints"),
        splits=splits,
        preprocessing=opened.preprocessing,
        model=machine.put(opened.model),
        recipe=recipe,
        evaluation=Evaluation(
            evaluated,
            opened.preprocessing,
            machine,
            batch_size=training.batch_size,
            num_workers=workers,
            shared=run.dist_eval,
        ),
        records=Records(folder, screen, machine, recipe.steps_per_epoch, _tracking(config, folder, screen, machine)),
        products=Products(folder.root, name, _description(splits, opened, origin, machine), machine),
        provenance=origin,
        opening=(
            f"{name}: {config.model.model}, {count_parameters(opened.model):,} parameters, seed {run.seed}",
            *_opening(splits, cache, opened.notes(config.model, splits.class_names), recipe, machine),
            *recipe_lines(config),
        ),
        doubts=_doubts(config, evaluated),
        unknown_classes=opened.unknown_classes(config.model, splits.class_names),
        opened_at=opened_at,
        with_report=run.report and name in PRODUCTS,
    )


def _resumes(run: RunOptions, folder: StageFolder) -> bool:
    """Whether the stage goes on from an earlier run; a launcher that starts a failed run again means that run."""
    return run.resume or folder.begun_by(restarted_by())


def _settings(
    config: TrainConfig, splits: DataSplits, opened: OpenedModel, recipe: Recipe, machine: Machine, workers: int
) -> Settings:
    """What config.json will hold."""
    resolved = {
        "params": count_parameters(opened.model),
        "classes": len(splits.class_names),
        "class_names": list(splits.class_names),
        "preprocessing": opened.preprocessing.to_dict(),
        "global_batch": recipe.global_batch,
        "steps_per_epoch": recipe.steps_per_epoch,
        "lr": scaled_lr(config.training.lr, recipe.global_batch),
        "num_workers": workers,
        "processes": machine.processes.world_size,
        "precision": machine.number_format,
    }
    return Settings(given=to_plain(config), defaults=to_plain(type(config)()), resolved=resolved)


def _tracking(config: TrainConfig, folder: StageFolder, screen: Screen, machine: Machine) -> Tracking:
    """Of the process that writes; the others track nothing."""
    given = config.run.track
    names = trackers_asked_for(given) if machine.is_main else ()
    return Tracking(folder, names, to_plain(config), asked=bool(given), say=screen.say, warn=screen.warn)


def _description(splits: DataSplits, opened: OpenedModel, origin: Mapping[str, Any], machine: Machine) -> dict[str, Any]:
    """What a saved model says of itself, besides its shape; of use on the process that saves."""
    return {
        "class_names": splits.class_names,
        "preprocessing": opened.preprocessing.to_dict(),
        "provenance": {**origin, **(remember(splits) if machine.is_main else {})},
    }


def _doubts(config: TrainConfig, evaluated: Mapping[str, LabelledImages]) -> tuple[str, ...]:
    """What makes an evaluation doubtful: images that the weights were trained on before."""
    known = trained_on(config.model.model_path)
    said = [said_of_part(name, images, known) for name, images in evaluated.items()]
    return tuple(f"{line}. Give the same data and --seed as then." for line in said if line is not None)


def _opening(splits: DataSplits, cache: str, weights: list[str], recipe: Recipe, machine: Machine) -> tuple[str, ...]:
    """What is said at the beginning."""
    processes = machine.processes.world_size
    return (
        f"data: {splits.description}",
        *splits.notes,
        cache,
        *weights,
        f"{processes} process{'es' if processes > 1 else ''} on {machine.device}, {machine.number_format}, "
        f"{recipe.global_batch} images per step, {recipe.steps_per_epoch} steps per epoch",
    )
