"""What the commands do: `train`, `prune`, `finetune`, `evaluate`."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models.vision_transformer import VisionTransformer

from p3b.core.schedule import TAU_MAX, Schedule, parse_duration
from p3b.data import DataSplits
from p3b.deploy.choice import AUTO, LayoutChoice, choose_layout, with_layout
from p3b.deploy.layouts import check_layout
from p3b.deploy.speed import images_per_second
from p3b.errors import ConfigError, DataError, RunFolderError, ScheduleError, WeightsError
from p3b.methods import METHODS, effective_options, method_options
from p3b.pruner import Pruner
from p3b.run.folder import StageFolder
from p3b.run.inputs import OpenedModel, num_workers, open_model, open_splits
from p3b.run.options import EvaluateConfig, PruneConfig, PruneOptions, TrainConfig, check_evaluation, to_plain
from p3b.run.screen import Display
from p3b.run.stage import PRODUCTS, SPARSE_CHECKPOINT, Session, count_unreadable, evaluate_split, explained, open_session
from p3b.run.training import train_part
from p3b.run.warm_up import DEPENDS_ON, WARM_UP, WarmUp, depends_on
from p3b.storage import saved_model as artifact
from p3b.train.distributed import Processes, process_group
from p3b.train.evaluate import Accuracy
from p3b.train.optim import Precision
from p3b.vit.architecture import build_dense
from p3b.vit.attention import choose_attention
from p3b.vit.cost import count_macs, count_parameters
from p3b.vit.deployment import compact_of, layout_of

LAYOUT_BATCHES = (1, 32)
"""Images at a time that the end of pruning measures layouts with: one that waits, and many."""


@dataclass(frozen=True)
class Figures:
    """One column of the final table. Accuracies in percent, None where nothing was evaluated."""

    params: int
    macs: int
    bytes: int
    top1: float | None = None
    top5: float | None = None
    images_per_second: float | None = None


def train(config: TrainConfig, stage: str = "train") -> dict[str, Any]:
    """Train a model without pruning it; returns the summary.

    Args:
        config: settings.
        stage: "train" for dense transfer, "finetune" for a small model.
    """
    with open_session(config, stage) as session:
        if finished := _finished(session):
            return finished
        model = session.open_model()
        checkpoint = session.begin(model)
        train_part(session, model, stage, config.training.epochs, config.training.lr, checkpoint=checkpoint)
        folder = session.save_model(model)
        accuracies = _final_accuracies(session, model)
        figures = _figures(session, [_as_deployed(session, model)], [accuracies])
        _show(session, f"{stage} on {session.splits.description}", {"model": figures[0]})
        session.display.say(f"model: {folder}")
        session.display.say(f"run:   {session.folder.path}")
        return session.write_summary({"model": asdict(figures[0]), "accuracy": _plain(accuracies)})


def finetune(config: TrainConfig) -> dict[str, Any]:
    """Fine-tune the model at --model-path; returns the summary.

    Raises:
        ConfigError: no model path.
    """
    if config.model.model_path is None:
        raise ConfigError(
            f"--model-path is missing: the model to fine-tune, such as run/{PRODUCTS['prune']} or run/{SPARSE_CHECKPOINT}."
        )
    return train(config, "finetune")


def prune(config: PruneConfig, warm_up: Path | None = None) -> dict[str, Any]:
    """Transfer and prune on the way, and fine-tune where asked for; returns the summary.

    Args:
        config: settings.
        warm_up: folder of a warm-up (`train_warm_up`) of the same settings, to go on from in place of training it again; the
            result is the same.

    Raises:
        ConfigError: the warm-up is of other settings.
    """
    options = method_options_of(config)
    check_layout(config.prune.layout, [AUTO])
    with open_session(config, "prune") as session:
        if finished := _finished(session):
            return finished
        dense_accuracy = _dense_run_accuracy(config.prune.dense_run)
        model, pruner, prune_epochs = _open_pruner(session, config, options)
        schedule = pruner.schedule
        finetune_epochs = config.training.epochs - prune_epochs + config.prune.finetune_epochs
        dense_params = count_parameters(model)
        shared = None if warm_up is None else WarmUp(warm_up)
        if shared is not None:
            shared.require(depends_on(session, model, options, schedule))
        checkpoint = session.begin(model)
        if checkpoint is None and shared is not None:
            checkpoint = shared.take_up(session, pruner, options)
        session.display.say(
            f"optimizer steps: pruning starts at {schedule.start}, is sparse at {schedule.sparse}, final at {schedule.final}; "
            f"masks are renewed every {schedule.update_every}"
        )
        measured_by = effective_options(config.prune.prune_method, options).get("estimator")
        if measured_by is not None and not config.prune.prune_keep_ratios:
            session.display.say(f"the benefit of blocks is measured as --prune-benefit {measured_by} does")
        if config.prune.prune_blocks_only:
            session.display.say("the prune ratio counts the blocks alone")

        if checkpoint is None or checkpoint["progress"]["place"]["part"] == "prune":
            train_part(session, model, "prune", prune_epochs, config.training.lr, pruner=pruner, checkpoint=checkpoint)
            session.log_decision(pruner.decide_last(), "finalize", schedule.final, pruner.kept_params())
            session.say_what_returned()
            pruner.shrink()
            name, accuracy = session.evaluate(model)
            kept = f"{count_parameters(model):,} of {dense_params:,} parameters"
            session.display.say(f"shrunk to {kept}: {name} top-1 {accuracy.top1:.2f} %")
            session.save_sparse_checkpoint(model)
            session.save_model(model)
            checkpoint = None
        else:
            model = session.reopen_sparse_checkpoint()
        if finetune_epochs:
            lr = config.prune.finetune_lr or config.training.lr
            train_part(session, model, "fine-tune", finetune_epochs, lr, first_epoch=prune_epochs, checkpoint=checkpoint)
        folder = session.save_model(model)
        return _finish_pruning(session, model, folder, dense_accuracy)


def train_warm_up(config: PruneConfig) -> dict[str, Any]:
    """Train the steps before pruning starts, for all runs that differ in the budget alone; returns the summary.

    Args:
        config: of one of these runs, with an output folder of the warm-up's own; the budget plays no part.
    """
    options = method_options_of(config)
    with open_session(config, WARM_UP) as session:
        if finished := _finished(session):
            return finished
        model, pruner, prune_epochs = _open_pruner(session, config, options)
        terms = depends_on(session, model, options, pruner.schedule)
        checkpoint = session.begin(model)
        train_part(
            session,
            model,
            "prune",
            prune_epochs,
            config.training.lr,
            pruner=pruner,
            checkpoint=checkpoint,
            until=pruner.schedule.start,
        )
        return session.write_summary({"steps": pruner.schedule.start, DEPENDS_ON: terms})


def _open_pruner(session: Session, config: PruneConfig, options: dict[str, Any]) -> tuple[VisionTransformer, Pruner, int]:
    """The dense model with its pruner, and the epochs that pruning takes."""
    model = session.open_model()
    schedule, prune_epochs = prune_schedule(config, session.steps_per_epoch)
    return model, Pruner(model, config.prune.prune_ratio, config.prune.prune_method, schedule, **options), prune_epochs


def prune_schedule(config: PruneConfig, steps_per_epoch: int) -> tuple[Schedule, int]:
    """The phases in optimizer steps, and the epochs that they take; the model is shrunk at the end of an epoch.

    An interval between mask updates that is longer than an epoch gives way to three updates an epoch.

    Raises:
        ScheduleError: phases out of order, or longer than the run.
    """
    options, epochs = config.prune, config.training.epochs
    start = parse_duration(options.prune_start_epoch, epochs, steps_per_epoch)
    final = parse_duration(options.prune_finalize_epoch or "100%", epochs, steps_per_epoch)
    if options.prune_sparse_epoch is None:
        sparse = start + 0.375 * (final - start)
    else:
        sparse = parse_duration(options.prune_sparse_epoch, epochs, steps_per_epoch)
    final = -(-final // 1)
    if not 0 <= start < sparse <= final <= epochs:
        raise ScheduleError(
            f"The phases do not fit: pruning starts after {start:g} epochs (--prune-start-epoch), is sparse after {sparse:g} "
            f"(--prune-sparse-epoch), is finalized after {final:g} (--prune-finalize-epoch) of {epochs} (--epochs); expected "
            "0 <= start < sparse <= finalize <= epochs."
        )
    update_every = None  # three times an epoch
    if options.prune_steps_update_mask is not None:
        # The flag counts mini-batches and stands for about three updates an epoch; in an epoch that is shorter than the
        # interval there would be none at all.
        asked = max(1, round(options.prune_steps_update_mask / config.training.grad_accum_steps))
        update_every = asked if asked <= steps_per_epoch else None
    tau_max = TAU_MAX if options.prune_masks == "soft" else 0.0
    schedule = Schedule.from_epochs(start, sparse, final, steps_per_epoch, update_every, tau_max)
    return schedule, int(final)


METHOD_OPTIONS = {
    "prune_blocks_only": "blocks_only",
    "prune_benefit": "estimator",
    "align": "align",
    "prune_keep_ratios": "keep_ratios",
    "prune_alpha": "alpha",
    "prune_gamma": "gamma",
    "prune_benefit_scale": "benefit_scale",
    "probe_lr": "probe_lr",
    "wd_round_to": "round_to",
    "wd_classifiers": "classifiers",
    "wd_classifier_choose": "classifier_choose",
    "wd_classifier_lr": "classifier_lr",
    "wd_lr": "lr",
    "wd_lambda_lr": "lambda_lr",
    "savit_every": "every",
    "savit_images": "images",
}
"""Settings of the command that are for the method alone, and what the methods that take them call them."""


def method_options_of(config: PruneConfig) -> dict[str, Any]:
    """The options of the chosen method, each with what the command was told.

    Raises:
        ConfigError: the method is unknown, or a setting that it does not take was changed: it would be ignored otherwise.
    """
    options, defaults, method = config.prune, PruneOptions(), config.prune.prune_method
    taken = method_options(method)
    given: dict[str, Any] = {"seed": config.run.seed} if "seed" in taken else {}
    for setting, option in METHOD_OPTIONS.items():
        value = getattr(options, setting)
        if option in taken:
            if value is not None:  # what is left open is the method's to say
                given[option] = None if value == () else value
        elif value != getattr(defaults, setting):
            takers = [name for name in METHODS if option in method_options(name)]
            raise ConfigError(
                f"--{setting.replace('_', '-')} {value} means nothing to --prune-method {method}, only to {', '.join(takers)}; "
                "leave it out or choose another method."
            )
    return given


def evaluate_saved(config: EvaluateConfig) -> dict[str, Any]:
    """Accuracy of a saved model on every part of a data set that it was not trained on, its size and its speed.

    With an output folder the result is written there, as stage "evaluate".

    Raises:
        ConfigError: no weights. WeightsError, DataError: the model's classes are not the data's.
    """
    check_evaluation(config)
    check_layout(config.layout, [AUTO])
    options = config.model
    if options.model_path is None and not options.model_pretrained:
        raise ConfigError(f"--model-path is missing: the model to evaluate, such as run/{PRODUCTS['prune']}.")
    with process_group(config.run.device, config.run.timeout_minutes) as (processes, device):
        display = Display(processes.is_main)
        precision = Precision.choose(config.precision, device)
        folder = None if config.run.output_dir is None else StageFolder(config.run.output_dir, "evaluate")
        if folder is not None:
            folder.check(resume=False, overwrite=config.run.overwrite)
        # Nothing is trained here, so nothing is cut off a folder without parts: all of it is evaluated.
        cut_nothing = config.data.data_set.upper() == "FOLDER" and config.data.val_share is None
        splits = open_splits(replace(config.data, val_share=0.0) if cut_nothing else config.data, config.run.seed, processes)
        opened = _open_trained(config, splits)
        if folder is not None:
            folder.claim_for_all(processes.is_main, display.say, resume=False, overwrite=config.run.overwrite)
            if processes.is_main:
                folder.begin(to_plain(config), config.run.overwrite)
                display.log_to(folder.path / "log.txt")
        with precision.autocast():
            model = choose_attention(opened.model, device, precision.dtype).to(device).eval()
            laid_out = with_layout(model, config.layout, batch_size=config.batch_size)
        opened = replace(opened, model=laid_out)
        with explained(processes, config.run.output_dir, lambda: True):
            accuracies = _accuracies(config, splits, opened, processes, precision)
        model, image_shape = opened.model, opened.preprocessing.input_size
        with precision.autocast():
            speed = images_per_second([model], image_shape, batch_size=config.batch_size, device=device)[0]
        rows = [(name, f"{a.top1:.2f}", f"{a.top5:.2f}", f"{a.loss:.4f}", f"{a.images:,}") for name, a in accuracies.items()]
        display.table(f"{options.model_path or options.model}", ("part", "top-1 %", "top-5 %", "loss", "images"), rows)
        compact = compact_of(model)
        figures = Figures(count_parameters(compact), _macs(compact), _bytes(compact), images_per_second=speed)
        display.say(
            f"{figures.params:,} parameters, {figures.macs / 1e6:,.1f} M MACs, {speed:,.0f} images/s on {device} in the layout "
            f"{layout_of(model)}"
        )
        if unreadable := count_unreadable(splits):
            display.say(f"{unreadable} unreadable image(s) were skipped")
        measured = {"model": asdict(figures), "accuracy": _plain(accuracies)}
        summary = {"stage": "evaluate", **measured, "layout": layout_of(model), "unreadable_images": unreadable}
        if folder is not None and processes.is_main:
            folder.write_json("summary.json", summary)
            folder.release()
        return summary


def _open_trained(config: EvaluateConfig, splits: DataSplits) -> OpenedModel:
    """The model to evaluate, refused unless it was trained for the classes of the data."""
    options = config.model
    opened = open_model(options, len(splits.class_names), config.run.seed)
    pretrained = timm.get_pretrained_cfg(options.model) if opened.report is None else None
    known = len(splits.class_names) if pretrained is None else pretrained.num_classes
    if known != len(splits.class_names):
        raise WeightsError(
            f"timm's {options.model} knows {known} classes, the data has {len(splits.class_names)}; train it first."
        )
    if opened.report is not None and (untrained := opened.report.replaced + opened.report.missing):
        raise WeightsError(f"The model was not trained for these {len(splits.class_names)} classes: {'; '.join(untrained)}")
    if opened.class_names is not None and opened.class_names != splits.class_names:
        raise DataError(
            f"The model was trained for the classes {', '.join(opened.class_names[:8])} ..., the data has "
            f"{', '.join(splits.class_names[:8])} ...; they must be the same in the same order."
        )
    return opened


def _accuracies(
    config: EvaluateConfig, splits: DataSplits, opened: OpenedModel, processes: Processes, precision: Precision
) -> dict[str, Accuracy]:
    model = opened.model.to(precision.device).eval()
    workers = num_workers(config.data, processes, precision.device)
    parts = {"val": splits.val, "test": splits.test}
    if not any(parts.values()):
        parts = {"all": splits.train}
    return {
        name: evaluate_split(
            model, part, opened.preprocessing, precision, processes, config.batch_size, workers, config.run.dist_eval
        )
        for name, part in parts.items()
        if part is not None
    }


def _finish_pruning(
    session: Session, model: VisionTransformer, folder: Path, dense_accuracy: dict[str, Any] | None
) -> dict[str, Any]:
    accuracies = _final_accuracies(session, model)
    dense = build_dense(artifact.model_config(model)["architecture"]).to(session.device)
    choices = _layout_choices(session, _as_deployed(session, model))
    timed = model if not choices else with_layout(model, choices[-1].layout)
    figures = _figures(session, [dense, model], [{}, accuracies], [dense, timed])
    note = "dense accuracy: not measured; give --dense-run to compare"
    if dense_accuracy is not None:
        figures[0] = Figures(**{**asdict(figures[0]), "top1": dense_accuracy["top1"], "top5": dense_accuracy["top5"]})
        note = f"dense accuracy: from {session.config.prune.dense_run}"  # type: ignore[attr-defined]
    drawn = session.draw_figures()
    _show(session, f"{session.splits.description}", {"dense": figures[0], "pruned": figures[1]})
    session.display.say(note)
    for choice in choices:
        session.display.say(f"layout:  {choice.layout} for batches of {choice.batch_size}")
    session.display.say(f"model:   {folder}")
    session.display.say(f"run:     {session.folder.path}")
    for figure in drawn:
        session.display.say(f"figure:  {figure}")
    return session.write_summary(
        {
            "dense": asdict(figures[0]),
            "pruned": asdict(figures[1]),
            "accuracy": _plain(accuracies),
            "layouts": [asdict(choice) for choice in choices],
            "reached_prune_ratio": 1 - figures[1].params / figures[0].params,
            "returned": session.returned(),
            "figures": [str(figure) for figure in drawn],
        }
    )


def _as_deployed(session: Session, model: VisionTransformer) -> VisionTransformer:
    """The model as it is timed: in float32 and evaluation mode."""
    return choose_attention(model.eval(), session.device, None)


def _layout_choices(session: Session, model: VisionTransformer) -> list[LayoutChoice]:
    """The layout for each batch size, measured where --layout is auto; on the main process alone, which times the model."""
    layout = session.config.prune.layout  # type: ignore[attr-defined]
    if not session.processes.is_main:
        return []
    if layout == AUTO:
        return [choose_layout(model, batch_size=batch_size) for batch_size in LAYOUT_BATCHES]
    return [LayoutChoice(layout, batch_size, {}) for batch_size in LAYOUT_BATCHES]


def _finished(session: Session) -> dict[str, Any] | None:
    """Summary of a stage that is resumed though it has come to its end."""
    if not (session.resume and session.folder.finished):
        return None
    session.display.say(f"{session.folder.path} is finished; nothing is left to do.")
    return session.folder.read_json("summary.json")


def _dense_run_accuracy(run: Path | None) -> dict[str, Any] | None:
    """Accuracy of an earlier dense run, on the part that final figures are taken from."""
    if run is None:
        return None
    stage = StageFolder(run, "train")
    if not stage.finished:
        raise RunFolderError(f"{run} holds no finished `p3b train`; give --dense-run the output folder of one.")
    summary = stage.read_json("summary.json")
    return dict(summary["accuracy"].get("test") or summary["accuracy"]["val"])


def _final_accuracies(session: Session, model: VisionTransformer) -> dict[str, Accuracy]:
    """On the parts that exist: val, which may have chosen the epoch, and test, which never does."""
    parts = {"val": session.splits.val, "test": session.splits.test}
    return {name: session.evaluate(model, name)[1] for name, part in parts.items() if part is not None}


def _figures(
    session: Session,
    models: list[VisionTransformer],
    accuracies: list[dict[str, Accuracy]],
    timed: list[torch.nn.Module] | None = None,
) -> list[Figures]:
    """Figures of each model; `timed` are the same ones in the layouts that they are timed in."""
    speeds: list[float | None] = [None] * len(models)
    if session.processes.is_main:
        speeds = list(
            images_per_second(
                timed or models,
                session.preprocessing.input_size,
                batch_size=session.config.training.batch_size,
                device=session.device,
            )
        )
    figures = []
    for model, measured, speed in zip(models, accuracies, speeds, strict=True):
        final = measured.get("test") or measured.get("val")
        top1, top5 = (None, None) if final is None else (final.top1, final.top5)
        figures.append(Figures(count_parameters(model), _macs(model), _bytes(model), top1, top5, speed))
    return figures


def _show(session: Session, title: str, columns: dict[str, Figures]) -> None:
    rows = [
        ("parameters", *(f"{c.params:,}" for c in columns.values())),
        ("MACs (M)", *(f"{c.macs / 1e6:,.1f}" for c in columns.values())),
        ("size on disk (MB)", *(f"{c.bytes / 1e6:.2f}" for c in columns.values())),
        ("top-1 (%)", *(_percent(c.top1) for c in columns.values())),
        ("top-5 (%)", *(_percent(c.top5) for c in columns.values())),
        ("images per second", *(f"{c.images_per_second or 0:,.0f}" for c in columns.values())),
    ]
    if len(columns) == 2:
        dense, small = columns.values()
        ratios = (
            small.params / dense.params,
            small.macs / dense.macs,
            small.bytes / dense.bytes,
            None,
            None,
            (small.images_per_second or 0) / (dense.images_per_second or 1),
        )
        rows = [(*row, "" if ratio is None else f"x {ratio:.2f}") for row, ratio in zip(rows, ratios, strict=True)]
        session.display.table(title, ("", *columns, "ratio"), rows)
    else:
        session.display.table(title, ("", *columns), rows)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _macs(model: VisionTransformer) -> int:
    return count_macs(model, tuple(model.patch_embed.img_size))


def _bytes(model: torch.nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())


def _plain(accuracies: dict[str, Accuracy]) -> dict[str, Any]:
    return {name: asdict(accuracy) for name, accuracy in accuracies.items()}
