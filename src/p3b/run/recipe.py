"""How a stage trains, whatever model it trains: batches, mixup, loss and the options of the optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from timm.data import Mixup
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from p3b.data import Augmentation, DataSplits, Preprocessing, TrainBatches, mixup, train_batches
from p3b.errors import ConfigError, WeightsError
from p3b.run.augment_options import AugmentOptions
from p3b.run.machine import Machine
from p3b.run.options import TrainingOptions
from p3b.storage.models import build_model
from p3b.train.loop import steps_per_epoch
from p3b.train.losses import TrainingLoss, class_weights, task_loss
from p3b.train.optim import build_optimizer
from p3b.vit.families import images_of


@dataclass(frozen=True)
class Recipe:
    """What every training of a stage has in common.

    Attributes:
        options: of the optimizer, the learning rate and what is done with gradients and weights.
        batches: of the training images, on the device.
        mixup: of a batch, where asked for.
        loss: of a batch.
        global_batch: images of an optimizer step, over all processes.
        steps_per_epoch: optimizer steps.
    """

    options: TrainingOptions
    batches: TrainBatches
    mixup: Mixup | None
    loss: TrainingLoss
    global_batch: int
    steps_per_epoch: int


def open_recipe(
    options: TrainingOptions,
    augment: AugmentOptions,
    splits: DataSplits,
    preprocessing: Preprocessing,
    model: VisionTransformer,
    machine: Machine,
    *,
    seed: int,
    num_workers: int,
) -> Recipe:
    """Open all that training needs.

    Args:
        options, augment: of the command line.
        splits: whose training images are used.
        preprocessing: of the images.
        model: that will be trained; a distilled one is told whether there is a teacher.
        machine: that trains.
        seed: of everything random.
        num_workers: that load images.

    Raises:
        ConfigError: options that cannot be used together, or no such optimizer. WeightsError: of the teacher.
    """
    classes = len(splits.class_names)
    counts = np.bincount(splits.train.targets, minlength=classes).tolist()
    loss = training_loss(options, model, counts, machine.device)
    batches = train_batches(
        splits.train,
        preprocessing,
        _augmentation(augment),
        batch_size=options.batch_size,
        num_workers=num_workers,
        device=machine.device,
        seed=seed,
        rank=machine.processes.rank,
        world_size=machine.processes.world_size,
    )
    mixed = mixup(classes, mixup_alpha=options.mixup, cutmix_alpha=options.cutmix, label_smoothing=options.smoothing)
    if mixed is not None and batches.batch_size % 2:
        raise ConfigError(
            f"Mixup pairs images, but a batch has {batches.batch_size} of them. Give an even --batch-size, or turn it off with "
            "--mixup 0 --cutmix 0."
        )
    build_optimizer(model, options.opt, options.lr, options.weight_decay, options.layer_decay)  # refused now, if it cannot be
    return Recipe(
        options=options,
        batches=batches,
        mixup=mixed,
        loss=loss,
        global_batch=batches.batch_size * machine.processes.world_size * options.grad_accum_steps,
        steps_per_epoch=steps_per_epoch(batches, options.grad_accum_steps),
    )


def training_loss(
    options: TrainingOptions, model: VisionTransformer, images: Sequence[int], device: torch.device
) -> TrainingLoss:
    """Task loss and, where asked for, the distance to a teacher.

    Args:
        options: of training.
        model: that learns.
        images: of each class.
        device: that it is on.

    Raises:
        WeightsError: the teacher's head is for other classes, or it is a saved model for other images.
    """
    weights = class_weights(images, options.class_balance)
    weights = None if weights is None else weights.to(device)
    task = task_loss(soft_targets=options.mixup > 0 or options.cutmix > 0, smoothing=options.smoothing, class_weights=weights)
    teacher = None
    if options.teacher_model is not None:
        teacher, report = build_model(
            options.teacher_model,
            num_classes=len(images),
            model_kwargs={"img_size": images_of(model).size},  # it sees the student's images
            pretrained=options.teacher_path is None,
            weights=options.teacher_path,
        )
        if report is not None and (unknown := report.replaced + report.missing):
            raise WeightsError(f"The teacher must know the same {len(images)} classes: {'; '.join(unknown)}")
        teacher.requires_grad_(False).to(device).eval()
    kind = "none" if teacher is None else options.distillation_type
    tau = 1.0 if options.distillation_tau is None else options.distillation_tau
    loss = TrainingLoss(task, teacher, kind, options.distillation_alpha, tau)
    answer_teacher_apart(model, enable=teacher is not None)
    return loss


def answer_teacher_apart(model: nn.Module, enable: bool) -> None:
    """Let a distilled DeiT answer with two logits in training, one for the task and one for the teacher."""
    if callable(separate := getattr(model, "set_distilled_training", None)):
        separate(enable)


def _augmentation(options: AugmentOptions) -> Augmentation:
    """Options of the command line as the data room takes them."""
    return Augmentation(
        auto_augment=options.aa,
        color_jitter=options.color_jitter,
        erasing_probability=options.reprob,
        erasing_mode=options.remode,
        erasing_count=options.recount,
        interpolation=options.train_interpolation,
        scale=options.crop_scale,
        horizontal_flip=options.hflip,
        repeats=3 if options.repeated_aug else 1,
        enabled=options.augment,
    )
