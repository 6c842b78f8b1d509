"""`p3b export`: a saved model as ONNX or `.pt2`, with what was measured."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from p3b.data import DataSplits, Preprocessing, open_data
from p3b.data.images import LabelledImages
from p3b.deploy.card import CARD_FILE, write_card
from p3b.deploy.choice import AUTO, CANDIDATES
from p3b.deploy.export import DENSE, FP32, WRITTEN, Evidence, ExportPlan, ExportReport, Figures, Labelled, export
from p3b.deploy.hub import local_copy
from p3b.deploy.layouts import check_layout
from p3b.deploy.metadata import Metadata
from p3b.deploy.onnx_file import OPSET, require_onnx
from p3b.deploy.photos import evenly, photo_crops, read_some, stand_in
from p3b.errors import ConfigError, DataError
from p3b.run.deploy_options import ExportConfig, check_export
from p3b.run.screen import Screen
from p3b.storage import artifact
from p3b.vit.architecture import build_dense
from p3b.vit.cost import count_parameters


@dataclass(frozen=True)
class Gathered:
    """Images for an export, and in words where those to check come from."""

    evidence: Evidence
    origin: str


def export_saved(config: ExportConfig) -> ExportReport:
    """Write the file, and say what was measured; returns the report.

    Raises:
        UserError: settings, model or images that cannot be used; an export that differs or loses too much. Then nothing is
            written.
    """
    file = check_export(config)
    check_layout(config.layout, [AUTO])
    if file.suffix == ".onnx":
        require_onnx()
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    screen = Screen(is_main=True)
    origin = local_copy(str(config.model))
    saved = artifact.read_config(origin)
    model = artifact.load(origin).float()
    metadata = Metadata.of_config(saved)
    gathered = gather(config, metadata, metadata.preprocessing or stand_in(model))
    dense = (
        build_dense(saved["architecture"]).eval()
        if config.dense is None
        else artifact.load(local_copy(str(config.dense))).float()
    )
    smaller = count_parameters(model) < count_parameters(dense)
    plan = ExportPlan(
        file,
        CANDIDATES if config.layout == AUTO else (config.layout,),
        config.half,
        None if config.int8 == "off" else config.int8,
        config.with_preprocessing,
        config.batch_size,
        config.max_loss,
    )
    if metadata.preprocessing is None:
        if config.with_preprocessing or config.int8 == "static":
            raise ConfigError(
                f"{config.model} does not say how its images are prepared, which --with-preprocessing and --int8 static need. "
                "Save it again: p3b.save(model, folder, preprocessing={...})."
            )
        screen.say(f"{config.model} does not say how images are prepared: the file will not either.")
    report = export(model, metadata, plan, gathered.evidence, dense if smaller else None)
    tell(screen, file, plan, report, gathered.origin)
    if config.card:
        written = write_card(config.model, name=str(config.model))
        screen.say(f"card:    {config.model / CARD_FILE}{'' if written else ', which is yours, stays as it is'}")
    return report


def gather(config: ExportConfig, metadata: Metadata, preprocessing: Preprocessing) -> Gathered:
    """The images that the flags name.

    Raises:
        DataError: they cannot be read, or are of other classes than the model's.
    """
    splits = None
    if config.data_path is not None or config.data_set != "FOLDER":
        splits = open_data(config.data_set, config.data_path)
        if metadata.class_names is not None and splits.class_names != metadata.class_names:
            raise DataError(
                f"The model was trained for the classes {', '.join(metadata.class_names[:8])} ..., the data has "
                f"{', '.join(splits.class_names[:8])} ...; they must be the same in the same order."
            )
    held_out = None if splits is None else splits.test or splits.val
    labelled = [] if held_out is None else _pairs(held_out, config.top1_images)
    if config.images is not None:
        check, origin = read_some(config.images, config.check_images), str(config.images)
    elif splits is not None:
        check = [image for image, _ in evenly(labelled or _pairs(splits.train, config.check_images), config.check_images)]
        origin = splits.description
    else:
        check, origin = (
            photo_crops(config.check_images),
            "crops of the photo that comes with matplotlib (give --data-path or --images)",
        )
    return Gathered(Evidence(preprocessing, check, _calibration(config, splits), labelled, config.dense is not None), origin)


def _calibration(config: ExportConfig, splits: DataSplits | None) -> list[Image.Image]:
    if config.int8 != "static":
        return []
    if config.calibration is not None:
        return read_some(config.calibration, config.calibration_images)
    assert splits is not None  # check_export has seen to it
    return [image for image, _ in _pairs(splits.train, config.calibration_images)]


def _pairs(images: LabelledImages, count: int) -> Labelled:
    """Decoded images with their labels, taken evenly from the whole set."""
    return [images[position] for position in evenly(range(len(images)), count)]


def tell(screen: Screen, file: Path, plan: ExportPlan, report: ExportReport, origin: str) -> None:
    """What was written and measured, on the screen."""
    if report.layouts:
        tried = "; ".join(
            f"{name} {each.milliseconds:.2f} ms, {each.bytes / 1e6:.2f} MB" for name, each in report.layouts.items()
        )
        screen.say(f"layouts: {tried} (batches of {plan.batch_size}); the smallest of the quickest is taken")
    dense = report.sides.get(DENSE)
    kind = "pruned" if dense else "model"
    names = {FP32: f"{kind}, fp32", WRITTEN: f"{kind}, {report.metadata.precision}"}
    rows = [_row(names.get(name, name), figures, dense) for name, figures in report.sides.items()]
    columns = ("", "MB", "ms", "speed-up", "top-1 %", "logits off", "same top-1")
    screen.table(f"{file}, batches of {plan.batch_size}", columns, rows)
    if report.quantised is not None:
        kept, layers, loss = report.quantised.in_float, report.quantised.layers, report.quantised.loss
        screen.say(
            f"int8: {layers - len(kept)} of {layers} layers, {loss:.2f} points lost of {plan.max_loss:g} allowed; in float: "
            f"{', '.join(kept) or 'none'}"
        )
    screen.say(f"checked on {report.checked} images: {origin}")
    opset = f", opset {OPSET}" if file.suffix == ".onnx" else ""
    taking = "uint8 images of any size" if plan.with_preprocessing else "prepared float32 images"
    screen.say(
        f"{file}: {report.metadata.precision}, layout {report.metadata.layout}{opset}; takes {taking}, any number of them; "
        f"{torch.get_num_threads()} thread(s)"
    )


def _row(name: str, figures: Figures, dense: Figures | None) -> tuple[str, ...]:
    agreement = figures.agreement
    return (
        name,
        f"{figures.bytes / 1e6:.2f}",
        f"{figures.milliseconds:.2f}",
        "" if dense is None else f"x {dense.milliseconds / figures.milliseconds:.2f}",
        "-" if figures.top1 is None else f"{figures.top1:.2f}",
        "" if agreement is None else f"{agreement.difference:.1e}",
        "" if agreement is None else f"{agreement.top1:.1%}",
    )
