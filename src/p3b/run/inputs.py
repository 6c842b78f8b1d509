"""From options to what a run works on: data, model, preprocessing. Everything that can be wrong with them is found here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer

from p3b.data import DataSplits, Preprocessing, default_num_workers, open_data
from p3b.errors import ConfigError, WeightsError
from p3b.run.options import DataOptions, ModelOptions
from p3b.storage import artifact
from p3b.storage.hub_folder import NOTHING_SAID, Facts
from p3b.storage.load_report import LoadReport, first
from p3b.storage.models import build_model, parse_model_kwargs
from p3b.storage.preparation import decide_preparation
from p3b.storage.weights_file import Weights, open_weights
from p3b.train.distributed import Processes, gather, wait_for_all
from p3b.vit.families import images_of
from p3b.vit.wrappers import require_vision_transformer


@dataclass(frozen=True)
class OpenedModel:
    """A model ready to train, what was found when its weights were loaded, and how its images must be prepared."""

    model: VisionTransformer
    report: LoadReport | None
    preprocessing: Preprocessing
    class_names: tuple[str, ...] | None
    """Of the saved model that it was loaded from, where there is one."""
    assumed: str | None = None
    """How its images are prepared, where neither the weights nor a flag say all of it."""

    def notes(self, options: ModelOptions, class_names: tuple[str, ...]) -> list[str]:
        """Where the weights come from, every mismatch by name, and whether the head was trained for other classes.

        Args:
            options: that it was opened with.
            class_names: of the data, as many as the head has outputs.
        """
        if self.report is not None:
            lines = self.report.lines()
        elif options.model_pretrained:
            lines = [f"weights: timm's pretrained {options.model}"]
        else:
            lines = ["weights: none given, training starts from random ones"]
        if self.class_names not in (None, class_names) and len(self.class_names or ()) == len(class_names):
            lines.append(
                f"the saved head was trained for other classes ({', '.join((self.class_names or ())[:5])} ...); it is kept and "
                f"learns {', '.join(class_names[:5])} ..."
            )
        return lines

    def unknown_classes(self, options: ModelOptions, class_names: tuple[str, ...]) -> str | None:
        """Why the model cannot know the classes of the data before it is trained, in a sentence; None where it may.

        Args:
            options: that it was opened with.
            class_names: of the data.
        """
        if self.report is None and not options.model_pretrained:
            return "No weights are given, so the model starts from random ones."
        if self.report is None and options.model_pretrained:
            known = getattr(self.model, "pretrained_cfg", {}).get("num_classes")
            if known != len(class_names):
                return f"timm's weights of {options.model} were trained for {known} classes, the data has {len(class_names)}."
        if self.report is not None and (new := self.report.replaced + self.report.missing):
            return f"The head is new, since {options.model_path} has none for {len(class_names)} classes ({new[0]})."
        if self.class_names not in (None, class_names):
            return (
                f"{options.model_path} was trained for the classes {first(self.class_names or ())}; the data has "
                f"{first(class_names)}."
            )
        return None


def saved_class_names(options: ModelOptions) -> tuple[str, ...] | None:
    """Names of the classes of the saved model that is to be opened, by index; None where it has none, or is no saved model."""
    if options.model_path is None or not artifact.is_artifact(options.model_path):
        return None
    return tuple(artifact.read_config(options.model_path)["class_names"] or ()) or None


def open_splits(
    options: DataOptions,
    seed: int,
    processes: Processes,
    *,
    for_evaluation: bool = False,
    class_names: Sequence[str] | None = None,
) -> DataSplits:
    """The data set's parts, on every rank; a download is the main one's alone, the others find what it brought.

    Args:
        options, seed: what is opened and how it is cut.
        processes: those that share the run.
        for_evaluation, class_names: see `p3b.data.open_data`.
    """
    if options.download and not processes.is_main:
        wait_for_all()
    splits = open_data(
        options.data_set,
        options.data_path,
        val_path=options.val_path,
        test_path=options.test_path,
        val_share=options.val_share,
        seed=seed,
        download=options.download,
        max_train_images=options.max_train_images,
        skip_unreadable=options.skip_unreadable,
        for_evaluation=for_evaluation,
        class_names=class_names,
    )
    if options.download and processes.is_main:
        wait_for_all()
    return splits


def count_unreadable(splits: DataSplits) -> int:
    """Images of all parts that some rank has found unreadable and skipped."""
    parts = (part for part in (splits.train, splits.val, splits.test) if part is not None)
    return len(set().union(*gather([name for part in parts for name in part.unreadable])))


def num_workers(options: DataOptions, processes: Processes, device: torch.device) -> int:
    """Worker processes of a loader: as many as asked for, else what fits the machine."""
    if options.num_workers is not None:
        return options.num_workers
    return default_num_workers(processes.local_world_size, device.type == "cpu")


def open_model(options: ModelOptions, num_classes: int, seed: int) -> OpenedModel:
    """Build the model for so many classes and load its weights.

    Raises:
        ModelError, WeightsError, ConfigError: see `p3b.storage.models.build_model`; also where a saved shape is asked for
            and the weights have none.
    """
    path = options.model_path
    saved = artifact.read_config(path) if path is not None and artifact.is_artifact(path) else None
    if options.resize_model_by_checkpoint and saved is None:
        raise WeightsError(
            f"{options.model_path} is not a model that p3b saved, so it has no shape to resize to. Give run/pruned or "
            "run/first_sparse_checkpoint.pth, or leave --resize-model-by-checkpoint out."
        )
    kwargs = parse_model_kwargs(options.model_kwargs)
    size = options.input_size
    if size is not None and kwargs.setdefault("img_size", size) != size:
        raise ConfigError(f"--input-size {size} contradicts --model-kwargs img_size={kwargs['img_size']}.")
    weights = path if path is None or saved is not None else open_weights(path)
    model, report = build_model(
        options.model,
        num_classes=num_classes,
        model_kwargs=kwargs,
        pretrained=options.model_pretrained,
        weights=weights,
        drop_path=options.drop_path,
        seed=seed,
    )
    vit = require_vision_transformer(model)
    class_names = tuple(saved["class_names"]) if saved and saved["class_names"] else None
    facts = weights.facts if isinstance(weights, Weights) else NOTHING_SAID
    preprocessing, line = _preprocessing(options, vit, saved, weights if isinstance(weights, Weights) else None)
    if report is not None and line:
        report = report.with_note(line)
    assumed = _assumed(options, preprocessing, bool((saved or {}).get("preprocessing")), facts)
    return OpenedModel(vit, report, preprocessing, class_names, assumed)


def _assumed(options: ModelOptions, preprocessing: Preprocessing, is_saved: bool, facts: Facts) -> str | None:
    """A sentence on what of the preprocessing is a guess: nobody said it of weights that were trained with something."""
    if options.model_path is None or is_saved:
        return None
    guessed = []
    for name, given, fact in (("mean", options.mean, facts.mean), ("std", options.std, facts.std)):
        if not given and fact is None:
            guessed.append(f"--{name} {' '.join(f'{value:.4g}' for value in getattr(preprocessing, name))}")
    if options.crop_pct is None and facts.crop_pct is None:
        guessed.append(f"--crop-pct {preprocessing.crop_pct:g}")
    if not guessed:
        return None
    return (
        f"{options.model_path} does not say how its images are to be prepared; assumed is {' '.join(guessed)}. If it was "
        "trained with others, give these flags: its accuracy would be far too low."
    )


def _preprocessing(
    options: ModelOptions, model: VisionTransformer, saved: Mapping[str, Any] | None, weights: Weights | None
) -> tuple[Preprocessing, str]:
    """How images are prepared, and a line that says who says so, where that needs to be said."""
    channels, height, width = images_of(model).shape
    decided = decide_preparation(
        channels=channels,
        mean=options.mean,
        std=options.std,
        crop_pct=options.crop_pct,
        saved=(saved or {}).get("preprocessing"),
        facts=NOTHING_SAID if weights is None else weights.facts,
        names=() if weights is None else weights.state,
        timm_cfg=getattr(model, "pretrained_cfg", None),
        is_given=options.model_path is not None,
    )
    preprocessing = Preprocessing(
        input_size=(channels, height, width),
        mean=decided.mean,
        std=decided.std,
        interpolation=decided.interpolation,
        crop_pct=decided.crop_pct,
    )
    return preprocessing, decided.line
